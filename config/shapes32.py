# Coloured shapes, 32x32, for one GPU.
# Not measured: no GPU was at hand. Counted with torch.utils.flop_counter, an example is 27 GFLOP an update, so the run
# is 70 PFLOP: 4 minutes at a third of an H100's bfloat16 peak, more in fact, as layers this narrow do not fill it.
out_dir = "out/shapes32"
dataset = "shapes"
image_size = 32
channels = 3
text_len = 8

width = 384
depth = 8
heads = 6
transporter_width = 128
transporter_blocks = 4

batch_size = 256
max_iters = 10000
warmup_iters = 500
lr = 2e-3
ema = 0.9995
val_interval = 1000
val_examples = 1000
