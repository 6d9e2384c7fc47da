# Flow matching on coloured shapes, 16x16, with the network of config/shapes.py: a start for config/shapes_tune.py.
# Half an hour on one core (200 images a second); val_loss 0.051.
objective = "fm"
out_dir = "out/shapes_fm"
dataset = "shapes"
image_size = 16
channels = 3
text_len = 8

width = 128

max_iters = 6000
val_interval = 1000
val_examples = 500
