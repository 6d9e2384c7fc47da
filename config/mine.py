# Your own captioned images: an NTM that starts from the flow-matching model of config/mine_fm.py. That model fixes the
# network, the sizes and the words. docs/data.md explains each step.
init_from = "out/mine_fm/ckpt.pt"
out_dir = "out/mine"  # where checkpoints, the log and samples go
dataset = "shards"  # do not change
data_dir = "out/data/mine"  # what `python data.py folder` made
crop = "center"  # as in config/mine_fm.py
flip = False  # as in config/mine_fm.py

first_noise = 0.5  # 1: a first step from pure noise, whose likelihood is a tighter bound
transporter_blocks = 0
rank = 24  # directions along which the numbers of an image vary together
filters = 16  # kernels of the filter in a step's flow over pixels
logistics = 3  # logistics in each number's mixture; for Gaussian steps: filters = logistics = 0, closed_form = True
mirrored = True
shift = 1.0  # 2 for images of 64x64 and more: there, noisier levels decide the content
filter_leak = 0.0  # 0.06 for images of 64x64: otherwise some get dark or glaring areas (docs/beyond.md)
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0  # as in config/mine_fm.py
batch_size = 64  # smaller if memory is short
max_iters = 2000  # iterations; times batch_size, the number of images seen
warmup_iters = 50
val_interval = 400  # iterations between validations, each with samples in out_dir/samples
val_examples = 200  # at most the number of images held out
