"""Batches: which examples each iteration sees, how they are loaded, and all that is random about them.

What is random in iteration i is sampled for the whole batch from (seed, i), and each rank takes its rows of it. So a
run does not depend on how many ranks or accumulation passes share a batch, and a resumed run is the interrupted one.
"""

import functools
import sys
import time

import torch
from tqdm import tqdm

from plumbing.images import dequantize
from plumbing.rng import randn, uniforms
from plumbing.runtime import Interrupt, one_line_errors
from plumbing.shards import ATTEMPTS, attempts
from plumbing.tokenizer import MOST_WORDS, survey, words
from plumbing.workers import ReadAhead

FEW = 50  # held-out examples, below which validation's figures are noise
NAMED = 10  # unusable examples that are named


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
    """The same batches as ReadAhead, by a generator; the processes that load end with it."""
    with ReadAhead(dataset, batches, workers, **settings) as loaded:
        yield from loaded


class Readable:
    """The examples of a data set with their captions' ids: (image, caption, ids (L,), whether they are cut, fault or
    ""). One whose caption the tokenizer refuses is replaced by the next usable one, and the fault says why."""

    def __init__(self, dataset, tokenizer, text_len):
        self.dataset, self.tokenizer, self.text_len = dataset, tokenizer, text_len

    def __getitems__(self, numbers):
        return [self.readable(number, *example) for number, example in zip(numbers, self.dataset.__getitems__(numbers))]

    def readable(self, number, image, caption, fault=""):
        size = len(self.dataset)
        for other in attempts(number, size):
            if other != number:
                again = other if hasattr(self.dataset, "runs_on") else other % size
                image, caption, *_ = self.dataset.__getitems__([again])[0]
            cut = self.tokenizer.cut
            try:
                ids = self.tokenizer.encode([caption], self.text_len)[0]
                return image, caption, ids, self.tokenizer.cut - cut, fault
            except Exception as error:  # what encoding garbage raises depends on the tokenizer
                fault = fault or f"{self.name(number)}: {error}"
        raise ValueError(f"{ATTEMPTS} examples in a row have no readable caption, the first is {fault}")

    def name(self, number):
        number %= len(self.dataset)
        if not hasattr(self.dataset, "place"):
            return f"example {number}"
        shard, number = self.dataset.place(number)
        return f"example {number} of {self.dataset.paths[shard]}"


def collate_readable(examples):
    """Examples of Readable to images (B, C, H, W), B captions, ids (B, L), how many are cut, and the faults."""
    images, captions, ids, cut, faults = zip(*examples)
    return torch.stack(images), list(captions), torch.stack(ids), sum(cut), [fault for fault in faults if fault]


def name_faults(faults, what=""):
    """Tells the user of unusable examples; `what` kind they are."""
    for fault in faults:
        tqdm.write(f"note: an unusable {what}example, another stands in for it: {fault}", file=sys.stderr)


class Batches:
    """A run's batches from iteration `start` on, dequantised and with some captions replaced by the null caption.

    A context: the processes that load (config's `workers`) end with it. ranks: device, rank, world. rows: this rank's,
    a slice of the whole batch. randn: draws these rows of torch.randn(shape). interrupt: the context in which signals
    ask for an end. counts: {"unusable": examples replaced, "cut": captions too long}, of this rank since the start.
    faults: what was wrong with the first ten. words: in its captions. waited: seconds that loading took.
    """

    def __init__(self, dataset, tokenizer, text_len, config, start, ranks, words=()):
        self.device, rank, world = ranks
        self.batch_size, self.passes = config["batch_size"], config["grad_accum"]
        if self.batch_size % (world * self.passes):
            raise ValueError(f"batch_size {self.batch_size} is not divisible by {world} ranks x grad_accum "
                             f"{self.passes}")
        per_rank = self.batch_size // world
        self.rows = slice(rank * per_rank, (rank + 1) * per_rank)
        self.randn = functools.partial(randn, rows=self.rows)
        self.dataset, self.examples, self.config = dataset, Readable(dataset, tokenizer, text_len), config
        self.null = tokenizer.encode([""], text_len).to(self.device)
        self.iteration, self.generator = start, torch.Generator(self.device)
        self.counts, self.faults, self.words, self.waited = {"unusable": 0, "cut": 0}, [], set(words), 0.0
        self.interrupt, self.ahead, self.failure = Interrupt(), None, ""

    def __enter__(self):
        again = len(self.dataset) if hasattr(self.dataset, "runs_on") else 0  # new crops and flips each epoch
        numbers = order(len(self.dataset), self.batch_size, self.config["seed"], self.iteration,
                        self.config["max_iters"], self.rows, again)
        with one_line_errors():
            self.loading = ReadAhead(self.examples, numbers, self.config["workers"], lambda: self.interrupt.asked,
                                     collate_fn=collate_readable, pin_memory=self.device.type == "cuda")
        return self

    def __exit__(self, kind, *error):
        self.loading.__exit__(kind, *error)
        if self.failure and kind is None:  # the run has ended for it, in order
            raise SystemExit(self.failure)

    def load_next(self):
        """Loads the next batch, unless the run ends before it."""
        if self.iteration < self.config["max_iters"] and not self.interrupt.asked:
            self.load()

    @property
    def must_end(self):
        """Whether the run has to end without the next batch, all ranks after the same iteration: because a signal asked
        for that, or since the data fail, as __exit__ then says."""
        return self.interrupt.asked or bool(self.failure)

    def load(self):
        """Has the next batch in self.ahead, or in self.failure a line that says why there is none."""
        asked_at = time.perf_counter()
        try:
            self.ahead = next(self.loading)
        except (ValueError, OSError) as error:
            self.failure = "" if self.interrupt.asked else str(error)
        self.waited += time.perf_counter() - asked_at

    def __next__(self):
        """images (b, C, H, W), text (b, L), and the generator from which the rest of the whole batch's noise comes."""
        if self.ahead is None:  # the first
            self.load()
        if self.ahead is None:
            raise SystemExit(self.failure or "interrupted while waiting for the first data: nothing is lost")
        (images, captions, text, cut, faults), self.ahead = self.ahead, None
        name_faults(faults[:NAMED - len(self.faults)])
        self.faults = (self.faults + faults)[:NAMED]
        self.words |= words(captions) if len(self.words) < MOST_WORDS else set()
        self.counts["unusable"] += len(faults)
        self.counts["cut"] += cut
        generator = self.generator.manual_seed(key(self.config["seed"], self.iteration, 1))
        images = images.to(self.device, non_blocking=True)
        if self.dataset.eight_bit:
            images = dequantize(images, generator, self.batch_size, self.rows)
        dropped = torch.rand(self.batch_size, 1, generator=generator, device=self.device)
        text = text.to(self.device, non_blocking=True)
        text = torch.where(dropped[self.rows] < self.config["caption_dropout"], self.null, text)
        self.iteration += 1
        return images, text, generator

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


def validation_batches(dataset, tokenizer, text_len, count, device, rank=0, world=1, batch_size=100, bad_limit=1.0):
    """This rank's part of the first `count` examples: (images, text, captions, a generator that is always the same).
    Batches are dealt to ranks whole, so that sums over the ranks do not depend on how many there are. Raises SystemExit
    where more than the fraction bad_limit of this rank's examples, and more than a few, are unusable."""
    count, seen, unusable = min(count, len(dataset)), 0, []
    examples = Readable(dataset, tokenizer, text_len)
    for start in range(0, count, batch_size)[rank::world]:
        numbers = list(range(start, min(start + batch_size, count)))
        images, captions, text, _, faults = collate_readable(examples.__getitems__(numbers))
        name_faults(faults[:max(0, NAMED - len(unusable))], "held-out ")
        unusable += faults
        seen += len(numbers)
        generator = torch.Generator(device).manual_seed(start)
        images = dequantize(images.to(device), generator) if dataset.eight_bit else images.to(device)
        yield images, text.to(device), captions, generator
    if len(unusable) >= NAMED and len(unusable) > bad_limit * seen:
        raise SystemExit(f"{len(unusable)} of {seen} held-out examples are unusable, more than bad_limit {bad_limit} "
                         f"allows: mend them or raise bad_limit. The first is {unusable[0]}")
