# An NTM of coloured shapes from the flow-matching model of config/shapes_fm.py: steps with a flow over pixels, levels in
# balance, the first step coupled to its noise (docs/beyond.md).
# 20 to 40 minutes on one core (--bfloat16=True). The model in assets/ had 8,000 iterations of Gaussian steps, then 4,500 of
# these (docs/results.md); val_bound -2.322.
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
