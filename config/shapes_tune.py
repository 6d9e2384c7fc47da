# An NTM of coloured shapes that starts from the flow-matching model of config/shapes_fm.py.
# 40 minutes on one core (80 images a second); val_loss -0.421, val_bound -2.263.
init_from = "out/shapes_fm/ckpt.pt"
out_dir = "out/shapes_tune"
dataset = "shapes"

lr = 2e-3
max_iters = 3000
val_interval = 500
val_examples = 500
