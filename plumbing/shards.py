"""Shards: captioned images, or latents, in WebDataset tars, read in any order through an index.

A shard is a tar as img2dataset writes it. An example is a run of adjacent members of one KEY: KEY.jpg, .jpeg, .png or
.webp, or for a latent KEY.npy, an array (C, h, w); and its captions in KEY.txt, or in KEY.json as the "caption" or
"captions", one of which is drawn in each epoch. "mirror": false in KEY.json forbids flips. plumbing/examples.py has all
rules. The index holds the 512-byte block where each example begins, in memory that all processes share. So examples are
shuffled across all shards, and a resumed run needs no state of its data.
"""

import contextlib
import io
import itertools
import json
import os
import tarfile
import uuid

import numpy as np
import torch

from plumbing.examples import IMAGES, Unusable, captions_of, decode_image, decode_latent, holds_latent, pick
from plumbing.images import resize_and_crop, to_pixels
from plumbing.index import files_in, find_shards, load_index, read_members
from plumbing.rng import uniforms
from plumbing.runtime import note

HELD_OUT = 100  # without a folder for validation, every 100th example is held out
ATTEMPTS = 100  # unusable examples in a row before reading gives up
NEIGHBOURS = 10  # attempts in one place; the others are spread over all shards, as a whole shard may be unusable


def attempts(number, size):
    """Yield the numbers to try for an example, until one is usable: itself, its neighbours, and others far away."""
    for attempt in range(ATTEMPTS):
        yield number + attempt * (1 if attempt < NEIGHBOURS else max(1, size // ATTEMPTS))


class Shards:
    """The examples of shards as a map-style data set: ds[i] -> (image (C, H, W) float32, caption).

    Images are in [-1, 1], at the centres of their 8-bit bins; latents are (latent - mean) * scale by channel, as
    latents.json says. An unusable example is replaced by the next usable one, or after ten unusable ones in a row by
    one from elsewhere; __getitems__ also says what was wrong.
    """

    runs_on = True  # __getitems__ takes numbers beyond the last example: those of later epochs

    def __init__(self, data_dir, split, channels, height, width, seed=0, latent_scale=0.0, crop="center", flip=False):
        """Open the shards of a split: "train", "val", or "all", for shards without folders train/ and val/.

        latent_scale: a factor for latents, in place of latents.json; 0: none. crop: "center" or "random". flip: mirror
        half of the images. Both hold in training only. Raises ValueError or OSError for shards that cannot be used.
        """
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
        self.latent, found = first_example(self.paths)
        if self.latent and found != self.shape and self.has_images():  # images are meant, not the arrays beside them
            self.latent = False
        self.eight_bit = not self.latent
        if self.latent:
            if self.flip or self.crop == "random":
                note("latents are neither flipped nor cropped: flip and crop are not used")
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

    def blocks(self, i):
        """The shard of example i, and the blocks where the example begins and ends."""
        shard, number = self.place(i)
        row = int(self.firsts[shard]) + shard + number  # each shard before has one entry more, its end
        return self.paths[shard], *self.starts[row:row + 2]

    def members(self, i):
        """The members of example i, {suffix: bytes}. Raises Unusable."""
        return read_members(*self.blocks(i))

    def has_images(self):
        with contextlib.suppress(Unusable):
            return pick(self.members(0), *IMAGES) is not None
        return False

    def captions(self, numbers):
        """Yield all captions of the examples with these numbers, without decoding images; unusable ones have none."""
        for number in numbers:
            with contextlib.suppress(Unusable):
                yield from captions_of(self.members(number))[0]

    def example(self, number):
        """(image, caption) of an example, whose number runs on from epoch to epoch. Raises Unusable."""
        return self.decode(self.members(number % len(self)), number)

    def decode(self, members, number):
        """(image, caption) of the members of example `number`. Raises Unusable."""
        captions, symmetric = captions_of(members)
        across, down, mirrored, which = uniforms(self.seed, [number], 4)[0]
        caption = captions[int(which * len(captions))]
        place = (across, down) if self.crop == "random" else (0.5, 0.5)
        stored = self.stored(members, *place)
        if self.mirrors(symmetric, mirrored):
            stored = stored.flip(-1)
        return self.normalized(stored), caption

    def stored(self, members, across=0.5, down=0.5):
        """An example's 8-bit image, cropped as by resize_and_crop, or its latent: (C, H, W). Raises Unusable."""
        if self.latent:
            return decode_latent(members, self.shape)
        image = resize_and_crop(decode_image(members), *self.shape[1:], across, down)
        image = image.convert("L" if self.shape[0] == 1 else "RGB")
        array = np.atleast_3d(np.array(image))
        return torch.from_numpy(array.transpose(2, 0, 1).copy())

    def mirrors(self, symmetric, draw):
        """Whether to mirror examples; symmetric: whether they may be; draw: from [0, 1). Both may be arrays."""
        return (self.flip and not self.latent) & symmetric & (draw < 0.5)

    def normalized(self, stored):
        """What stored() returns, one (C, H, W) or several (B, C, H, W), as float32 for a network."""
        return (stored - self.mean) * self.scale if self.latent else to_pixels(stored)

    def usable(self, number):
        """(image, caption, "") of an example; or if it is unusable, another one's and why it was replaced."""
        fault = ""
        for other in attempts(number, len(self)):
            try:
                return *self.example(other), fault
            except Unusable as error:
                fault = fault or self.named(number % len(self), error)
        shard, _ = self.place(number % len(self))
        raise ValueError(f"{ATTEMPTS} examples in a row are unusable, the first is {fault}"
                         + fault_of(shard, self.header))

    def named(self, i, error):
        """The line that says what is wrong with example i: its place, the error, and the name of its first file."""
        shard, number = self.place(i)
        where = ""
        with contextlib.suppress(Unusable):
            where = "".join(f", in {name}" for name, _ in files_in(*self.blocks(i))[:1])
        return f"example {number} of {self.paths[shard]}: {error}{where}"

    def __getitem__(self, i):
        if not 0 <= i < len(self):
            raise IndexError(f"item {i} is outside 0..{len(self) - 1}")
        return self.usable(int(i))[:2]

    def __getitems__(self, numbers):
        """A list of (image, caption, fault or ""); numbers run on from epoch to epoch, and captions and crops vary."""
        return [self.usable(int(number)) for number in numbers]


def fault_of(shard, header):
    """The fault that an index records for shard number `shard`, to end an error message; "" if there is none."""
    name = header["shards"][shard][0]
    return f"; {name}: {header['faults'][name]}" if name in header["faults"] else ""


def first_example(paths):
    """Whether shards hold latents, and (C, H, W) of the first example that can be decoded. Raises ValueError."""
    header, starts = load_index(paths)
    ends = np.cumsum(header["counts"])
    total, fault = int(ends[-1]), "there is none"
    for number in attempts(0, total) if total else ():
        shard = int(np.searchsorted(ends, number % total, side="right"))
        row = number % total + shard  # each shard before has one entry more, its end
        try:
            members = read_members(paths[shard], *starts[row:row + 2])
            if holds_latent(members):
                return True, tuple(decode_latent(members).shape)
            image = decode_image(members)
            return False, (3, image.height, image.width)
        except Unusable as error:
            fault = str(error) if fault == "there is none" else fault
    first = int(np.argmax(ends > 0))
    raise ValueError(f"no example at the beginning of {paths[first]} can be decoded: {fault}"
                     + fault_of(first, header))


def latent_statistics(shard, channels, scale):
    """Mean and scale of each channel of latents, two tensors (C, 1, 1).

    If `scale` is not 0, it is every channel's scale, and the means are 0. Otherwise both are those of latents.json, in
    the shard's folder or the one above; without such a file, 0 and 1. Raises ValueError for a file that does not fit.
    """
    for folder in () if scale else (shard.parent, shard.parent.parent):
        path = folder / "latents.json"
        if (folder / "encoding.json").exists() and not path.exists():
            raise ValueError(f"the encoding in {folder} is not finished: run `python data.py encode` again")
        if path.exists():
            try:
                stored = json.loads(path.read_text("utf-8"))
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
    """Write examples (key, {suffix: bytes}) to a tar, whole or not at all; equal examples make equal files."""
    part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # a name that no other process writes
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
    """Write examples to folder/00000.tar, 00001.tar, ..., and remove further ones, left from an earlier, larger set."""
    examples, written = iter(examples), []
    while shard := list(itertools.islice(examples, per_shard)):
        written.append(folder / f"{len(written):05d}.tar")
        write_shard(written[-1], shard)
    for path in set(folder.glob("[0-9]" * 5 + ".tar")) - set(written):
        path.unlink()
