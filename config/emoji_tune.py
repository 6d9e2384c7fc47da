# An NTM of emoji from the flow-matching model of config/emoji_fm.py: correlated Gaussian steps, in closed form.
# An hour on one core at 256 wide (38 images/s, --bfloat16=True). A longer one drew worse: docs/log.md, 2026-11-26.
init_from = "out/emoji_fm/ckpt.pt"
out_dir = "out/emoji_tune"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

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
