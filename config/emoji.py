# An NTM of emoji, 32x32, from the flow-matching model of config/emoji_fm.py: correlated Gaussian steps, in closed form, the
# first step coupled to its noise (docs/beyond.md).
# An hour on one core at 256 wide (38 images/s, --bfloat16=True). The model in assets/ took the same settings in two stages:
# 2,000 iterations with first_noise 1, then 800 at lr 5e-4 with 0.5 (docs/data.md). As one stage it is trained at 64x64 only.
init_from = "out/emoji_fm/ckpt.pt"
out_dir = "out/emoji"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

first_noise = 0.5
transporter_blocks = 0
rank = 24
shift = 1.0
level_weight = 0.5
closed_form = True
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0
warmup_iters = 50
max_iters = 2000
val_interval = 400
val_examples = 400
