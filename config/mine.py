# Your own captioned images: an NTM that starts from the flow-matching model of config/mine_fm.py, which decides about the
# network, sizes and words. docs/data.md goes through it step by step.
init_from = "out/mine_fm/ckpt.pt"
out_dir = "out/mine"  # where checkpoints, the log and samples go
dataset = "shards"  # stays
data_dir = "out/data/mine"  # what `python data.py folder` made
crop = "center"  # as in config/mine_fm.py
flip = False  # as in config/mine_fm.py

first_noise = 0.5  # 1: a first step from pure noise, of which the likelihood is a tighter bound
transporter_blocks = 0
rank = 24  # directions along which the numbers of an image vary together
filters = 16  # a step's flow over pixels: kernels of its filter
logistics = 3  # and of the mixture at every number; 0 and 0 with closed_form = True: Gaussian steps
mirrored = True
shift = 1.0  # 2 for images of 64x64 and more, which are decided at noisier levels
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 2e-3
words_lr = 25.0  # as in config/mine_fm.py
batch_size = 64  # less if memory is short
max_iters = 2000  # times batch_size: how many images it sees
warmup_iters = 50
val_interval = 400  # iterations between validations, each with samples in out_dir/samples
val_examples = 200  # at most what is held out
