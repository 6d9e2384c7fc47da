# Flow matching on the digits, with the network of config/digits.py: the peer, and a start for config/digits_tune.py.
# 2.5 minutes on one core (850 images a second); val_loss 0.336.
objective = "fm"
out_dir = "out/digits_fm"
