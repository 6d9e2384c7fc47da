# An NTM of Fashion-MNIST from the flow-matching model of config/fashion_fm.py: correlated Gaussian steps, in closed form.
# 20 minutes on one core (110 to 150 images a second); val_bound -1.356.
init_from = "out/fashion_fm/ckpt.pt"
out_dir = "out/fashion_tune"
dataset = "fashion"

transporter_blocks = 0
rank = 24
level_weight = 1.0
closed_form = True
aux_weight = 0.0

lr = 4e-3
batch_size = 32
max_iters = 4500
val_interval = 500
val_examples = 500
