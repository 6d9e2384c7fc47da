# Your own captioned images, 32x32: flow matching, a start for config/mine.py. docs/data.md goes through it step by step.
objective = "fm"
out_dir = "out/mine_fm"  # where checkpoints, the log and samples go
dataset = "shards"  # stays
data_dir = "out/data/mine"  # what `python data.py folder` made
image_size = 32  # or (height, width): divisible by patch_size
channels = 3  # 1: grey
crop = "center"  # "random": other parts of images that are not square, new in each epoch
flip = False  # True: mirror half of the images, if no caption says left or right
tokenizer = "out/mine.tiktoken"  # what `python data.py vocab` made
text_len = 16  # tokens of a caption: `python data.py shards` says how many captions fit

patch_size = 4  # (image_size / patch_size)^2 tokens; four times as many cost more than four times as much
width = 160  # larger for more data: with depth and heads, the size of the network
depth = 5
batch_size = 64  # less if memory is short

words_lr = 25.0  # 1: if the captions are of few words, each of them in many
max_iters = 3500  # times batch_size: how many images it sees
val_interval = 500  # iterations between validations, each with samples in out_dir/samples
val_examples = 200  # at most what is held out
