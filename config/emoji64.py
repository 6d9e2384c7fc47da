# Emoji, 64x64, for one GPU. `python data.py emoji` makes the data.
# Computed, not measured, as no GPU was at hand: an update is 78 GFLOP an image, the run 200 PFLOP, 10 minutes at a
# third of an H100's bfloat16 peak, more in fact, as layers this narrow do not fill it.
out_dir = "out/emoji64"
dataset = "shards"
data_dir = "out/data/emoji"
image_size = 64
channels = 3
tokenizer = "emoji"
text_len = 20

patch_size = 4
width = 512
depth = 12
heads = 8
transporter_width = 256
transporter_heads = 4

batch_size = 128
max_iters = 20000
warmup_iters = 500
lr = 2e-3
ema = 0.9995
workers = 8
val_interval = 1000
val_examples = 392
