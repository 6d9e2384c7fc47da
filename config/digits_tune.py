# An NTM of the digits that starts from the flow-matching model of config/digits_fm.py.
init_from = "out/digits_fm/ckpt.pt"
out_dir = "out/digits_tune"

lr = 2e-3
max_iters = 1000
