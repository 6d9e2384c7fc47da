# The NTM of config/shapes_tune.py goes on, on a time grid with its levels further towards noise: the model in assets/.
# 33 minutes for 5,427 iterations on 2 cores (180 images a second); val_loss -0.115, val_bound -2.232.
#   torchrun --nproc_per_node=2 train.py config/shapes_more.py
init_from = "out/shapes_tune/ckpt.pt"
out_dir = "out/shapes_more"
dataset = "shapes"

shift = 1.0
lr = 2e-3
max_iters = 6000
val_interval = 1000
val_examples = 500
