# An NTM of Fashion-MNIST that starts from the flow-matching model of config/fashion_fm.py.
# A quarter of an hour on one core (115 images a second); from 1,500 iterations of the start, val_bound -1.248.
init_from = "out/fashion_fm/ckpt.pt"
out_dir = "out/fashion_tune"
dataset = "fashion"

lr = 2e-3
max_iters = 1500
val_interval = 500
val_examples = 500
