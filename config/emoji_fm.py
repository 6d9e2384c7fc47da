# Flow matching on emoji, 32x32: a start for config/emoji_tune.py. `python data.py emoji` makes the data.
# 35 minutes on one core (64 to 70 images a second, --bfloat16=True). The baseline of docs/data.md: --max_iters=9000.
objective = "fm"
out_dir = "out/emoji_fm"
dataset = "shards"
data_dir = "out/data/emoji"
image_size = 32
channels = 3
flip = True
tokenizer = "emoji"
text_len = 16

patch_size = 4
width = 192
depth = 6

lr = 8e-3
words_lr = 25.0
max_iters = 2100
val_interval = 300
val_examples = 400
