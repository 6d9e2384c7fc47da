out_dir = "out/fashion"
dataset = "fashion"
image_size = 14
channels = 1
text_len = 6

width = 128

lr = 4e-3
max_iters = 3000
val_interval = 500
val_examples = 500
