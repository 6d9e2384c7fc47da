# An NTM of coloured shapes that starts from the flow-matching model of config/shapes_fm.py. Its steps have a flow over
# pixels, the loss balances the noise levels, and the first step is coupled to its noise (docs/beyond.md). Training
# takes 45 minutes on one core with --bfloat16=True. The model in assets/ was trained for 8,000 iterations with
# Gaussian steps and then for 4,500 with these settings (docs/results.md); val_bound -2.322.
init_from = "out/shapes_fm/ckpt.pt"
out_dir = "out/shapes"
dataset = "shapes"

first_noise = 0.5
transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
shift = 1.0
level_weight = 1.0
aux_weight = 0.0

lr = 4e-3
batch_size = 32
max_iters = 8000
val_interval = 1000
val_examples = 500
