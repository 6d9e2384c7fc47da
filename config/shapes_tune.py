# The first stage of an NTM of coloured shapes: correlated Gaussian steps, in closed form, levels in balance, from the
# flow-matching model of config/shapes_fm.py. The model in assets/.
# 47 minutes on 2 cores (95 images a second); val_bound -2.298.
#   torchrun --nproc_per_node=2 train.py config/shapes_tune.py
init_from = "out/shapes_fm/ckpt.pt"
out_dir = "out/shapes_tune"
dataset = "shapes"

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
