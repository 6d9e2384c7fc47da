# The NTM of coloured shapes in assets/ goes on, on a time grid with its levels further towards noise.
#   torchrun --nproc_per_node=2 train.py config/shapes_more.py
init_from = "out/shapes_tune/ckpt.pt"
out_dir = "out/shapes_more"
dataset = "shapes"

shift = 1.0
lr = 2e-3
max_iters = 6000
val_interval = 1000
val_examples = 500
