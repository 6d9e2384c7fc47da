# An NTM of emoji, 64x64, like config/emoji.py, that starts from the flow-matching model of config/emoji64_fm.py.
# Training takes 2 minutes on an H200, start and compilation included. val_bound is -2.118 after 620 iterations.
init_from = "out/emoji64_fm/ckpt.pt"
out_dir = "out/emoji64"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

first_noise = 0.5
transporter_blocks = 0
rank = 24
filters = 16
filter_leak = 0.06  # without it one picture in fifty gets dark or glaring areas: docs/beyond.md
logistics = 3
mirrored = True
shift = 2.0  # in larger images, noisier levels decide the content: docs/log.md, 2026-11-26
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 3e-3
words_lr = 25.0
batch_size = 512
max_iters = 800
warmup_iters = 50
in_memory = True
workers = 8
val_interval = 200
val_examples = 400
