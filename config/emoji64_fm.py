# Flow matching on emoji, 64x64, for a GPU: the start of config/emoji64.py. `python data.py emoji` makes the data.
# Training takes 4 minutes on an H200, start and compilation included. val_loss 0.054. speedrun.sh runs this file and
# all later stages.
objective = "fm"
out_dir = "out/emoji64_fm"
dataset = "shards"
data_dir = "out/data/emoji"
image_size = 64
channels = 3
flip = True
tokenizer = "emoji"
text_len = 16

patch_size = 4
width = 384
depth = 6
heads = 6

lr = 1.2e-2
words_lr = 25.0  # most words are rare
batch_size = 512
max_iters = 4000
warmup_iters = 300
in_memory = True
workers = 8
val_interval = 1000
val_examples = 400
