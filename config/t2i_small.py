# config/t2i.py at 205 million parameters, for one GPU of 24 GB.
#   python train.py config/t2i_small.py
# Computed, but that a pass of 32 fits (tests/test_gpu.py, on an H100). Memory: 4 GB for weights, gradients, AdamW and
# the average in float32; 0.3 GB for weights in bfloat16, and 0.29 GB an image for what back-propagation keeps, 9 GB for
# the 32 of a pass (counted as for t2i.py). An update is 0.25 TFLOP an image: at 40% of an RTX 4090's 165 TFLOP/s, 270
# images/s.
out_dir = "out/t2i_small"
dataset = "shards"
data_dir = "out/data/cc12m"
image_size = 32
channels = 4
tokenizer = "gpt2"
text_len = 77

patch_size = 2
width = 768
depth = 12
heads = 12
transporter_width = 512
transporter_blocks = 2
transporter_layers = 4
transporter_heads = 8
steps = 4
shift = None

batch_size = 256
grad_accum = 8  # 32 images a pass
max_iters = 200000
optimizer = "adamw"
lr = 1e-4
warmup_iters = 5000
ema = 0.9999
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
