# The second stage: the model of config/shapes_tune.py gets a transporter. The model in assets/.
# 12 minutes on 2 cores (70 images a second); val_bound -2.221.
#   torchrun --nproc_per_node=2 train.py config/shapes_more.py
init_from = "out/shapes_tune/ckpt.pt"
out_dir = "out/shapes_more"
dataset = "shapes"

shift = 1.0
level_weight = 0.5

lr = 2e-3
max_iters = 750
val_interval = 250
val_examples = 500
