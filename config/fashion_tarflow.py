# (ours) TarFlow as a special case of NTM: one step from noise, deep blocks, and no predictor, on Fashion-MNIST, 14x14.
# val_bound is the exact -log p(x at t_min), in nats per dimension. The model does not see captions, which are worth at
# most 2.3 nats per image.
objective = "tarflow"
out_dir = "out/fashion_tarflow"
dataset = "fashion"
image_size = 14
channels = 1
text_len = 6

steps = 1
transporter_blocks = 4
transporter_layers = 2
transporter_width = 128
transporter_heads = 4

max_iters = 3000
val_interval = 500
val_examples = 500
