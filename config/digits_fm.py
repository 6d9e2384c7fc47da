# Flow matching on the digits with the network of config/digits.py: a baseline, and the start of config/digits_tune.py.
# Training takes 2.5 minutes on one core, at 850 images a second. val_loss 0.336.
objective = "fm"
out_dir = "out/digits_fm"
