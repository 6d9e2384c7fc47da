# An NTM that starts from published SiT weights: class-conditional ImageNet, 256x256 as 4x32x32 latents of the Stable
# Diffusion autoencoder. SiT-XL/2 has 0.68 billion parameters; training them takes GPUs of 80 GB (we have not tried).
#   torchrun --nproc_per_node=8 train.py config/sit.py --init_from=sit:SiT-XL-2-256.pt --data_dir=LATENTS
# The checkpoint fixes the network, the size of the latents and the classes ("class 207").
out_dir = "out/sit"
dataset = "shards"
latent_scale = 0.18215

transporter_width = 1152
transporter_heads = 16
transporter_blocks = 2
transporter_layers = 4
steps = (4, 8, 16)
shift = None

batch_size = 256
max_iters = 50000
warmup_iters = 1000
optimizer = "adamw"
lr = 1e-4
ema = 0.9999
workers = 4
val_interval = 2000
val_examples = 1000
