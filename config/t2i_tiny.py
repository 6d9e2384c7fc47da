# config/t2i.py with 5.5 million parameters, which starts from the model of config/t2i_tiny_fm.py. The two files try the
# recipe in about an hour of one core, on latents of emoji (16x16x4 of 32x32x3) from evidence/blocks.py, which needs no
# training. val_bound -0.859; four steps follow captions as often as four of flow matching (docs/log.md, 2026-11-28).
init_from = "out/t2i_tiny_fm/ckpt.pt"
out_dir = "out/t2i_tiny"
dataset = "shards"
data_dir = "out/data/emoji_blocks"

first_noise = 0.5
transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
shift = 1.0  # as in config/emoji.py
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0
batch_size = 64
max_iters = 650
warmup_iters = 50
in_memory = True
log_interval = 100
val_interval = 130
val_examples = 400
