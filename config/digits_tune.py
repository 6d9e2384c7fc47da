# An NTM of the digits that starts from the flow-matching model of config/digits_fm.py.
# 4 minutes on one core (300 images a second); from 1,000 iterations of the start, val_bound -0.909.
init_from = "out/digits_fm/ckpt.pt"
out_dir = "out/digits_tune"

lr = 2e-3
max_iters = 1000
