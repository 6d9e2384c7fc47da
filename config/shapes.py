out_dir = "out/shapes"
dataset = "shapes"
image_size = 16
channels = 3
text_len = 8

width = 128
transporter_blocks = 3
shift = 0.5

optimizer = "muon"
lr = 5e-3
max_iters = 4000
warmup_iters = 100
val_interval = 500
val_examples = 500
