# An NTM of Fashion-MNIST that starts from the flow-matching model of config/fashion_fm.py.
init_from = "out/fashion_fm/ckpt.pt"
out_dir = "out/fashion_tune"
dataset = "fashion"

lr = 2e-3
max_iters = 1500
val_interval = 500
val_examples = 500
