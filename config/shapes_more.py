# A second stage: an NTM of shapes gets a transporter, which its first step may not be coupled for. It has not paid so far
# (docs/log.md). The start: train.py config/shapes_tune.py --first_noise=1 --out_dir=out/shapes_plain
# 10 minutes on 2 cores (58 images a second); val_bound -2.294, where it starts from -2.298.
#   torchrun --nproc_per_node=2 train.py config/shapes_more.py
init_from = "out/shapes_plain/ckpt.pt"
out_dir = "out/shapes_more"
dataset = "shapes"

shift = 1.0
level_weight = 0.5

lr = 1e-3
batch_size = 32
max_iters = 1000
val_interval = 250
val_examples = 500
