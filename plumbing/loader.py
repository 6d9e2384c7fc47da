"""Batches: which examples each iteration sees, how they are loaded, and all that is random about them.

What is random in iteration i is sampled for the whole batch from (seed, i), and each rank takes its rows of it. So a
run does not depend on how many ranks or accumulation passes share a batch, and a resumed run is the interrupted one.
"""

import functools
import signal
import time

import torch
from torch.utils.data import DataLoader

from plumbing.images import dequantize
from plumbing.runtime import one_line_errors
from plumbing.shapes import uniforms
from plumbing.tokenizer import MOST_WORDS, survey, words

FEW = 50  # held-out examples, below which validation's figures are noise


def order(size, batch_size, seed, start, stop, rows, again=0):
    """Batches of numbers: epoch after epoch, each shuffled anew. Position p of this endless sequence is a function of
    (seed, p). rows: those of the batch that a rank reads. again: what an example's number grows by with every epoch."""
    for i in range(start, stop):
        positions = range(i * batch_size + rows.start, i * batch_size + rows.stop)
        yield [epoch * again + shuffled(size, seed, epoch)[k].item()
               for epoch, k in (divmod(position, size) for position in positions)]


def key(seed, number, use):
    """A generator's seed, a hash: of a sum, seed 1 would have in epoch 0 what seed 0 has in epoch 1. use: 0 or 1."""
    return int(uniforms(seed, [number], 2)[0, use] * 2**53)


@functools.lru_cache(1)
def shuffled(size, seed, epoch):
    generator = torch.Generator().manual_seed(key(seed, epoch, 0))
    return torch.randperm(size, generator=generator, dtype=torch.int32)  # half of int64


def collate(examples):
    """(image, caption) or (image, caption, fault or "") to images (B, C, H, W), B captions, and the faults."""
    images, captions, *faults = zip(*examples)
    return torch.stack(images), list(captions), [fault for fault in (faults[0] if faults else ()) if fault]


def read_ahead(dataset, batches, workers, **settings):
    """A DataLoader of `batches`, lists of numbers. It forks: a fresh interpreter would run the script once more."""
    return DataLoader(dataset, batch_sampler=batches, num_workers=workers, **settings,
                      multiprocessing_context="fork" if workers else None)


def leave_signals_to_the_trainer(worker):
    """A terminal's Ctrl-C reaches the data workers too; they must outlive the update that it interrupts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Batches:
    """A run's batches from iteration `start` on, dequantised and with some captions replaced by the null caption.

    A context: the processes that load (config's `workers`) end with it. ranks: device, rank, world. rows: this rank's,
    a slice of the whole batch. counts: {"unusable": examples replaced, "cut": captions too long}, of this rank since
    the start. faults: what was wrong with the first ten. words: in its captions. waited: seconds that loading took.
    """

    def __init__(self, dataset, tokenizer, text_len, config, start, ranks, words=()):
        self.device, rank, world = ranks
        self.batch_size, self.passes = config["batch_size"], config["grad_accum"]
        if self.batch_size % (world * self.passes):
            raise ValueError(f"batch_size {self.batch_size} is not divisible by {world} ranks x grad_accum "
                             f"{self.passes}")
        per_rank = self.batch_size // world
        self.rows = slice(rank * per_rank, (rank + 1) * per_rank)
        self.dataset, self.tokenizer, self.text_len, self.config = dataset, tokenizer, text_len, config
        self.null = tokenizer.encode([""], text_len).to(self.device)
        self.iteration, self.generator = start, torch.Generator(self.device)
        self.counts, self.faults, self.words, self.waited = {"unusable": 0, "cut": 0}, [], set(words), 0.0

    def __enter__(self):
        again = len(self.dataset) if hasattr(self.dataset, "runs_on") else 0  # new crops and flips each epoch
        numbers = order(len(self.dataset), self.batch_size, self.config["seed"], self.iteration,
                        self.config["max_iters"], self.rows, again)
        with one_line_errors():
            loader = read_ahead(self.dataset, numbers, self.config["workers"], collate_fn=collate,
                                pin_memory=self.device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer)
            self.loaded = iter(loader)
        return self

    def __exit__(self, *error):
        self.loaded = None  # the workers end with its last reference

    def __next__(self):
        """images (b, C, H, W), text (b, L), and the generator from which the rest of the whole batch's noise comes."""
        asked_at = time.perf_counter()
        images, captions, faults = self.load()
        self.waited += time.perf_counter() - asked_at
        self.faults = (self.faults + faults)[:10]
        self.words |= words(captions) if len(self.words) < MOST_WORDS else set()
        with one_line_errors():
            cut = self.tokenizer.cut
            text = self.tokenizer.encode(captions, self.text_len).to(self.device, non_blocking=True)
        self.counts["unusable"] += len(faults)
        self.counts["cut"] += self.tokenizer.cut - cut
        generator = self.generator.manual_seed(key(self.config["seed"], self.iteration, 1))
        images = images.to(self.device, non_blocking=True)
        if self.dataset.eight_bit:
            whole = torch.zeros(self.batch_size, *images.shape[1:], device=self.device)
            images = images + dequantize(whole, generator)[self.rows]
        dropped = torch.rand(self.batch_size, 1, generator=generator, device=self.device)
        text = torch.where(dropped[self.rows] < self.config["caption_dropout"], self.null, text)
        self.iteration += 1
        return images, text, generator

    def load(self):
        """The next batch from the loader. Raises SystemExit in one line for what is wrong with the data."""
        try:
            return next(self.loaded)
        except (ValueError, OSError) as error:
            message = str(error.with_traceback(None))  # whose frames would keep the processes that load alive
        if "Original Traceback" in message:  # from a process that loads: its last line is the error
            message = message.strip().splitlines()[-1].partition(": ")[2]
        raise SystemExit(message)

    def chunks(self, *tensors):
        """The rows of a rank's tensors in as many parts as there are accumulation passes."""
        return zip(*(tensor.chunk(self.passes) for tensor in tensors))


def examine(train_set, val_set, tokenizer, text_len, bad_captions):
    """What to know about a run's data before it starts, a list of lines. Raises ValueError where more than the fraction
    bad_captions of the captions are cut by text_len, or fall apart."""
    notes = [f"{name} is damaged: {fault}" for name, fault in getattr(train_set, "faults", {}).items()][:10]
    some = range(0, len(train_set), len(train_set) // 1000 + 1)
    captions = train_set.captions(some) if hasattr(train_set, "captions") else (train_set[i][1] for i in some)
    if line := survey(list(captions), tokenizer, text_len, bad_captions):
        notes.append(line)
    if not train_set.eight_bit:
        deviation = torch.stack([train_set[i][0] for i in some[:100]]).std().item()
        if not 0.5 < deviation < 2:
            notes.append(f"the latents' standard deviation is {deviation:.3g}, but should be about 1: set latent_scale")
    if len(val_set) < FEW:
        notes.append(f"{len(val_set)} examples are held out, fewer than {FEW}: validation's figures are mostly noise")
    return notes


def validation_batches(dataset, tokenizer, text_len, count, device, rank=0, world=1, batch_size=100):
    """This rank's part of the first `count` examples: (images, text, captions, a generator that is always the same).
    Batches are dealt to ranks whole, so that sums over the ranks do not depend on how many there are."""
    count = min(count, len(dataset))
    for start in range(0, count, batch_size)[rank::world]:
        images, captions, _ = collate(dataset.__getitems__(list(range(start, min(start + batch_size, count)))))
        generator = torch.Generator(device).manual_seed(start)
        images = dequantize(images.to(device), generator) if dataset.eight_bit else images.to(device)
        yield images, tokenizer.encode(captions, text_len).to(device), captions, generator
