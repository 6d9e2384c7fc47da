# config/t2i.py at 168 million parameters, from the flow-matching model of config/t2i_small_fm.py, for one GPU of 24 GB.
#   python train.py config/t2i_small_fm.py
#   python train.py config/t2i_small.py
# Counted, not measured. Memory is that of config/t2i_small_fm.py, 3.0 GB and 0.26 GB for weights and what belongs to
# them, and 0.17 GB an image: 9 GB in all. An image takes 0.23 TFLOP (python -m evidence.update config/t2i_small.py), a
# fifth of it for the coupled first step. Muon takes 1.5 TFLOP an update. At 40% of an RTX 4090's 165 TFLOP/s that is
# 280 images/s, 10 hours in all.
init_from = "out/t2i_small_fm/ckpt.pt"
out_dir = "out/t2i_small"
dataset = "shards"
data_dir = "out/data/cc12m"

first_noise = 0.5  # which costs four more passes, without gradients, of a fifth of the batch
transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
shift = 2.0  # as config/emoji64.py: larger images are decided at noisier levels
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 5e-4  # a quarter of flow matching's, as on emoji; not measured at this size
words_lr = 25.0  # as on emoji; their vectors move at a quarter of flow matching's rate
batch_size = 256
grad_accum = 8  # 32 images a pass
max_iters = 40000  # a fifth of the images: a longer NTM stage lost style on emoji
warmup_iters = 1000
ema = 0.9999  # also what couples the first step, so it moves slowly
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
