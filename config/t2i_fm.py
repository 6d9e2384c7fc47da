# Text-to-image flow matching, 256x256 as 4x32x32 latents, for eight GPUs of 80 GB: the start of config/t2i.py.
#   torchrun --nproc_per_node=8 data.py encode --data_dir=IMAGES --encoder=encoder.pt2 --workers=8 --out=out/data/cc12m
#   torchrun --nproc_per_node=8 train.py config/t2i_fm.py --decoder=decoder.pt2
#   torchrun --nproc_per_node=8 train.py config/t2i.py --decoder=decoder.pt2
# docs/data.md shows the way from a list of URLs to these shards. The recipe is that of config/emoji_fm.py. We have not
# trained anything of this size, so learning rates are guesses from smaller networks. Counted, not measured: 1.10
# billion parameters. Weights, gradients, average, Muon's momentum and AdamW's two moments take 19.3 GB of a GPU, in
# float32, and weights in bfloat16 2.04 GB. Back-propagation keeps 0.67 GB an image, 21 GB for the 32 images of a pass:
# 43 GB in all. Muon's step takes 3.3 GB, after these 21 GB are freed. An image takes 1.41 TFLOP (python -m
# evidence.update config/t2i_fm.py). On every GPU Muon takes 24.4 TFLOP an update, 12% of the operations. At 40% of an
# H100's 989 TFLOP/s that is 250 images/s a GPU and 2,000 on eight, 35 hours in all.
objective = "fm"
out_dir = "out/t2i_fm"
dataset = "shards"
data_dir = "out/data/cc12m"
image_size = 32
channels = 4
tokenizer = "gpt2"
text_len = 77

patch_size = 2  # 256 tokens of 16 numbers, as many tokens as config/emoji64_fm.py has
width = 1536
depth = 24
heads = 24

lr = 1e-3  # 8e-3 at width 192 in config/emoji_fm.py, falling as 1/width; not measured at this size
words_lr = 25.0  # most of GPT-2's 50,257 tokens are rare in captions, as words are in emoji's; not measured here
batch_size = 1024
grad_accum = 4  # 32 images a pass on each of eight GPUs
max_iters = 240000  # four fifths of all images, about as on emoji; the NTM gets the rest
warmup_iters = 5000
ema = 0.9999  # averages over 10,000 iterations, a small part of all
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
