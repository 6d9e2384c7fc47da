# Emoji, 32x32, from scratch: two hours on one core at 55 pictures a second (not run to its end; config/emoji_fm.py and
# config/emoji_tune.py were). `python data.py emoji` makes the data.
out_dir = "out/emoji"
dataset = "shards"
data_dir = "out/data/emoji"
image_size = 32
channels = 3
tokenizer = "emoji"
text_len = 16

patch_size = 4
width = 160
depth = 5

max_iters = 6000
val_interval = 500
val_examples = 392
