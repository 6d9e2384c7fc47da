# An NTM of coloured shapes from the flow-matching model of config/shapes_fm.py: correlated Gaussian steps, in closed form,
# levels in balance, the first step coupled to its noise (docs/beyond.md). The model in assets/.
# 20 minutes on one core (220 images a second, --bfloat16=True); val_bound -2.268.
init_from = "out/shapes_fm/ckpt.pt"
out_dir = "out/shapes"
dataset = "shapes"

first_noise = 0.5
transporter_blocks = 0
rank = 24
shift = 1.0
level_weight = 1.0
closed_form = True
aux_weight = 0.0

lr = 4e-3
batch_size = 32
max_iters = 8000
val_interval = 1000
val_examples = 500
