"""The data sets: captioned images to train on and to validate with.

- shapes   circles, squares and triangles, rendered on demand (plumbing/shapes.py)
- fashion  Fashion-MNIST, 28x28 or 14x14 grey, from the files of Debian's package dataset-fashion-mnist
- digits   1,797 handwritten digits, 8x8 grey, in assets/digits.npz: the test part of E. Alpaydin and C. Kaynak's
           "Optical Recognition of Handwritten Digits" (UCI Machine Learning Repository, CC BY 4.0)
- shards   captioned images of any size, or latents, in WebDataset tars: your own data (plumbing/shards.py)

Data sets are map-style: ds[i] -> (image (C, H, W) float32, caption); ds.__getitems__(indices), which torch's DataLoader
calls, returns a list of such pairs, to which shards add a fault or "". Images are in [-1, 1]: the 8-bit value v becomes
the centre (2v + 1)/256 - 1 of its bin. Only latents, whose ds.eight_bit is False, may lie outside. An example is a
function of (seed, i). plumbing/tokenizer.py turns captions into token ids.

    python data.py NAME       checks a data set: sizes, captions, tokens, a contact sheet in out/NAME.png
    python data.py --help     the commands that make data sets and vocabularies (plumbing/prepare.py and latents.py)
"""

import gzip
import sys
import zlib
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.console import parser_with_examples, print_all_text
from plumbing.images import contact_sheet, fit, save_image, thumbnail, to_pixels
from plumbing.paths import at_home
from plumbing.rng import uniforms
from plumbing.runtime import note
from plumbing.shards import Shards, find_shards, first_example
from plumbing.tokenizer import ASSETS, get_tokenizer

FASHION_DIR = "/usr/share/datasets/fashion-mnist"

GARMENTS = ("a t-shirt", "trousers", "a pullover", "a dress", "a coat", "a sandal", "a shirt", "a sneaker", "a bag",
            "an ankle boot")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
WORDINGS = {  # the captions that each class may have, the canonical one first
    "fashion": [(g, f"a photo of {g}", f"a picture of {g}") for g in GARMENTS],
    "digits": [(f"the digit {word}", f"a handwritten {word}", f"{'an' if n == 8 else 'a'} {n}")
               for n, word in enumerate(DIGITS)],
}
DATASETS = ("shapes", *WORDINGS, "shards")
# least and greatest value of the commands' arguments
RANGES = {"image_size": (1, 4096), "seed": (0, 2**31 - 1), "count": (1, 1000), "val": (1e-6, 0.9),
          "size": (256, 10**6), "batch_size": (1, 4096), "workers": (0, 256)}


class EightBit:
    """A data set of 8-bit images. Training example i is a function of (seed, i); validation uses the numbers -1, -2,
    ... instead, so that it shares no random choices with training."""

    eight_bit = True

    def __init__(self, split, seed, size):
        self.split, self.seed, self.size = split, seed, size

    def __len__(self):
        return self.size

    def __getitem__(self, i):
        return self.__getitems__([i])[0]

    def __getitems__(self, indices):
        indices = np.asarray(indices, dtype=np.int64)
        if (outside := (indices < 0) | (indices >= self.size)).any():
            raise IndexError(f"item {indices[outside][0]} is outside 0..{self.size - 1}")
        return list(zip(to_pixels(self.pictures(indices)), self.captions(indices)))

    def numbers(self, indices):
        """The numbers (n,) of examples, which with the seed decide their random choices."""
        indices = np.asarray(indices)
        return indices if self.split == "train" else ~indices


class Shapes(EightBit):
    """Captioned scenes, rendered on demand: 1,000,000 to train on and 10,000 to validate with."""

    def __init__(self, split, seed, image_size, channels):
        super().__init__(split, seed, 1_000_000 if split == "train" else 10_000)
        self.image_size, self.channels = image_size, channels

    def captions(self, indices):
        from plumbing import shapes  # only here: other data sets do not load the renderer
        return shapes.captions(shapes.scenes(self.seed, self.numbers(indices)))

    def pictures(self, indices):
        from plumbing import shapes
        images = shapes.render(shapes.scenes(self.seed, self.numbers(indices)), self.image_size)
        if self.channels == 1:
            luma = np.array([0.299, 0.587, 0.114], dtype=np.float32)
            images = np.rint(np.einsum("bchw,c->bhw", images, luma))[:, None].astype(np.uint8)
        return images


class Labelled(EightBit):
    """Images of ten classes, each captioned with one of its class's wordings.

    images: uint8 (n, C, H, W). labels: (n,). wordings: the captions of each class.
    """

    def __init__(self, split, seed, images, labels, wordings):
        super().__init__(split, seed, len(labels))
        self.images, self.labels, self.wordings = images, labels, wordings

    def captions(self, indices):
        u = uniforms(self.seed, self.numbers(indices), 1)[:, 0]
        wordings = [self.wordings[label] for label in self.labels[indices]]
        return [choices[int(v * len(choices))] for choices, v in zip(wordings, u)]

    def pictures(self, indices):
        return self.images[indices]


def get_dataset(name, split, image_size, channels, seed=0, data_dir="", **of_shards):
    """The data set `name`, one of DATASETS.

    split: "train" or "val". image_size: an int or (H, W). data_dir: the shards, or the folder of Fashion-MNIST's files
    (empty: Debian's). of_shards: other settings of Shards. Raises ValueError for images or channels that the data set
    does not have and for a damaged file, FileNotFoundError for a missing one.
    """
    sizes = {"shapes": range(8, 1025), "fashion": (28, 14), "digits": (8,)}
    if name not in DATASETS:
        raise ValueError(f"data set {name!r} is unknown; there are {', '.join(DATASETS)}")
    if split not in ("train", "val"):
        raise ValueError(f"split {split!r} is unknown; there are train and val")
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    if len(size) != 2:
        raise ValueError(f"image_size is {image_size}: give one side of a square, or height and width")
    height, width = size
    if name == "shards":
        return Shards(data_dir, split, channels, height, width, seed, **of_shards)
    if height != width or height not in sizes[name]:
        allowed = "8x8 to 1024x1024, square" if name == "shapes" else " or ".join(f"{s}x{s}" for s in sizes[name])
        raise ValueError(f"{name} has no {height}x{width} images; image_size may be {allowed}")
    if channels not in (1, 3):
        raise ValueError(f"{name} has no images of {channels} channels; channels may be 1 or 3")
    if name == "shapes":
        return Shapes(split, seed, height, channels)
    images, labels = load_fashion(split, data_dir) if name == "fashion" else load_digits(split)
    if height < images.shape[-1]:  # the mean of 2x2 pixels, rounded
        images = (images.reshape(len(images), height, 2, width, 2).sum((2, 4), dtype=np.uint16) + 2) // 4
    images = np.repeat(images[:, None].astype(np.uint8), channels, axis=1)
    return Labelled(split, seed, images, labels, WORDINGS[name])


def open_dataset(settings, split, data_dir=""):
    """The data set that a run's settings name; data_dir: where the data are now, if they have moved."""
    of_shards = {"latent_scale": 0, "crop": "center", "flip": False}  # and the values without effect
    if settings["dataset"] != "shards":
        unused = [name for name, without in of_shards.items() if settings.get(name, without) != without]
        if unused:
            note(f"{', '.join(unused)}: not used, as only shards are flipped, cropped or scaled")
        of_shards = {}
    return get_dataset(settings["dataset"], split, settings["image_size"], settings["channels"], settings["seed"],
                       data_dir or settings["data_dir"], **{name: settings[name] for name in of_shards})


def dataset_class_captions(name):
    """The canonical caption of each class of a labelled data set, in the order of the labels; None for the others."""
    return [wordings[0] for wordings in WORDINGS[name]] if name in WORDINGS else None


def load_digits(split):
    """Read the digits: uint8 images (n, 8, 8) and labels (n,), 1,500 to train on, 297 of balanced classes to validate
    with."""
    with np.load(ASSETS / "digits.npz", allow_pickle=False) as file:
        images, labels = file["images"], file["labels"]
    by_class = np.argsort(labels, kind="stable")
    chosen = np.full(len(labels), split == "train")
    chosen[by_class[np.arange(297) * len(labels) // 297]] = split == "val"
    return np.rint(images[chosen] * (255 / 16)).astype(np.uint8), labels[chosen]


def load_fashion(split, data_dir=""):
    """Read uint8 images (n, 28, 28) and labels (n,). Raises FileNotFoundError, or ValueError for a damaged file."""
    part = "train" if split == "train" else "t10k"
    images, labels = (read_idx(Path(at_home(data_dir or FASHION_DIR)), f"{part}-{what}-idx{ndim}-ubyte", ndim)
                      for what, ndim in (("images", 3), ("labels", 1)))
    if images.shape != (len(labels), 28, 28) or labels.max(initial=0) > 9:
        raise ValueError(f"Fashion-MNIST's {part} files do not belong together: images {images.shape}, "
                         f"labels {labels.shape} up to {labels.max(initial=0)}")
    return images, labels


def read_idx(folder, name, ndim):
    """Read `name`.gz or `name` in `folder`, an IDX file of bytes: a uint8 array of `ndim` dimensions."""
    path = next((p for p in (folder / f"{name}.gz", folder / name) if p.exists()), None)
    if path is None:
        raise FileNotFoundError(
            f"Fashion-MNIST's {name}.gz is not in {folder}: apt-get install dataset-fashion-mnist, or set data_dir to "
            "the folder of train-images-idx3-ubyte.gz, train-labels-idx1-ubyte.gz, t10k-images-idx3-ubyte.gz and "
            "t10k-labels-idx1-ubyte.gz")
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if data[:4] != bytes([0, 0, 8, ndim]):
            raise ValueError("its first bytes are not those of such an IDX file")
        shape = np.frombuffer(data, ">u4", count=ndim, offset=4)
        return np.frombuffer(data, np.uint8, offset=4 + 4 * ndim).reshape(shape)
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise ValueError(f"{path} is damaged ({error}); fetch it again") from error


def native_shape(args):
    """The shape (C, H, W) in which a data set's examples are shown by default, and whether they are latents."""
    if args.name == "shards":
        latent, shape = first_example(find_shards(args.data_dir, args.split)[0])
        return shape, latent
    return {"shapes": (3, 16, 16), "fashion": (1, 28, 28), "digits": (1, 8, 8)}[args.name], False


def show(args):
    """Print how many examples a data set has and how many tokens its captions take, and write a contact sheet of
    some."""
    (channels, *size), latent = native_shape(args)
    read = fit(*size) if not latent and args.name == "shards" else size  # large images are read as thumbnails
    if args.image_size is not None and not latent:
        size = read = [args.image_size, args.image_size]
    sets = {split: get_dataset(args.name, split, tuple(read), channels, args.seed, args.data_dir)
            for split in ("train", "val", args.split)}  # get_dataset raises for an unknown split
    shown, images, captions, faults = sets[args.split], [], [], []
    for i in tqdm(range(min(2_000, len(shown))), desc="examples", leave=False):  # one at a time: images may be large
        image, caption, *fault = shown.__getitems__([i])[0]
        captions.append(caption)
        faults += filter(None, fault)
        if i < args.count:
            images.append(thumbnail(image))
    print(f"{args.name}: {len(sets['train']):,} to train on, {len(sets['val']):,} to validate, "
          + "x".join(map(str, (channels, *size))))
    for name, fault in shown.faults.items() if args.name == "shards" else ():
        print(f"  {name} is damaged: {fault}")
    if faults:
        print(f"{len(faults)} of the first {len(captions):,} examples are unusable; {faults[0]}")
    show_tokens(captions, get_tokenizer(args.tokenizer))
    out = args.out or f"out/{args.name}.png"
    columns = args.count if args.count <= 10 else None
    save_image(contact_sheet(images, captions[:args.count], columns), out)
    print(f"wrote {out}")


def show_tokens(captions, tokenizer):
    """Print how many tokens captions take, how many captions the tokenizer refuses, and the first few captions. Raises
    ValueError if the tokenizer refuses all of them."""
    lengths, refusals = [], []
    for caption in captions:
        try:
            lengths.append(len(tokenizer.tokens(caption)))
        except ValueError as error:
            refusals.append(error)
    if refusals:
        print(f"{len(refusals)} of the first {len(captions):,} captions are refused; {refusals[0]}")
    if not lengths:
        raise refusals[0]
    lengths = np.array(lengths)
    apart = np.mean([tokenizer.falls_apart(caption) for caption in captions])
    print(f"vocabulary of {tokenizer.vocab_size}: {lengths.mean():.1f} tokens a caption, {lengths.max()} at most; "
          f"{apart:.1%} of captions have too many unknown words")
    for length in (4, 8, 16, 32, 77):
        print(f"  text_len {length:2}: {(lengths <= length).mean():.1%} of captions whole")
    for caption in captions[:6]:
        print(f"  {caption}" if len(caption) <= 500 else f"  {caption[:500]}…")


def make_parser():
    """The parser of the command line, with one command per data set and one per way to make one."""
    from evidence import emoji
    from plumbing import latents, prepare  # only here: training makes no data sets
    parser = parser_with_examples(
        prog="data.py",
        description="Checks data sets and makes them.",
        examples=["python data.py shapes --count=10", "python data.py folder ~/pictures --out=out/data/pictures"],
    )
    parser.error = lambda message: sys.exit(f"data.py: {message}")
    commands = parser.add_subparsers(dest="name", metavar="NAME", required=True, help="what to check or make:")

    def command(name, function, help, examples):
        description = help[0].upper() + help[1:] + "."
        sub = parser_with_examples(commands.add_parser, name, help=help, description=description, examples=examples)
        sub.error = parser.error
        sub.set_defaults(function=function)
        return sub

    for name in DATASETS:
        source = " --data_dir=out/data/pictures" if name == "shards" else ""
        examples = [f"python data.py {name}{source}", f"python data.py {name}{source} --split=val --count=10"]
        sub = command(name, show, f"checks {name} and shows some of it", examples)
        sub.add_argument("--image_size", type=int,
                         help="pixels a side; default: 16 for shapes, 28 for fashion, or as stored")
        sub.add_argument("--split", default="train", help="which part to show, train or val; default train")
        sub.add_argument("--data_dir", default="", help="the shards: a folder, a glob or NAME-{00000..00099}.tar; or "
                                                        f"the folder of fashion's files, default {FASHION_DIR}")
        sub.add_argument("--seed", type=int, default=0, help="the seed of the captions, and of shapes; default 0")
        sub.add_argument("--tokenizer", default="captions",
                         help="captions, emoji, gpt2 or NAME.tiktoken; default %(default)s")
        sub.add_argument("--count", type=int, default=36,
                         help="images on the contact sheet, of which up to 10 make one row; default %(default)s")
        sub.add_argument("--out", help="the file of the contact sheet; default out/NAME.png")
    prepare.add_commands(command)
    emoji.add_commands(command)
    latents.add_commands(command)
    return parser


def main():
    print_all_text()
    parser = make_parser()
    args = parser.parse_args()
    for name, value in vars(args).items():
        if isinstance(value, str):
            setattr(args, name, at_home(value))
    for name, (low, high) in RANGES.items():
        if (value := getattr(args, name, None)) is not None and not low <= value <= high:
            parser.error(f"--{name} is {value}, but must be in {low} to {high}")
    try:
        args.function(args)
    except (OSError, ValueError) as error:
        sys.exit(f"data.py: {error}")


if __name__ == "__main__":
    main()
