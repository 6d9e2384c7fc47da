# An NTM of emoji, 64x64, from the flow-matching model of config/emoji64_fm.py, as config/emoji.py's.
# Three and a half minutes on an H200 that others shared (1,600 images a second); val_bound -1.819.
init_from = "out/emoji64_fm/ckpt.pt"
out_dir = "out/emoji64"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

first_noise = 0.5
transporter_blocks = 0
rank = 24
shift = 2.0  # larger images are decided at noisier levels: docs/log.md, 2026-11-26
level_weight = 0.5
closed_form = True
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0
batch_size = 128
max_iters = 2000
warmup_iters = 50
workers = 5
val_interval = 500
val_examples = 400
