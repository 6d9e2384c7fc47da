"""Batches: which examples each iteration sees, how they are loaded, and their random numbers.

The random numbers of iteration i are drawn for the whole batch from (seed, i), and each rank takes its rows of them. So
a run does not depend on how many ranks or accumulation passes share a batch, and a resumed run draws the same numbers.
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

FEW = 50  # held-out examples; with fewer, validation is mostly noise
NAMED = 10  # unusable examples that are named


def order(size, batch_size, seed, start, stop, rows, again=0):
    """Yield batches of example numbers: epoch after epoch, each shuffled anew.

    Position p of this endless sequence depends on (seed, p) alone. rows: the slice of the batch that this rank reads.
    again: added to an example's number in each epoch, so that its crop and flip change; 0: they stay.
    """
    for i in range(start, stop):
        positions = range(i * batch_size + rows.start, i * batch_size + rows.stop)
        yield [epoch * again + shuffled(size, seed, epoch)[k].item()
               for epoch, k in (divmod(position, size) for position in positions)]


def key(seed, number, use):
    """Hash (seed, number) to a generator's seed. use: 0 for the order of an epoch, 1 for the noise of an iteration.

    With a sum in place of the hash, seed 1 in epoch 0 would repeat seed 0 in epoch 1.
    """
    return int(uniforms(seed, [number], 2)[0, use] * 2**53)


@functools.lru_cache(1)
def shuffled(size, seed, epoch):
    """The order of the examples in an epoch, a permutation (size,)."""
    generator = torch.Generator().manual_seed(key(seed, epoch, 0))
    return torch.randperm(size, generator=generator, dtype=torch.int32)  # half the memory of int64


def collate(examples):
    """Images (B, C, H, W), B captions and the faults of examples, (image, caption) or (image, caption, fault or "")."""
    images, captions, *faults = zip(*examples)
    return torch.stack(images), list(captions), [fault for fault in (faults[0] if faults else ()) if fault]


def read_ahead(dataset, batches, workers, **settings):
    """Yield the batches of ReadAhead; the loading processes end with this generator."""
    with ReadAhead(dataset, batches, workers, **settings) as loaded:
        yield from loaded


class Readable:
    """The examples of a data set with token ids: (image, caption, ids (L,), whether they are cut, fault or "").

    An example whose caption the tokenizer refuses is replaced by the next usable one, and the fault says why.
    """

    def __init__(self, dataset, tokenizer, text_len):
        self.dataset, self.tokenizer, self.text_len = dataset, tokenizer, text_len

    def __getitems__(self, numbers):
        return [self.readable(number, *example) for number, example in zip(numbers, self.dataset.__getitems__(numbers))]

    def readable(self, number, image, caption, fault=""):
        """An example with its token ids; or if its caption cannot be read, another one, and what was wrong."""
        size = len(self.dataset)
        for other in attempts(number, size):
            if other != number:
                again = other if hasattr(self.dataset, "runs_on") else other % size
                image, caption, *_ = self.dataset.__getitems__([again])[0]
            cut = self.tokenizer.cut
            try:
                ids = self.tokenizer.encode([caption], self.text_len)[0]
                return image, caption, ids, self.tokenizer.cut - cut, fault
            except Exception as error:  # a tokenizer may raise anything
                fault = fault or f"{self.name(number)}: {error}"
        raise ValueError(f"{ATTEMPTS} examples in a row have no readable caption, the first is {fault}")

    def name(self, number):
        """Where an example is, in words: its number, and for shards the shard."""
        number %= len(self.dataset)
        if not hasattr(self.dataset, "place"):
            return f"example {number}"
        shard, number = self.dataset.place(number)
        return f"example {number} of {self.dataset.paths[shard]}"


def collate_readable(examples):
    """Images (B, C, H, W), B captions, ids (B, L), how many are cut, and the faults, of Readable's examples."""
    images, captions, ids, cut, faults = zip(*examples)
    return torch.stack(images), list(captions), torch.stack(ids), sum(cut), [fault for fault in faults if fault]


def name_faults(faults, what=""):
    """Print a note about each unusable example; what: a word for its kind, such as "held-out ", or ""."""
    for fault in faults:
        tqdm.write(f"note: an unusable {what}example is replaced by another: {fault}", file=sys.stderr)


class Batches:
    """A run's batches from iteration `start` on, dequantised, and with some captions replaced by the null caption.

    A context, at whose end the processes that load data (config's `workers`) end too. ranks: device, rank, world.

    Attributes: rows, this rank's slice of the whole batch; randn, which draws these rows of torch.randn(shape);
    interrupt, the context in which a signal ends the run in order; counts, {"unusable": examples replaced, "cut":
    captions too long} of this rank since `start`; faults, the first ten reasons; words, those of its captions so far;
    waited, the seconds that it has waited for data.
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
        if self.failure and kind is None:  # the failure has ended the run in order
            raise SystemExit(self.failure)

    def load_next(self):
        """Load the next batch, unless the run ends before it."""
        if self.iteration < self.config["max_iters"] and not self.interrupt.asked:
            self.load()

    @property
    def must_end(self):
        """Whether the run has to end without the next batch, because of a signal or a failure of the data.

        All ranks end after the same iteration. __exit__ reports the failure.
        """
        return self.interrupt.asked or bool(self.failure)

    def load(self):
        """Put the next batch into self.ahead, or into self.failure the line that says why there is none."""
        asked_at = time.perf_counter()
        try:
            self.ahead = next(self.loading)
        except (ValueError, OSError) as error:
            self.failure = "" if self.interrupt.asked else str(error)
        self.waited += time.perf_counter() - asked_at

    def __next__(self):
        """images (b, C, H, W), text (b, L), and the generator for all other noise of the whole batch."""
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
        """A rank's tensors split along their rows, one part for each accumulation pass."""
        return zip(*(tensor.chunk(self.passes) for tensor in tensors))


def examine(train_set, val_set, tokenizer, text_len, bad_captions):
    """Remarks on a run's data before it starts, a list of lines.

    Raises ValueError if more than the fraction bad_captions of the captions are cut by text_len or unreadable.
    """
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
    """Yield this rank's part of the first `count` examples: (images, text, captions, generator).

    The generator is the same in every call. Each batch goes to one rank whole, so that sums over ranks do not depend on
    their number. Raises SystemExit if more than the fraction bad_limit of this rank's examples, and at least ten, are
    unusable.
    """
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
                         f"allows: repair them or raise bad_limit. The first is {unusable[0]}")
