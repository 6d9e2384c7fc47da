# Flow matching on the digits, with the network of config/digits.py: the peer, and a start for config/digits_tune.py.
objective = "fm"
out_dir = "out/digits_fm"
