out_dir = "out/shapes"
dataset = "shapes"
image_size = 16
channels = 3
text_len = 8

width = 128

max_iters = 4000
val_interval = 500
val_examples = 500
