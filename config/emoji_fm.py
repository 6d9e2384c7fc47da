# Flow matching on emoji, 32x32: a start for config/emoji_tune.py. `python data.py emoji` makes the data.
# 40 minutes on one core (97 images a second); val_loss 0.108, of an earlier set of two styles.
objective = "fm"
out_dir = "out/emoji_fm"
dataset = "shards"
data_dir = "out/data/emoji"
image_size = 32
channels = 3
tokenizer = "emoji"
text_len = 16

patch_size = 4
width = 160
depth = 5

max_iters = 3500
val_interval = 500
val_examples = 392
