"""Shards decoded once and kept in memory, for sets that fit into it and GPUs that are faster than decoding."""

import mmap
import multiprocessing
import os

import numpy as np
import torch
from tqdm import tqdm

from plumbing.examples import Unusable, captions_of
from plumbing.rng import uniforms
from plumbing.runtime import CAN_FORK
from plumbing.shards import Shards

PART = 256  # examples that a process decodes at a time


class Kept:
    """The examples of Shards, item for item, from memory that all processes of a rank share.

    As in Shards, each epoch draws captions and mirrors images anew. Shards also replace an unusable example.
    """

    runs_on = True

    def __init__(self, shards):
        """Decode all of `shards`. Raises ValueError for another data set, random crops, or too little memory."""
        if not isinstance(shards, Shards):
            raise ValueError("in_memory is True, but only shards are decoded from files: leave it out")
        if shards.crop == "random":
            raise ValueError("in_memory is True, but crop 'random' needs the whole images: set one of them otherwise")
        self.shards = shards
        shape = len(shards), *shards.shape
        dtype = np.dtype(np.float32 if shards.latent else np.uint8)
        size = int(np.prod(shape)) * dtype.itemsize
        free = free_memory()
        if size > 0.8 * free:
            raise ValueError(f"in_memory is True, but the {len(shards):,} examples take {size / 1e9:.1f} GB, and "
                             f"{free / 1e9:.1f} GB are free: set it to False")
        # anonymous memory, which forked processes share: /dev/shm may be small
        self.stored = torch.from_numpy(np.frombuffer(mmap.mmap(-1, size), dtype).reshape(shape))
        self.texts, self.symmetric = self.decode_all()

    def decode_all(self):
        """Fill self.stored; return each example's captions (none if it is unusable) and whether it may be mirrored."""
        starts = range(0, len(self), PART)
        texts, symmetric = [], []
        processes = min(len(starts), os.cpu_count() or 1)
        if CAN_FORK and processes > 1:
            with multiprocessing.get_context("fork").Pool(processes, share, (self,)) as pool:
                parts = list(tqdm(pool.imap(decode_part, starts), total=len(starts), desc="decoding", leave=False))
        else:
            share(self)
            parts = list(map(decode_part, tqdm(starts, desc="decoding", leave=False)))
        for part in parts:
            for captions, mirror in part:
                texts.append(captions)
                symmetric.append(mirror)
        return texts, np.array(symmetric)

    def decode(self, i):
        """Store example i; return its captions, none if it is unusable, and whether it may be mirrored."""
        try:
            members = self.shards.members(i)
            captions, mirror = captions_of(members)
            self.stored[i] = self.shards.stored(members)
            return captions, mirror
        except Unusable:
            return [], False

    def __getattr__(self, name):
        """Take every other attribute, such as `latent` or `place`, from the shards."""
        if name == "shards":  # asked for before it is set, it would be looked up for ever
            raise AttributeError(name)
        return getattr(self.shards, name)

    def __len__(self):
        return len(self.shards)

    def __getitem__(self, i):
        return self.shards[i]

    def __getitems__(self, numbers):
        """A list of (image, caption, fault or ""); numbers run on from epoch to epoch."""
        numbers = np.asarray(numbers, dtype=np.int64)
        rows = numbers % len(self)
        _, _, mirrored, which = uniforms(self.shards.seed, numbers, 4).T
        stored = self.stored[torch.from_numpy(rows)]
        flipped = torch.from_numpy(self.shards.mirrors(self.symmetric[rows], mirrored))
        stored = torch.where(flipped[:, None, None, None], stored.flip(-1), stored)
        images = self.shards.normalized(stored)
        examples = []
        for number, row, image, draw in zip(numbers, rows, images, which):
            texts = self.texts[row]
            if texts:
                examples.append((image, texts[int(draw * len(texts))], ""))
            else:
                examples.append(self.shards.usable(int(number)))
        return examples


shared = []  # the Kept that this process decodes for


def share(kept):
    """Set the Kept that decode_part works on, in each process of the pool."""
    shared[:] = [kept]


def decode_part(start):
    """Store PART examples from number `start` on; return what decode() returns for each."""
    kept = shared[0]
    return [kept.decode(i) for i in range(start, min(start + PART, len(kept)))]


def free_memory():
    """Bytes that are free for a program, or infinity where the system does not say."""
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return float("inf")
