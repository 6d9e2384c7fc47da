"""Data: captioned images in, token ids in.

- shapes   circles, squares and triangles, drawn on the fly; endless (see shapes.py)
- fashion  Fashion-MNIST, 28x28 or 14x14 grey, from the files of Debian's package dataset-fashion-mnist
- digits   1,797 handwritten digits, 8x8 grey, in assets/digits.npz: the test part of E. Alpaydin and C. Kaynak's
           "Optical Recognition of Handwritten Digits" (UCI Machine Learning Repository, CC BY 4.0)
- latents  pictures that an autoencoder has encoded already: DATA_DIR/train/KEY.npy and DATA_DIR/val/KEY.npy, each an
           array (C, h, w), float16 or any other float, with the caption in KEY.txt beside it, if there is one

Every picture set gives images in [-1, 1], 8-bit value v at the centre (2v + 1)/256 - 1 of its bin, and captions that
are a function of (seed, item) alone. Captions become ids by byte-pair encoding, or are the numbers of classes: 0 is
padding, 1 the null caption.

    python data.py NAME      prepares and checks a data set: sizes, captions, tokens, a contact sheet in out/NAME.png
    python data.py vocab     makes assets/captions.tiktoken anew

What a user can get wrong raises ValueError (a setting, a damaged file) or OSError (something missing), in one line.
"""

import argparse
import base64
import gzip
import re
import struct
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import tiktoken
import torch

import pictures
import shapes

ASSETS = Path(__file__).parent / "assets"
FASHION_DIR = "/usr/share/datasets/fashion-mnist"
PAD, NULL = 0, 1  # text ids; byte-pair ids come after them

GARMENTS = ("a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
            "an ankle boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = {  # for every class the captions it may have, the canonical one first
    "fashion": [(g, f"a photo of {g}", f"a picture of {g}") for g in GARMENTS],
    "digits": [(f"the digit {word}", f"a handwritten {word}", f"{'an' if n == 8 else 'a'} {n}")
               for n, word in enumerate(DIGITS)],
}
DATASETS = ("shapes", *WORDINGS, "latents")

# ---------------------------------------------------------------------------------------------------------------
# pixels


def to_pixels(images):
    """8-bit images (uint8, any shape, array or tensor) -> float32 tensor: v becomes (2v + 1)/256 - 1."""
    return (torch.as_tensor(images).float() * 2 + 1) / 256 - 1


def to_uint8(images):
    """Images in [-1, 1] -> the uint8 value of the bin each pixel is in; what lies outside [-1, 1] is clipped."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def dequantize(images, generator=None):
    """Spreads each pixel uniformly over its bin, v -> 2(v + U[0, 1))/256 - 1, so that a density exists. `images` come
    from to_pixels; a generator must live on their device."""
    # 16 random bits: float32 adds them to any level without rounding, so that noise never leaves the bin
    u = torch.randint(2**16, images.shape, generator=generator, dtype=images.dtype, device=images.device) / 2**16
    return images + (2 * u - 1) / 256


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


class Latents:
    """Arrays (C, h, w) in the .npy files of a folder, times `scale`, each with the caption in the .txt of its name."""

    eight_bit = False  # an autoencoder's numbers are dense already

    def __init__(self, folder, shape, scale):
        self.paths, self.shape, self.scale = sorted(Path(folder).glob("*.npy")), shape, scale
        if not self.paths:
            raise FileNotFoundError(f"there are no latents {folder}/*.npy: put them there, each C x h x w with its "
                                    "caption in a .txt of the same name, or set data_dir")
        self[0]  # a wrong size is told before anything else happens

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, i):
        path = self.paths[i]
        try:
            latent = torch.as_tensor(np.load(path, allow_pickle=False)).float() * self.scale
        except (ValueError, EOFError, TypeError) as error:
            raise ValueError(f"{path} is damaged ({error}); encode it again") from error
        if latent.shape != self.shape or not latent.isfinite().all():
            found, expected = ("x".join(map(str, shape)) for shape in (latent.shape, self.shape))
            raise ValueError(f"{path} holds {found} numbers, not {expected} finite ones: encode it again, "
                             "or set channels and image_size")
        caption = path.with_suffix(".txt")
        return latent, caption.read_text(encoding="utf-8").strip() if caption.exists() else ""

    def __getitems__(self, indices):
        return [self[i] for i in indices]


def get_dataset(name, split, image_size, channels, seed=0, data_dir="", scale=1.0):
    """The captioned data set `name`, one of DATASETS; `split` is "train" or "val". `image_size` is an int or (H, W).
    `data_dir` is the folder of fashion's files, if not where Debian puts them, or the one that holds latents' train and
    val; `scale` is what latents are multiplied by, so that their standard deviation becomes about 1.
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
    if name == "latents":
        return Latents(Path(data_dir) / split, (channels, height, width), scale)
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
# captions to ids

WORD = r" ?\S+|\s+"  # a word takes the space before it along, so that a common word is one token


class Tokenizer:
    """Byte-pair ids of a tiktoken encoding, shifted by two to leave room for PAD and NULL."""

    def __init__(self, encoding):
        self.encoding = encoding
        self.vocab_size = encoding.n_vocab + 2

    def tokens(self, caption):
        """The ids of one caption, however many; [NULL] for an empty or blank one."""
        return [i + 2 for i in self.encoding.encode_ordinary(caption.strip())] or [NULL]

    def encode(self, captions, length):
        """B captions -> ids (B, length) int64, the first `length` of each, padded with PAD."""
        ids = torch.full((len(captions), length), PAD)
        for row, caption in zip(ids, captions):
            tokens = self.tokens(caption)[:length]
            row[:len(tokens)] = torch.tensor(tokens)
        return ids

    def decode(self, ids):
        """Ids (L,) -> the caption, without padding and null."""
        return self.encoding.decode([i - 2 for i in torch.as_tensor(ids).tolist() if i > NULL])


class ClassNumbers:
    """Captions that are the number of a class, "class 207", or empty for any class; the id is 2 + the number."""

    def __init__(self, classes):
        self.classes, self.vocab_size = classes, classes + 2

    def encode(self, captions, length):
        """B captions -> ids (B, length) int64, padded with PAD. Raises ValueError for what is not a class."""
        ids = torch.full((len(captions), length), PAD)
        for row, caption in zip(ids, captions):
            match = re.fullmatch(r"(?:class (\d+))?", caption.strip())
            if not match or int(match[1] or 0) >= self.classes:
                raise ValueError(f"caption {caption!r} is not a class: write 'class 0' to 'class {self.classes - 1}', "
                                 "or nothing for any class")
            row[0] = int(match[1]) + 2 if match[1] else NULL
        return ids


def get_tokenizer(name="captions"):
    """"captions": the small vocabulary of this repository's data sets, in which each of their words is one token;
    "gpt2": GPT-2's 50,257, which tiktoken downloads once; "classes": captions are numbers of ImageNet's 1,000 classes,
    "classes:N" of N.
    Raises ValueError for any other name, ConnectionError where gpt2 cannot be had.
    """
    if name == "captions":
        lines = (ASSETS / "captions.tiktoken").read_bytes().splitlines()
        ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, lines)}
        return Tokenizer(tiktoken.Encoding(name, pat_str=WORD, mergeable_ranks=ranks, special_tokens={}))
    if name == "gpt2":
        try:
            return Tokenizer(tiktoken.get_encoding("gpt2"))
        except Exception as error:  # tiktoken downloads with requests, whose errors are many
            raise ConnectionError("tokenizer 'gpt2' cannot be had: tiktoken needs the network once, or a folder named "
                                  "in TIKTOKEN_CACHE_DIR that has it; or use tokenizer='captions'") from error
    if match := re.fullmatch(r"classes(?::([1-9]\d*))?", name):
        return ClassNumbers(int(match[1] or 1000))
    raise ValueError(f"tokenizer {name!r} is unknown; there are captions, gpt2, classes and classes:N")


def train_bpe(words, vocab_size):
    """Byte-pair encoding. `words` is a Counter of byte strings. Joins the most frequent pair of tokens, over and over,
    until there are `vocab_size` tokens or every word is one. Returns the tokens by rank, the 256 bytes first.
    """
    vocab = [bytes([b]) for b in range(256)]
    splits = {word: [bytes([b]) for b in word] for word in words}
    while len(vocab) < vocab_size:
        pairs = Counter()
        for word, parts in splits.items():
            for pair in zip(parts, parts[1:]):
                pairs[pair] += words[word]
        if not pairs:
            break
        left, right = max(pairs, key=lambda pair: (pairs[pair], pair))  # the pair itself settles a tie
        vocab.append(left + right)
        for parts in splits.values():
            for i in range(len(parts) - 1, 0, -1):
                if parts[i - 1:i + 1] == [left, right]:
                    parts[i - 1:i + 1] = [left + right]
    return vocab


def caption_vocabulary():
    """The bytes of assets/captions.tiktoken: one line a token, base64 and rank. The same at every call."""
    captions = shapes.captions(shapes.scenes(0, range(10_000)))
    captions += [caption for classes in WORDINGS.values() for wordings in classes for caption in wordings]
    words = Counter(word.encode() for caption in captions for word in re.findall(WORD, caption))
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(train_bpe(words, 512)))


# ---------------------------------------------------------------------------------------------------------------
# python data.py NAME


def prepare(name, image_size, split, data_dir, seed, out):
    """Prints what a data set holds and what its captions cost in tokens, and draws 36 of its items."""
    channels = 3 if name == "shapes" else 1
    sizes = {s: len(get_dataset(name, s, image_size, channels, seed, data_dir)) for s in ("train", "val")}
    ds = get_dataset(name, split, image_size, channels, seed, data_dir)
    images, captions = zip(*ds.__getitems__(list(range(min(2_000, len(ds))))))
    print(f"{name}: {sizes['train']:,} to train on, {sizes['val']:,} to validate, {channels}x{image_size}x{image_size}")

    tokenizer = get_tokenizer()
    lengths = np.array([len(tokenizer.tokens(caption)) for caption in captions])
    words = {word for caption in captions for word in re.findall(WORD, caption)}
    whole = sum(len(tokenizer.encoding.encode_ordinary(word)) == 1 for word in words)
    print(f"vocabulary of {tokenizer.vocab_size}: {whole} of the {len(words)} words are single tokens, "
          f"{lengths.mean():.1f} tokens a caption, {lengths.max()} at most")
    for length in (4, 8, 16):
        print(f"  text_len {length:2}: {(lengths <= length).mean():.1%} of captions whole")
    for caption in captions[:6]:
        print(f"  {caption}")
    pictures.save(pictures.grid(torch.stack(images[:36]), captions[:36]), out)
    print(f"wrote {out}")


def prepare_latents(data_dir, split, out):
    """Prints what a folder of latents holds and the scale that brings them to standard deviation 1, and draws 36."""
    first = next(iter(sorted(Path(data_dir, split).glob("*.npy"))), None)
    channels, *size = np.load(first, allow_pickle=False).shape if first else (1, 1, 1)
    ds = get_dataset("latents", split, tuple(size), channels, data_dir=data_dir)
    some = [ds[i] for i in range(min(1_000, len(ds)))]
    scale = 1 / torch.stack([latent for latent, _ in some]).std().item()
    print(f"latents: {len(ds):,} of {channels}x{size[0]}x{size[1]}; --latent_scale={scale:.5f} makes their standard "
          f"deviation 1; {sum(not caption for _, caption in some)} of {len(some)} have no caption")
    for _, caption in some[:6]:
        print(f"  {caption}")
    latents, captions = zip(*some[:36])
    pictures.save(pictures.grid(scale * torch.stack(latents), captions), out)
    print(f"wrote {out}")


def main():
    parser = argparse.ArgumentParser(description="Checks a data set and draws a contact sheet.", allow_abbrev=False)
    parser.error = lambda message: sys.exit(f"data.py: {message}")
    parser.add_argument("name", choices=(*DATASETS, "vocab"), help="vocab makes assets/captions.tiktoken anew")
    parser.add_argument("--image_size", type=int, help="default: 16 for shapes, 28 for fashion, 8 for digits")
    parser.add_argument("--split", default="train", help="train or val: whose items to show")
    parser.add_argument("--data_dir", default="", help=f"fashion's files, default {FASHION_DIR}; or latents' folder")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="the contact sheet, default out/NAME.png")
    args = parser.parse_args()
    try:
        if args.name == "vocab":
            (ASSETS / "captions.tiktoken").write_bytes(caption_vocabulary())
            print(f"wrote {ASSETS / 'captions.tiktoken'}")
        elif args.name == "latents":
            prepare_latents(args.data_dir, args.split, args.out or "out/latents.png")
        else:
            native = {"shapes": 16, "fashion": 28, "digits": 8}[args.name]
            size = native if args.image_size is None else args.image_size
            prepare(args.name, size, args.split, args.data_dir, args.seed, args.out or f"out/{args.name}.png")
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
