# Fashion-MNIST, 14x14: the paper's model from scratch, with a transporter. Training takes half an hour on one core, at
# 115 images a second. val_loss -0.188, val_bound -1.332.
out_dir = "out/fashion_scratch"
dataset = "fashion"
image_size = 14
channels = 1
text_len = 6

width = 128

lr = 4e-3
max_iters = 3000
val_interval = 500
val_examples = 500
