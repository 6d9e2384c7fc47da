# Your own captioned images, 32x32: flow matching, the start of config/mine.py. docs/data.md explains each step.
objective = "fm"
out_dir = "out/mine_fm"  # where checkpoints, the log and samples go
dataset = "shards"  # do not change
data_dir = "out/data/mine"  # what `python data.py folder` made
image_size = 32  # or (height, width): divisible by patch_size
channels = 3  # 1: grey
crop = "center"  # "random": in each epoch another part of an image that is not square
flip = False  # True: mirror half of the images; only if no caption says left or right
tokenizer = "out/mine.tiktoken"  # what `python data.py vocab` made
text_len = 16  # tokens of a caption: `python data.py shards` says how many captions fit

patch_size = 4  # gives (image_size / patch_size)^2 tokens; the cost grows faster than their number
width = 160  # width, depth and heads: the size of the network, larger for more data
depth = 5
batch_size = 64  # smaller if memory is short

words_lr = 25.0  # 1 if the captions use few words, each of them often
max_iters = 3500  # iterations; times batch_size, the number of images seen
val_interval = 500  # iterations between validations, each with samples in out_dir/samples
val_examples = 200  # at most the number of images held out
