# Flow matching on Fashion-MNIST, 14x14, with the network of config/fashion.py. Ten minutes on one core.
objective = "fm"
out_dir = "out/fashion_fm"
dataset = "fashion"
image_size = 14
channels = 1
text_len = 6

width = 128

lr = 4e-3
max_iters = 3000
val_interval = 500
val_examples = 500
