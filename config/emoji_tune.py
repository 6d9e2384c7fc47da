# An NTM of emoji that starts from the flow-matching model of config/emoji_fm.py.
# 52 minutes on one core (55 images a second); val_loss -0.280, val_bound -1.693, of an earlier set of two styles.
init_from = "out/emoji_fm/ckpt.pt"
out_dir = "out/emoji_tune"
dataset = "shards"
data_dir = "out/data/emoji"

lr = 2e-3
max_iters = 2500
val_interval = 500
val_examples = 392
