# An NTM of Fashion-MNIST that starts from the flow-matching model of config/fashion_fm.py. Its steps have a flow over
# pixels. Training takes 15 to 35 minutes on one core with --bfloat16=True. val_bound is -1.419.
init_from = "out/fashion_fm/ckpt.pt"
out_dir = "out/fashion"
dataset = "fashion"

transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
level_weight = 1.0
aux_weight = 0.0

lr = 4e-3
batch_size = 32
max_iters = 4500
val_interval = 500
val_examples = 500
