"""Data: captioned images in, token ids in.

- shapes   circles, squares and triangles, drawn on the fly; endless (see shapes.py)
- fashion  Fashion-MNIST, 28x28 or 14x14 grey, from the files of Debian's package dataset-fashion-mnist
- digits   1,797 handwritten digits, 8x8 grey, in assets/digits.npz: the test part of E. Alpaydin and C. Kaynak's
           "Optical Recognition of Handwritten Digits" (UCI Machine Learning Repository, CC BY 4.0)
- shards   captioned pictures of any size, or latents, in WebDataset tars: what real training reads (see shards.py)

Every picture set gives images in [-1, 1], 8-bit value v at the centre (2v + 1)/256 - 1 of its bin, and captions that
are a function of (seed, item) alone. Captions become ids by tokenizer.py.

    python data.py NAME      checks a data set: sizes, captions, tokens, a contact sheet in out/NAME.png
    python data.py vocab     makes assets/captions.tiktoken anew, or with --data_dir the vocabulary of some shards

    python data.py emoji                      3,786 emoji twice, by npm, to shards (see prepare.py)
    python data.py folder DIR                 pictures with captions in a folder to shards
    python data.py encode --encoder=FILE      shards of pictures to shards of latents

What a user can get wrong raises ValueError (a setting, a damaged file) or OSError (something missing), in one line.
"""

import argparse
import contextlib
import gzip
import re
import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

import pictures
import prepare
import shapes
from example import Unusable, caption_of
from pictures import to_pixels
from shards import Shards, find_shards, first_example
from tokenizer import ASSETS, WORD, get_tokenizer, vocabulary

FASHION_DIR = "/usr/share/datasets/fashion-mnist"

GARMENTS = ("a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
            "an ankle boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = {  # for every class the captions it may have, the canonical one first
    "fashion": [(g, f"a photo of {g}", f"a picture of {g}") for g in GARMENTS],
    "digits": [(f"the digit {word}", f"a handwritten {word}", f"{'an' if n == 8 else 'a'} {n}")
               for n, word in enumerate(DIGITS)],
}
DATASETS = ("shapes", *WORDINGS, "shards")

# ---------------------------------------------------------------------------------------------------------------
# data sets: ds[i] and ds.__getitems__([i, j, ...]), which torch's DataLoader calls for a whole batch at once;
# ds.eight_bit says whether its numbers are centres of 8-bit bins, over which dequantize() is to spread them


def scene_numbers(indices, split, size):
    """Item numbers -> what the hash is given: validation counts down from -1, and so never meets training."""
    indices = np.asarray(indices, dtype=np.int64)
    if (outside := (indices < 0) | (indices >= size)).any():
        raise IndexError(f"item {indices[outside][0]} is outside 0..{size - 1}")
    return indices if split == "train" else ~indices


class Shapes:
    """Captioned scenes, drawn as they are asked for."""

    eight_bit = True

    def __init__(self, split, image_size, channels, seed):
        self.split, self.image_size, self.channels, self.seed = split, image_size, channels, seed

    def __len__(self):
        return 1_000_000 if self.split == "train" else 10_000

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        scene = shapes.scenes(self.seed, scene_numbers(indices, self.split, len(self)))
        images = shapes.render(scene, self.image_size)
        if self.channels == 1:
            luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
            images = np.rint(np.einsum("bchw,c->bhw", images, luma))[:, None].astype(np.uint8)
        return list(zip(to_pixels(images), shapes.captions(scene)))


class Labelled:
    """Images of ten classes, with one of several wordings for a caption. images: uint8 (n, C, H, W); labels: (n,)."""

    eight_bit = True

    def __init__(self, images, labels, wordings, split, seed):
        self.images, self.labels, self.wordings, self.split, self.seed = images, labels, wordings, split, seed

    def __len__(self):
        return len(self.labels)

    def label(self, i):
        return int(self.labels[i])

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        indices = np.asarray(indices)
        u = shapes.uniforms(self.seed, scene_numbers(indices, self.split, len(self)), 1)[:, 0].tolist()
        wordings = [self.wordings[label] for label in self.labels[indices].tolist()]
        captions = [choices[int(v * len(choices))] for choices, v in zip(wordings, u)]
        return list(zip(to_pixels(self.images[indices]), captions))


def get_dataset(name, split, image_size, channels, seed=0, data_dir="", **of_shards):
    """The captioned data set `name`, one of DATASETS; `split` is "train" or "val". `image_size` is an int or (H, W).
    `data_dir` is the folder of fashion's files, if not where Debian puts them, or says which shards; `of_shards` are
    the other settings of shards.Shards.
    Returns a map-style data set: ds[i] -> (image float32 (C, H, W) in [-1, 1], caption), len(ds).
    Raises ValueError where the set cannot give that size or that many channels, or a file is damaged, and
    FileNotFoundError where a file is missing.
    """
    sizes = {"shapes": range(8, 1025), "fashion": (28, 14), "digits": (8,)}
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; there are {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"split {split!r} is unknown; there are train and val")
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if name == "shards":
        return Shards(data_dir, split, channels, height, width, seed, **of_shards)
    if height != width or height not in sizes[name]:
        allowed = "8x8 to 1024x1024, square" if name == "shapes" else " or ".join(f"{s}x{s}" for s in sizes[name])
        raise ValueError(f"{name} has no {height}x{width} images; image_size may be {allowed}")
    if channels not in (1, 3):
        raise ValueError(f"{name} has no images of {channels} channels; channels may be 1 or 3")
    if name == "shapes":
        return Shapes(split, height, channels, seed)
    images, labels = load_fashion(split, data_dir) if name == "fashion" else load_digits(split)
    if height < images.shape[-1]:  # the mean of 2x2 pixels, rounded
        images = (images.reshape(len(images), height, 2, width, 2).sum((2, 4), dtype=np.uint16) + 2) // 4
    images = np.repeat(images[:, None].astype(np.uint8), channels, axis=1)
    return Labelled(images, labels, WORDINGS[name], split, seed)


def dataset_class_captions(name):
    """One canonical caption for each class of a labelled data set, in the order of the labels; None for shapes."""
    return [wordings[0] for wordings in WORDINGS[name]] if name in WORDINGS else None


def load_digits(split):
    """Returns uint8 images (n, 8, 8) and labels (n,): 1,500 to train on, 297 to validate, alike in every class."""
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    by_class = np.argsort(labels, kind="stable")
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[by_class[np.arange(297) * len(labels) // 297]] = True
    chosen = chosen if split == "val" else ~chosen
    return np.rint(images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen]


def load_fashion(split, data_dir=""):
    """Returns uint8 images (n, 28, 28) and labels (n,). Raises FileNotFoundError, or ValueError for a damaged file."""
    part = "train" if split == "train" else "t10k"
    images, labels = (read_idx(Path(data_dir or FASHION_DIR), f"{part}-{what}-ubyte")
                      for what in ("images-idx3", "labels-idx1"))
    if labels.ndim != 1 or images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        raise ValueError(f"Fashion-MNIST's {part} files do not belong together: images {images.shape}, "
                         f"labels {labels.shape} up to {labels.max(initial=0)}")
    return images, labels


def read_idx(folder, name):
    """Reads `name`.gz or `name` in `folder`, an IDX file of bytes. Returns a uint8 array of the shape it states."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"Fashion-MNIST's {name}.gz is not in {folder}: apt-get install dataset-fashion-mnist, or name in data_dir "
            "the folder of train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
            "t10k-labels-idx1-ubyte.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        ndim = data[3]
        shape = struct.unpack_from(f">{ndim}I", data, 4)
        if data[:3] != b"\0\0\x08":
            raise ValueError("its first bytes are not those of an IDX file of bytes")
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error, IndexError, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


# ---------------------------------------------------------------------------------------------------------------
# python data.py NAME


def caption_vocabulary():
    """The bytes of assets/captions.tiktoken, the same at every call."""
    captions = shapes.captions(shapes.scenes(0, range(10_000)))
    captions += [caption for classes in WORDINGS.values() for wordings in classes for caption in wordings]
    return vocabulary(captions)


def captions_of(shards):
    """The captions of shards, but for unusable ones."""
    for i in range(len(shards)):
        with contextlib.suppress(Unusable):
            yield caption_of(shards.members(i))


def make_vocabulary(args):
    """assets/captions.tiktoken anew, or args.out from the captions of the training shards in args.data_dir."""
    out, contents = Path(args.out or ASSETS / "captions.tiktoken"), None
    if args.data_dir:
        if not args.out:
            raise ValueError("the vocabulary of some shards needs --out=NAME.tiktoken")
        shards = Shards(args.data_dir, "train", *first_example(find_shards(args.data_dir, "train")[0])[1])
        contents = vocabulary(captions_of(shards), args.size)
    out.write_bytes(contents or caption_vocabulary())
    print(f"wrote {out}")


def show(args):
    """Prints what a data set holds and what its captions cost in tokens, and draws some of its items."""
    size = args.image_size
    if args.name == "shards":
        latent, (channels, *native) = first_example(find_shards(args.data_dir, args.split)[0])
        size = tuple(native) if size is None or latent else size
    else:
        channels = 3 if args.name == "shapes" else 1
        size = {"shapes": 16, "fashion": 28, "digits": 8}[args.name] if size is None else size
    splits = ("train", "val", args.split)  # an unknown one is told
    sets = {split: get_dataset(args.name, split, size, channels, args.seed, args.data_dir) for split in splits}
    images, captions, faults = [], [], []
    for i in range(min(2_000, len(sets[args.split]))):  # one at a time: pictures may be large
        (image, caption, *fault), = sets[args.split].__getitems__([i])
        images += [image] if i < args.count else []
        captions, faults = [*captions, caption], [*faults, *fault]
    print(f"{args.name}: {len(sets['train']):,} to train on, {len(sets['val']):,} to validate, "
          + "x".join(map(str, images[0].shape)))
    for name, fault in getattr(sets[args.split], "header", {"faults": {}})["faults"].items():
        print(f"  {name} is damaged: {fault}")
    if unusable := [fault for fault in faults if fault]:
        print(f"{len(unusable)} of the first {len(captions):,} examples are unusable; {unusable[0]}")

    tokenizer = get_tokenizer(args.tokenizer)
    lengths = np.array([len(tokenizer.tokens(caption)) for caption in captions])
    words = {word for caption in captions for word in re.findall(WORD, caption)}
    whole = sum(len(tokenizer.encoding.encode_ordinary(word)) == 1 for word in words)
    print(f"vocabulary of {tokenizer.vocab_size}: {whole} of the {len(words)} words are single tokens, "
          f"{lengths.mean():.1f} tokens a caption, {lengths.max()} at most")
    for length in (4, 8, 16, 32, 77):
        print(f"  text_len {length:2}: {(lengths <= length).mean():.1%} of captions whole")
    for caption in captions[:6]:
        print(f"  {caption}")
    out = args.out or f"out/{args.name}.png"
    columns = args.count if args.count <= 10 else None
    pictures.save(pictures.grid(torch.stack(images), captions[:args.count], columns), out)
    print(f"wrote {out}")


def main():
    parser = argparse.ArgumentParser(description="Checks data sets and makes them.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True)

    def command(name, function, help):
        sub = commands.add_parser(name, help=help, description=help, allow_abbrev=False)
        sub.error = parser.error
        sub.set_defaults(function=function)
        return sub

    parser.error = lambda message: sys.exit(f"data.py: {message}")
    for name in DATASETS:
        sub = command(name, show, f"checks {name} and draws some of it")
        sub.add_argument("--image_size", type=int, help="default: 16 for shapes, 28 for fashion, or as they are")
        sub.add_argument("--split", default="train", help="train or val: whose items to show")
        sub.add_argument("--data_dir", default="", help=f"fashion's files, default {FASHION_DIR}; or which shards")
        sub.add_argument("--seed", type=int, default=0)
        sub.add_argument("--tokenizer", default="captions", help="captions, emoji, gpt2 or NAME.tiktoken")
        sub.add_argument("--count", type=int, default=36, help="pictures on the contact sheet; up to 10 make one row")
        sub.add_argument("--out", help="the contact sheet, default out/NAME.png")
    sub = command("vocab", make_vocabulary, "makes a vocabulary: assets/captions.tiktoken, or that of some shards")
    sub.add_argument("--data_dir", default="", help="which shards")
    sub.add_argument("--size", type=int, default=4096, help="of shards' vocabulary, in tokens")
    sub.add_argument("--out", help="a file NAME.tiktoken")
    prepare.add_commands(command)
    args = parser.parse_args()
    try:
        args.function(args)
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
