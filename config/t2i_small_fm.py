# config/t2i_fm.py with 167 million parameters, for one GPU of 24 GB: the start of config/t2i_small.py.
#   python train.py config/t2i_small_fm.py
#   python train.py config/t2i_small.py
# Counted; docs/scaling.md has H200 measurements. Weights, gradients, average, Muon's momentum and AdamW's two moments
# take 3.0 GB, in float32, and weights in bfloat16 0.26 GB. Back-propagation keeps 0.17 GB an image, 5 GB for the 32
# images of a pass: 9 GB in all. An image takes 0.18 TFLOP (python -m evidence.update config/t2i_small_fm.py). Muon
# takes 1.5 TFLOP an update, 3% of the operations. At 40% of an RTX 4090's 165 TFLOP/s that is 350 images/s, 33 hours
# in all.
objective = "fm"
out_dir = "out/t2i_small_fm"
dataset = "shards"
data_dir = "out/data/cc12m"
image_size = 32
channels = 4
tokenizer = "gpt2"
text_len = 77

patch_size = 2  # 256 tokens of 16 numbers, as many tokens as config/emoji64_fm.py has
width = 768
depth = 12
heads = 12

lr = 2e-3  # 8e-3 at width 192 in config/emoji_fm.py, falling as 1/width; not measured at this size
words_lr = 25.0  # most of GPT-2's 50,257 tokens are rare in captions, as words are in emoji's; not measured here
batch_size = 256
grad_accum = 8  # 32 images a pass
max_iters = 160000  # four fifths of all images, about as on emoji; the NTM gets the rest
warmup_iters = 5000
ema = 0.9999  # averages over 10,000 iterations, a small part of all
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
