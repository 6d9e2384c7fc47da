"""Shards: captioned images, or latents, in WebDataset tars, read in any order through an index.

A shard is a tar as img2dataset writes it. An example is a run of members of one KEY: KEY.jpg, .jpeg, .png or .webp, or
for a latent KEY.npy, an array (C, h, w); and its caption in KEY.txt, or as the "caption" of KEY.json, or as one of the
"captions" there, drawn anew in each epoch; "mirror": false there forbids flips. The index, mapped into memory that all
processes have in common, holds the 512-byte block where each example begins, so that shuffling is global and resuming
needs no state.
"""

import contextlib
import fcntl
import glob
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import tarfile
import uuid
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm import tqdm

from plumbing.images import over_white, resize_and_crop, to_pixels
from plumbing.shapes import uniforms

IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes of images in shards and folders; that of latents is npy
BLOCK = 512  # bytes, of a tar
HELD_OUT = 100  # without a folder for validation, every 100th example is held out
ATTEMPTS = 100  # unusable examples in a row before reading gives up


class Unusable(ValueError):
    """What is wrong with an example."""


def find_shards(data_dir, split):
    """The shards that data_dir names, in order: a folder, a glob, or a brace range such as cc12m-{00000..01242}.tar;
    and whether they are the split's own: a folder may have train/ and val/ in it. Raises FileNotFoundError where there
    are none, or one of a range is missing."""
    folder = Path(data_dir)
    own = any((folder / name).is_dir() for name in ("train", "val"))
    if data_dir and folder.is_dir():
        paths = sorted((folder / split if own else folder).glob("*.tar"))
    elif "{" in data_dir:
        paths = [Path(name) for name in expand(data_dir)]
        if missing := [path for path in paths if not path.exists()]:
            raise FileNotFoundError(f"{len(missing)} of {len(paths)} shards {data_dir} are missing, {missing[0]} first")
    else:
        paths = sorted(map(Path, glob.glob(data_dir)))
    if not paths:
        raise FileNotFoundError(f"there are no shards in data_dir {data_dir!r} for {split!r}: name a folder of .tar "
                                "files, or of train/ and val/ that hold them, a glob, or NAME-{00000..00099}.tar; "
                                "`python data.py folder` makes shards")
    return paths, own


def expand(pattern):
    """The names that a shell makes of ranges {000..123} and lists {a,b}."""
    if not (match := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)):
        return [pattern]
    first, last, names = match.groups()
    names = names.split(",") if first is None else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    return [name for middle in names for name in expand(pattern[:match.start()] + middle + pattern[match.end():])]


def scan(path):
    """The blocks where the examples of a shard begin, and its end, uint32; and what is wrong with the shard, or ""."""
    starts, key, suffixes, size = [], None, set(), path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                folder, _, name = member.name.rpartition("/")
                stem, _, suffix = name.partition(".")  # a key is the path up to the first dot of the file name
                if member.isfile() and ((folder, stem) != key or suffix in suffixes):  # two examples may share a key
                    key, suffixes = (folder, stem), set()
                    starts.append(member.offset // BLOCK)
                suffixes.add(suffix)
            end = tar.offset
        fault = "it has no end" if end >= size else ""
        if not fault and np.memmap(path, dtype=np.uint8, mode="r", offset=end).any():  # not empty blocks alone
            fault = f"what follows its byte {end} is not a member"
    except (tarfile.TarError, EOFError) as error:  # its examples so far are good, except perhaps the last
        fault, end = str(error), -(-size // BLOCK) * BLOCK
    return np.array([*starts, end // BLOCK], dtype=np.uint32), fault


def read_index(path, shards):
    """The header and the mapped starts of an index, or None if there is none for exactly these shards."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            starts = np.memmap(path, dtype=np.uint32, mode="r", offset=file.tell())
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("shards") != shards:
        return None
    return (header, starts) if len(starts) == sum(header["counts"]) + len(shards) else None


def load_index(paths):
    """The index of shards: its header, {"shards": name, size and time of each, "counts": of examples, "faults": {name:
    fault}}, and the starts of all shards one after another, each followed by the shard's end. Built now if there is
    none yet or the shards have changed, by the first process to come. Raises OSError where it cannot be written."""
    folder = paths[0].parent
    shards = [[os.path.relpath(path, folder), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    digest = hashlib.sha256(json.dumps([name for name, _, _ in shards]).encode()).hexdigest()[:8]
    path = folder / f"shards-{digest}.index"
    if not read_index(path, shards):
        try:
            lock = open(path.with_suffix(".lock"), "w")
        except OSError as error:
            raise OSError(f"the index of the shards cannot be written beside them ({error}): make the folder writable, "
                          "or link the shards into one that is") from error
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not read_index(path, shards):
                build_index(path, paths, shards)
    return read_index(path, shards)


def build_index(path, paths, shards):
    # forked, since a fresh interpreter would run the calling script once more
    with multiprocessing.get_context("fork").Pool(min(len(paths), os.cpu_count())) as pool:
        scanned = list(tqdm(pool.imap(scan, paths), total=len(paths), desc="index", unit="shard", leave=False))
    text = json.dumps({"shards": shards, "counts": [len(starts) - 1 for starts, _ in scanned],
                       "faults": {name: fault for (name, _, _), (_, fault) in zip(shards, scanned) if fault}})
    part = path.with_suffix(".part")
    with open(part, "wb") as file:
        file.write((text + " " * (-(len(text) + 1) % 4) + "\n").encode())  # padded: the numbers are aligned
        file.write(np.concatenate([starts for starts, _ in scanned]).tobytes())
    os.replace(part, path)


def read_members(path, start, stop):
    """The members {suffix: bytes} of the example in blocks [start, stop) of a shard. Raises Unusable."""
    with open(path, "rb") as file:
        file.seek(int(start) * BLOCK)
        blocks = io.BytesIO(file.read(int(stop - start) * BLOCK))
    try:
        with tarfile.open(fileobj=blocks, mode="r:") as tar:
            return {member.name.rpartition(".")[2].lower(): tar.extractfile(member).read()
                    for member in list(tar) if member.isfile()}
    except (tarfile.TarError, EOFError) as error:
        raise Unusable(f"its shard is truncated ({error})") from error


def captions_of(members):
    """An example's captions, each of them true, and whether its mirror image is as good. Raises Unusable."""
    try:
        record = {"caption": members["txt"].decode("utf-8-sig")} if "txt" in members else json.loads(members["json"])
        captions = [caption.strip().encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
                    for caption in record.get("captions") or [record["caption"]]]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unusable("it has no caption") from error
    if not all(captions):
        raise Unusable("its caption is empty")
    return captions, record.get("mirror") is not False


def decode_image(members):
    """An example's image as an RGB PIL.Image: rotated as its EXIF says, transparency over white. Raises Unusable."""
    data = next((members[suffix] for suffix in IMAGES if suffix in members), None)
    if data is None:
        raise Unusable("it has no image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of formats, of which a large data set has all
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            if image.mode.startswith("I;16"):  # which Pillow would clip instead of scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return over_white(image) if image.has_transparency_data else image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"it is enormous ({error})") from error
    except Exception as error:  # what decoding garbage raises depends on the garbage
        raise Unusable(f"it cannot be decoded ({str(error) or type(error).__name__})") from error


def decode_latent(data, shape=None):
    """A latent (C, h, w), float32, from a .npy file's bytes. Raises Unusable, also for another shape than the given."""
    try:
        latent = torch.as_tensor(np.load(io.BytesIO(data), allow_pickle=False)).float()
    except Exception as error:  # what reading garbage raises depends on the garbage
        raise Unusable(f"it is not an array ({str(error) or type(error).__name__})") from error
    if shape and latent.shape != shape or not latent.isfinite().all():
        found, expected = ("x".join(map(str, size)) for size in (latent.shape, shape or latent.shape))
        raise Unusable(f"it holds {found} numbers, not {expected} finite ones")
    return latent


class Shards:
    """The examples of shards as a map-style data set: ds[i] -> (image (C, H, W) float32, caption).

    Images are in [-1, 1], at the centres of their 8-bit bins; latents are (latent - mean) * scale by channel, as
    latents.json says. An unusable example is replaced by the next usable one; __getitems__ also says why.
    """

    runs_on = True  # the numbers that __getitems__ takes, beyond the last example into other epochs

    def __init__(self, data_dir, split, channels, height, width, seed=0, latent_scale=0.0, crop="center", flip=False):
        """split: "train", "val", or "all" where these have no folders of their own. latent_scale: a factor for latents,
        in place of latents.json. crop: "center" or "random", and flip: mirror half of the images; both in training
        only. Raises ValueError or OSError where the shards cannot serve."""
        if crop not in ("center", "random"):
            raise ValueError(f"crop {crop!r} is unknown: choose 'center' or 'random'")
        if min(height, width) < 1:
            raise ValueError(f"image_size is {height}x{width}: shards have images of at least 1x1")
        self.paths, own = find_shards(data_dir, split)
        self.header, self.starts = load_index(self.paths)
        counts, self.faults = np.array(self.header["counts"]), self.header["faults"]
        self.firsts, self.total = counts.cumsum() - counts, int(counts.sum())  # examples before each shard, and in all
        self.split, self.held_out = split, not own and split != "all"
        self.seed, self.shape = seed, (channels, height, width)
        self.crop, self.flip = (crop, flip) if split == "train" else ("center", False)
        if len(self) == 0:
            faults = "".join(f"; {name}: {fault}" for name, fault in list(self.faults.items())[:1])
            raise ValueError(f"data_dir {data_dir!r} has {self.total} examples, too few for {split!r}: every "
                             f"{HELD_OUT}th is for validation, where there are no folders train/ and val/{faults}")
        self.latent, _ = first_example(self.paths)
        self.eight_bit = not self.latent
        if self.latent:
            self.mean, self.scale = latent_statistics(self.paths[0], channels, latent_scale)
        elif channels not in (1, 3):
            raise ValueError(f"{self.paths[0]} holds images, which have 1 or 3 channels: channels is {channels}")
        elif latent_scale:
            raise ValueError(f"latent_scale is {latent_scale}, but {self.paths[0]} holds images: leave it out")
        self.usable(0)  # so that a wrong size is reported at once

    def __len__(self):
        validation = self.total // HELD_OUT if self.held_out else 0
        return validation if self.held_out and self.split == "val" else self.total - validation

    def place(self, i):
        """The shard of example i, and its number in that shard."""
        if self.held_out:
            i = i + i // (HELD_OUT - 1) if self.split == "train" else i * HELD_OUT + HELD_OUT - 1
        shard = int(np.searchsorted(self.firsts, i, side="right")) - 1
        return shard, i - int(self.firsts[shard])

    def members(self, i):
        shard, number = self.place(i)
        row = int(self.firsts[shard]) + shard + number  # each shard before has one entry more, its end
        return read_members(self.paths[shard], *self.starts[row:row + 2])

    def captions(self, numbers):
        """The captions of examples one after another, of those that have any, without decoding images."""
        for number in numbers:
            with contextlib.suppress(Unusable):
                yield from captions_of(self.members(number))[0]

    def example(self, number):
        """(image, caption) of a number that runs on from epoch to epoch. Raises Unusable."""
        return self.decode(self.members(number % len(self)), number)

    def decode(self, members, number):
        """(image, caption) of the members of example `number`. Raises Unusable."""
        captions, symmetric = captions_of(members)
        across, down, mirrored, which = uniforms(self.seed, [number], 4)[0]
        caption = captions[int(which * len(captions))]
        if self.latent:
            if "npy" not in members:
                raise Unusable("it has no latent")
            return (decode_latent(members["npy"], self.shape) - self.mean) * self.scale, caption
        place = (across, down) if self.crop == "random" else (0.5, 0.5)
        image = resize_and_crop(decode_image(members), *self.shape[1:], *place)
        image = ImageOps.mirror(image) if self.flip and symmetric and mirrored < 0.5 else image
        array = np.atleast_3d(np.array(image.convert("L" if self.shape[0] == 1 else "RGB")))
        return to_pixels(array.transpose(2, 0, 1)), caption

    def usable(self, number):
        """(image, caption, "") of an example; or if it is unusable, the next one's and what is wrong with it."""
        fault = ""
        for attempt in range(ATTEMPTS):
            try:
                return *self.example(number + attempt), fault
            except Unusable as error:
                if not fault:
                    shard, i = self.place(number % len(self))
                    fault = f"example {i} of {self.paths[shard]}: {error}"
        raise ValueError(f"{ATTEMPTS} examples in a row are unusable, the first is {fault}")

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} is outside 0..{len(self) - 1}")
        return self.usable(int(i))[:2]

    def __getitems__(self, numbers):
        """A list of (image, caption, fault or ""); numbers run on from epoch to epoch, and captions and crops vary."""
        return [self.usable(int(number)) for number in numbers]


def first_example(paths):
    """Whether shards hold latents, and (C, H, W) of the first example that can be decoded. Raises ValueError."""
    header, starts = load_index(paths)
    shard = int(np.argmax(np.array(header["counts"]) > 0))  # the first that holds any; each before has an end only
    for row in range(shard, shard + min(ATTEMPTS, header["counts"][shard])):
        with contextlib.suppress(Unusable):
            members = read_members(paths[shard], *starts[row:row + 2])
            if "npy" in members:
                return True, tuple(decode_latent(members["npy"]).shape)
            image = decode_image(members)
            return False, (3, image.height, image.width)
    raise ValueError(f"no example at the beginning of {paths[shard]} can be decoded")


def latent_statistics(shard, channels, scale):
    """Mean and scale of each channel, (C, 1, 1), by latents.json beside a shard or above it; or zeros, and `scale`."""
    for folder in () if scale else (shard.parent, shard.parent.parent):
        path = folder / "latents.json"
        if (folder / "encoding.json").exists() and not path.exists():
            raise ValueError(f"the encoding in {folder} is not finished: run `python data.py encode` again")
        if path.exists():
            try:
                stored = json.loads(path.read_text())
                mean, scales = (torch.tensor(stored[name], dtype=torch.float32) for name in ("mean", "scale"))
                if not (mean.isfinite().all() and scales.isfinite().all() and (scales > 0).all()):
                    raise ValueError("means are to be finite, and scales positive")
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}); encode again, or set latent_scale") from error
            if mean.shape != (channels,) or scales.shape != (channels,):
                raise ValueError(f"{path} is of latents of {len(mean)} channels, but channels is {channels}")
            return mean.view(-1, 1, 1), scales.view(-1, 1, 1)
    return torch.zeros(channels, 1, 1), torch.full((channels, 1, 1), scale or 1.0)


def write_shard(path, examples):
    """Writes examples (key, {suffix: bytes}) to a tar, whole or not at all; equal examples make equal files."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # which no other process writes
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
            for key, members in examples:
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size, info.mode = len(data), 0o644
                    tar.addfile(info, io.BytesIO(data))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def write_shards(folder, examples, per_shard=1000):
    """Writes examples to folder/00000.tar, 00001.tar, ..., and removes such shards of an earlier, larger set."""
    examples, written = iter(examples), []
    while shard := list(itertools.islice(examples, per_shard)):
        written.append(folder / f"{len(written):05d}.tar")
        write_shard(written[-1], shard)
    for path in set(folder.glob("[0-9]" * 5 + ".tar")) - set(written):
        path.unlink()
