# A second stage: the model of config/shapes_tune.py gets a transporter. On shapes it has not paid so far (docs/log.md).
# 10 minutes on 2 cores (58 images a second); val_bound -2.294, where it starts from -2.298.
#   torchrun --nproc_per_node=2 train.py config/shapes_more.py
init_from = "out/shapes_tune/ckpt.pt"
out_dir = "out/shapes_more"
dataset = "shapes"

shift = 1.0
level_weight = 0.5

lr = 1e-3
batch_size = 32
max_iters = 1000
val_interval = 250
val_examples = 500
