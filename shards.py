"""Shards: captioned pictures, or latents, in WebDataset tars, read in any order by way of an index.

A shard is a tar as img2dataset writes them and CC12M is published in. An example is a run of members of one KEY:
KEY.jpg, .jpeg, .png or .webp, or for a latent KEY.npy, an array (C, h, w); and its caption in KEY.txt, or as the
"caption" of KEY.json.

The index is one number for each example, the 512-byte block of its shard where its members begin; they end where the
next example's begin. It is built once, one process a core, kept beside the shards as shards-HASH.index, checked against
their sizes and times, and mapped into memory: 12 million examples are 48 MB, which all processes of a machine share. So
any order can be read: shuffling is global, and resuming needs no state.
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
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from example import (BLOCK, Unusable, caption_of, decode_latent, decode_picture, fit_picture, load_array, picture_of,
                     read_members)
from pictures import to_pixels
from shapes import uniforms

HELD_OUT = 100  # where there is no folder for validation, every 100th example is
ATTEMPTS = 100  # unusable examples in a row before a data set is given up

# ---------------------------------------------------------------------------------------------------------------
# Which files


def find_shards(data_dir, split):
    """The shards that data_dir names, in order: a folder, a glob, or a brace range such as cc12m-{00000..01242}.tar.

    Returns paths, and whether they are the split's own: a folder may have train/ and val/ in it. Raises
    FileNotFoundError where there is none, or one of a range is missing.
    """
    folder = Path(data_dir)
    own = folder.is_dir() and (folder / "train").is_dir()
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
    """A pattern with ranges {000..123} or lists {a,b}, as a shell expands it, to names."""
    if not (match := re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*))\}", pattern)):
        return [pattern]
    first, last, names = match.groups()
    names = names.split(",") if first is None else [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
    return [name for middle in names for name in expand(pattern[:match.start()] + middle + pattern[match.end():])]


# ---------------------------------------------------------------------------------------------------------------
# The index


def key_of(name):
    """WebDataset's key: a member's path up to the first dot of its file name."""
    path = PurePosixPath(name)
    return str(path.parent / path.name.partition(".")[0])


def scan(path):
    """Where the examples of a shard begin, and the end, in blocks, uint32; and what is wrong with the shard, or ""."""
    starts, key, fault = [], None, ""
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile() and key_of(member.name) != key:
                    key = key_of(member.name)
                    starts.append(member.offset // BLOCK)
            end = tar.offset
        fault = fault_after(path, end)
    except (tarfile.TarError, EOFError) as error:  # its examples so far are good, but perhaps for the last
        fault, end = str(error), -(-path.stat().st_size // BLOCK) * BLOCK
    return np.array([*starts, end // BLOCK], dtype=np.uint32), fault


def fault_after(path, end):
    """What is wrong with a shard behind its last member: there should be empty blocks and nothing else, or ""."""
    with open(path, "rb") as file:
        file.seek(end)
        if not (rest := file.read(BLOCK)):
            return "it has no end"
        while rest:
            if rest.strip(b"\0"):
                return f"what follows its byte {end} is no member"
            rest = file.read(2**20)
    return ""


def stamp(paths, folder):
    """What tells whether shards have changed: name, size in bytes and time of each."""
    return [[os.path.relpath(path, folder), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]


def read_index(path, shards):
    """The header and the mapped starts of an index, or None if there is none for exactly these shards."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            offset = file.tell()
        starts = np.memmap(path, dtype=np.uint32, mode="r", offset=offset)
    except (OSError, ValueError):
        return None
    if header.get("shards") != shards or len(starts) != sum(header["counts"]) + len(shards):
        return None
    return header, starts


def open_lock(path):
    try:
        return open(path, "w")
    except OSError as error:
        raise OSError(f"the index of the shards cannot be written beside them ({error}): make the folder writable, or "
                      "link the shards into one that is") from error


def load_index(paths):
    """The index of shards, built now if there is none yet or they have changed.

    Returns header, {"shards", "counts" of examples, "faults"}, and the starts of all shards one after another, each
    shard's followed by its end. Whoever comes first builds; the other ranks wait for it. Raises OSError where it
    cannot be written.
    """
    folder = paths[0].parent
    shards = stamp(paths, folder)
    digest = hashlib.sha256(json.dumps([name for name, _, _ in shards]).encode()).hexdigest()[:8]
    path = folder / f"shards-{digest}.index"
    if found := read_index(path, shards):
        return found
    with open_lock(path.with_suffix(".lock")) as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := read_index(path, shards):
            return found
        # forked, since a fresh interpreter would run the script that we are in once more
        with multiprocessing.get_context("fork").Pool(min(len(paths), os.cpu_count())) as pool:
            scanned = list(tqdm(pool.imap(scan, paths), total=len(paths), desc="index", unit="shard", leave=False))
        header = {"shards": shards, "counts": [len(starts) - 1 for starts, _ in scanned],
                  "faults": {str(name): fault for (name, _, _), (_, fault) in zip(shards, scanned) if fault}}
        text = json.dumps(header)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            file.write((text + " " * (-(len(text) + 1) % 4) + "\n").encode())  # padded: the numbers are aligned
            for starts, _ in scanned:
                file.write(starts.tobytes())
        os.replace(part, path)
    return read_index(path, shards)


# ---------------------------------------------------------------------------------------------------------------
# The data set


class Shards:
    """The examples of shards as a map-style data set: ds[i] -> (image (C, H, W) float32, caption).

    Pictures are in [-1, 1], at the centres of their 8-bit bins. Latents are normalised, (latent - mean) * scale by
    channel, as latents.json beside the shards or above them says. An example that is unusable is replaced by the next
    usable one. The loader's ds.__getitems__ says so, returning triples (image, caption, fault or ""); its numbers run
    on from epoch to epoch, so that random crops and flips are new in each.
    """

    def __init__(self, data_dir, split, channels, height, width, seed=0, latent_scale=0.0, crop="center", flip=False):
        """split: "train", "val", or "all" where these have no folders of their own.
        latent_scale: what latents are multiplied by, instead of what latents.json says. crop: "center" or "random",
        flip: mirror every second picture; both in training only. Raises ValueError or OSError for what cannot be."""
        if crop not in ("center", "random"):
            raise ValueError(f"crop {crop!r} is unknown: choose 'center' or 'random'")
        self.paths, own = find_shards(data_dir, split)
        self.header, self.starts = load_index(self.paths)
        counts = np.array(self.header["counts"])
        self.ends = counts.cumsum()  # of each shard, the number of examples up to and with it
        self.split, self.held_out = split, not own and split != "all"
        self.seed, self.shape = seed, (channels, height, width)
        self.crop, self.flip = (crop, flip) if split == "train" else ("center", False)
        if len(self) == 0:
            faults = "".join(f"; {name}: {fault}" for name, fault in list(self.header["faults"].items())[:1])
            raise ValueError(f"data_dir {data_dir!r} has {self.ends[-1]} examples, too few for {split!r}: every "
                             f"{HELD_OUT}th is for validation, where there are no folders train/ and val/{faults}")
        self.latent, _ = first_example(self.paths, (self.header, self.starts))
        self.eight_bit = not self.latent
        if self.latent:
            self.mean, self.scale = latent_statistics(self.paths[0], channels, latent_scale)
        elif channels not in (1, 3):
            raise ValueError(f"{self.paths[0]} holds pictures, which have 1 or 3 channels: channels is {channels}")
        elif latent_scale:
            raise ValueError(f"latent_scale is {latent_scale}, but {self.paths[0]} holds pictures: leave it out")
        self.usable(0)  # a wrong size is told before anything else happens

    def __len__(self):
        total = int(self.ends[-1])
        return total if not self.held_out else total - total // HELD_OUT if self.split == "train" else total // HELD_OUT

    def place(self, i):
        """The shard of example i and its number there."""
        if self.held_out:
            i = i + i // (HELD_OUT - 1) if self.split == "train" else i * HELD_OUT + HELD_OUT - 1
        shard = int(np.searchsorted(self.ends, i, side="right"))
        return shard, i - int(self.ends[shard - 1]) if shard else i

    def members(self, i):
        shard, number = self.place(i)
        row = number + (int(self.ends[shard - 1]) if shard else 0) + shard  # a shard before has one more: its end
        return read_members(self.paths[shard], int(self.starts[row]), int(self.starts[row + 1]))

    def example(self, number):
        """Image and caption of a number that runs on through the epochs. Raises Unusable."""
        members = self.members(number % len(self))
        caption = caption_of(members)
        if self.latent:
            if "npy" not in members:
                raise Unusable("it has no latent")
            return (decode_latent(members["npy"], self.shape) - self.mean) * self.scale, caption
        across, down, mirrored = uniforms(self.seed, np.array([number]), 3)[0]
        place = (across, down) if self.crop == "random" else (0.5, 0.5)
        array = fit_picture(decode_picture(picture_of(members)), *self.shape[1:], *place)
        array = array[:, ::-1] if self.flip and mirrored < 0.5 else array
        if self.shape[0] == 1:
            array = np.asarray(Image.fromarray(np.ascontiguousarray(array)).convert("L"))[..., None]
        return to_pixels(array.transpose(2, 0, 1).copy()), caption

    def usable(self, number):
        """Image, caption and what was wrong with the example of that number, so that it is the next one's, or ""."""
        fault = ""
        for attempt in range(ATTEMPTS):
            try:
                return *self.example(number + attempt), fault
            except Unusable as error:
                fault = fault or f"{self.name(number % len(self))}: {error}"
        raise ValueError(f"{ATTEMPTS} examples in a row are unusable, the first is {fault}")

    def name(self, i):
        shard, number = self.place(i)
        return f"example {number} of {self.paths[shard]}"

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} is outside 0..{len(self) - 1}")
        return self.usable(i)[:2]

    def __getitems__(self, numbers):
        return [self.usable(int(number)) for number in numbers]


def first_example(paths, index=None):
    """Whether shards hold latents, and (C, H, W) of the first of their examples that can be decoded.

    index: theirs, where it is loaded already. Raises ValueError where there is none among the first 100.
    """
    header, starts = index or load_index(paths)
    shard = int(np.argmax(np.array(header["counts"]) > 0))  # the first that holds any
    first = sum(header["counts"][:shard]) + shard
    for row in range(first, first + min(ATTEMPTS, header["counts"][shard])):
        with contextlib.suppress(Unusable):
            members = read_members(paths[shard], int(starts[row]), int(starts[row + 1]))
            if "npy" in members:
                return True, tuple(load_array(members["npy"]).shape)
            picture = decode_picture(picture_of(members))
            return False, (3, picture.height, picture.width)
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
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is damaged ({error}); encode again, or set latent_scale") from error
            if mean.shape != (channels,) or scales.shape != (channels,):
                raise ValueError(f"{path} is of latents of {len(mean)} channels, but channels is {channels}")
            return mean.view(-1, 1, 1), scales.view(-1, 1, 1)
    return torch.zeros(channels, 1, 1), torch.full((channels, 1, 1), scale or 1.0)


# ---------------------------------------------------------------------------------------------------------------
# Writing


def write_shard(path, examples):
    """Writes examples (key, {suffix: bytes}) to a tar, whole or not at all; equal examples make equal files."""
    part = path.with_suffix(".part")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(part, "w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in examples:
            for suffix, data in members.items():
                info = tarfile.TarInfo(f"{key}.{suffix}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    os.replace(part, path)


def write_shards(folder, examples, per_shard=1000):
    """Writes examples (key, {suffix: bytes}) to folder/00000.tar, 00001.tar, ..., the only shards there afterwards.

    Returns how many examples.
    """
    examples, count, written = iter(examples), 0, set()
    while shard := list(itertools.islice(examples, per_shard)):
        path = folder / f"{len(written):05d}.tar"
        write_shard(path, shard)
        written.add(path)
        count += len(shard)
    for path in set(folder.glob("[0-9]" * 5 + ".tar")) - written:  # of an earlier, larger set
        path.unlink()
    return count
