# An NTM of emoji, 32x32, that starts from the flow-matching model of config/emoji_fm.py. Its steps have a flow over
# pixels, and the first step is coupled to its noise (docs/beyond.md). Training takes two hours on one core at width 256
# with --bfloat16=True. The model in assets/ was trained in three stages, which docs/results.md lists.
init_from = "out/emoji_fm/ckpt.pt"
out_dir = "out/emoji"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

first_noise = 0.5
transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
shift = 1.0
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0
warmup_iters = 50
max_iters = 2000
val_interval = 400
val_examples = 400
