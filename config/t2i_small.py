# config/t2i.py with 168 million parameters, for one GPU of 24 GB. It starts from the model of config/t2i_small_fm.py.
#   python train.py config/t2i_small_fm.py
#   python train.py config/t2i_small.py
# Counted; docs/scaling.md has H200 measurements. The GPU needs the memory of config/t2i_small_fm.py: 3.0 GB for
# weights and their states, 0.26 GB for weights in bfloat16, and 0.17 GB an image, 9 GB in all. An image takes 0.23
# TFLOP (python -m evidence.update config/t2i_small.py), a fifth of it for the coupled first step. Muon takes 1.5 TFLOP
# an update. At 40% of an RTX 4090's 165 TFLOP/s that is 280 images/s, 10 hours in all.
init_from = "out/t2i_small_fm/ckpt.pt"
out_dir = "out/t2i_small"
dataset = "shards"
data_dir = "out/data/cc12m"

first_noise = 0.5  # the coupling costs four more passes of a fifth of the batch, without gradients
transporter_blocks = 0
rank = 24
filters = 16
logistics = 3
mirrored = True
shift = 2.0  # as in config/emoji64.py: in larger images, noisier levels decide the content
level_weight = 0.5
velocity_weight = 1.0
aux_weight = 0.0

lr = 5e-4  # a quarter of flow matching's, as on emoji; not measured at this size
words_lr = 25.0  # as on emoji; with lr, word vectors move at a quarter of flow matching's rate
batch_size = 256
grad_accum = 8  # 32 images a pass
max_iters = 40000  # a fifth of all images: on emoji, samples of a longer NTM stage had the wrong style more often
warmup_iters = 1000
ema = 0.9999  # the averaged weights also couple the first step, so they should move slowly
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
