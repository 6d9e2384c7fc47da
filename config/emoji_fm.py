# Flow matching on emoji, 32x32: the start of config/emoji.py. `python data.py emoji` makes the data. Training takes 2.5
# hours on one core with --bfloat16=True, at 64 to 70 images a second. val_loss 0.110.
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
words_lr = 25.0  # most words are rare
max_iters = 9000
val_interval = 300
val_examples = 400
