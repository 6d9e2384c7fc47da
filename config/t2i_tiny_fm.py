# config/t2i_fm.py with 4.8 million parameters: the start of config/t2i_tiny.py, to try the recipe on one CPU core.
#   python data.py emoji
#   python -m evidence.blocks --out=out/blocks
#   python data.py encode --data_dir=out/data/emoji --encoder=out/blocks/encoder.pt2 --image_size=32 --out=out/data/emoji_blocks
#   python train.py config/t2i_tiny_fm.py --bfloat16=True
#   python train.py config/t2i_tiny.py --bfloat16=True
objective = "fm"
out_dir = "out/t2i_tiny_fm"
dataset = "shards"
data_dir = "out/data/emoji_blocks"
image_size = 16
channels = 4
tokenizer = "emoji"
text_len = 16

patch_size = 4  # 16 tokens of 64 numbers
width = 192
depth = 6
heads = 4

lr = 8e-3
words_lr = 25.0
batch_size = 64
max_iters = 2600
warmup_iters = 250
in_memory = True
log_interval = 100
val_interval = 1000
val_examples = 400
