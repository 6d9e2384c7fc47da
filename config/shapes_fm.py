# Flow matching on coloured shapes, 16x16, with the network of config/shapes.py: a start for config/shapes_tune.py.
# An hour on one core (70 to 85 images a second).
objective = "fm"
out_dir = "out/shapes_fm"
dataset = "shapes"
image_size = 16
channels = 3
text_len = 8

width = 128

batch_size = 32
max_iters = 8000
val_interval = 1000
val_examples = 500
