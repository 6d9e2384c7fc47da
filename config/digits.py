# Handwritten digits, 8x8: what `python train.py` does without a config file, in minutes on a CPU.
out_dir = "out/digits"
