# A text-to-image NTM for eight GPUs of 80 GB, like config/emoji.py, that starts from the model of config/t2i_fm.py.
#   torchrun --nproc_per_node=8 train.py config/t2i_fm.py --decoder=decoder.pt2
#   torchrun --nproc_per_node=8 train.py config/t2i.py --decoder=decoder.pt2
# Counted, not measured: 1.10 billion parameters. A GPU needs the memory of config/t2i_fm.py: 19.3 GB for weights and
# their states, 2.04 GB for weights in bfloat16, and 0.67 GB an image, 43 GB in all. An image takes 1.79 TFLOP (python
# -m evidence.update config/t2i.py), a fifth of it for the coupled first step. On every GPU Muon takes 24.4 TFLOP an
# update. At 40% of an H100's 989 TFLOP/s that is 200 images/s a GPU and 1,600 on eight, 11 hours in all.
init_from = "out/t2i_fm/ckpt.pt"
out_dir = "out/t2i"
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

lr = 2.5e-4  # a quarter of flow matching's, as on emoji; not measured at this size
words_lr = 25.0  # as on emoji; with lr, word vectors move at a quarter of flow matching's rate
batch_size = 1024
grad_accum = 4  # 32 images a pass on each of eight GPUs
max_iters = 60000  # a fifth of all images: on emoji, samples of a longer NTM stage had the wrong style more often
warmup_iters = 1000
ema = 0.9999  # the averaged weights also couple the first step, so they should move slowly
workers = 8
log_interval = 100
val_interval = 5000
val_examples = 4096
