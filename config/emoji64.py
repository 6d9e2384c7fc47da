# An NTM of emoji, 64x64, like config/emoji.py, that starts from the flow-matching model of config/emoji64_fm.py. With
# Gaussian steps (--filters=0 --logistics=0 --mirrored=False --closed_form=True) training takes 3.5 minutes on a shared
# H200, at 1,600 images a second; val_bound -1.819. We have not trained it with the flow yet.
init_from = "out/emoji64_fm/ckpt.pt"
out_dir = "out/emoji64"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

first_noise = 0.5
transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
shift = 2.0  # in larger images, noisier levels decide the content: docs/log.md, 2026-11-26
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0
batch_size = 128
max_iters = 2000
warmup_iters = 50
workers = 5
val_interval = 500
val_examples = 400
