# The first step of config/emoji_tune.py's NTM, coupled to its own noise, so that four steps are as good as fifty of flow
# matching (docs/method.md, 13). 18 minutes on one core (47 images/s, --bfloat16=True). Short and slow: words stay known.
init_from = "out/emoji_tune/ckpt.pt"
out_dir = "out/emoji"
dataset = "shards"
data_dir = "out/data/emoji"
flip = True

first_noise = 0.5
shift = 1.0
level_weight = 0.5
closed_form = True
velocity_weight = 1.0
transporter_blocks = 0

lr = 5e-4
warmup_iters = 50
max_iters = 800
val_interval = 200
val_examples = 400
