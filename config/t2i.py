# Text to image, 256x256 as 4x32x32 latents: 256 tokens of 16 numbers, 1.25 billion parameters; for eight GPUs of 80 GB.
#   torchrun --nproc_per_node=8 data.py encode --data_dir=IMAGES --encoder=encoder.pt2 --workers=8 --out=out/data/cc12m
#   torchrun --nproc_per_node=8 train.py config/t2i.py --decoder=decoder.pt2
# docs/data.md has the way from a list of URLs to here.
# Computed, not measured. Memory of each: 25 GB for weights, gradients, AdamW and the average in float32; 2.3 GB for
# weights in bfloat16, and 0.91 GB an image for what back-propagation keeps, 29 GB for the 32 of a pass (both counted in
# tests/test_memory.py); validation takes 4 GB. Gradients are DDP's buckets, no second copy. An update is 1.67 TFLOP an
# image (counted by torch.utils.flop_counter): at 40% of an H100's 989 TFLOP/s, 240 images/s a GPU and 1,900 on eight.
out_dir = "out/t2i"
dataset = "shards"
data_dir = "out/data/cc12m"
image_size = 32
channels = 4
tokenizer = "gpt2"
text_len = 77

patch_size = 2
width = 1536
depth = 24
heads = 24
transporter_width = 1024
transporter_blocks = 2
transporter_layers = 4
transporter_heads = 16
steps = 4
shift = None

batch_size = 1024
grad_accum = 4  # 32 images a pass on each of eight GPUs
max_iters = 300000
optimizer = "adamw"
lr = 1e-4
warmup_iters = 5000
ema = 0.9999
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
