# An NTM of emoji from the flow-matching model of config/emoji_fm.py: correlated Gaussian steps, in closed form.
# An hour and a quarter on one core (57 to 60 images a second, --bfloat16=True).
init_from = "out/emoji_fm/ckpt.pt"
out_dir = "out/emoji_tune"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

transporter_blocks = 0
rank = 24
shift = 1.0
level_weight = 1.0
closed_form = True
aux_weight = 0.0

lr = 3e-3
words_lr = 25.0
max_iters = 4000
val_interval = 300
val_examples = 400
