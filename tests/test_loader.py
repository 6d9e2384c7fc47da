"""What batches are made of: captions that can be read, and random numbers that do not depend on the other ranks."""
import functools
from dataclasses import asdict, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import toy
from helpers import DISTILL, TRAIN, contents, fails, file_of, png, read_log, run, training_lines
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from toy import DATA, SETTINGS, TINY, Items, Numbers, fit

from beyond import CoupledConfig, CoupledNTM
from fm import FlowMatching
from losses import draw_levels
from model import NTM
from plumbing import rng
from plumbing.images import dequantize
from plumbing.loader import Batches, Readable, order, validation_batches
from plumbing.shards import Shards, write_shard
from plumbing.tokenizer import get_tokenizer

# ---------------------------------------------------------------------------------------------------------------
# Captions that a tokenizer refuses


class Classes(Numbers):
    """A tokenizer that knows the captions of DATA but for those it refuses."""

    refused = ("3",)

    def tokens(self, caption):
        if caption in self.refused:
            raise ValueError(f"caption {caption!r} is no class")
        return super().tokens(caption)

    def encode(self, captions, length):
        for caption in filter(None, captions):
            self.tokens(caption)
        return super().encode(captions, length)


def test_a_shard_of_which_all_captions_are_refused_is_replaced_from_others(tmp_path):
    """Though it holds more examples than are tried in a row."""
    for name, caption, count in ("0.tar", b"a cat", 150), ("1.tar", b"class 3", 350):
        write_shard(tmp_path / "train" / name, [(f"{i}", {"png": png(), "txt": caption}) for i in range(count)])
    examples = Readable(Shards(str(tmp_path), "train", 3, 8, 8), get_tokenizer("classes"), 1)
    loaded = examples.__getitems__([0, 149, 150])
    assert [bool(fault) for *_, fault in loaded] == [True, True, False]
    assert "example 149 of" in loaded[1][-1] and "caption 'a cat' is not a class" in loaded[1][-1]
    assert all(caption == "class 3" and ids.tolist() == [5] for _, caption, ids, _, _ in loaded)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_caption_that_the_tokenizer_refuses_is_replaced_and_named(workers, capsys):
    settings = SETTINGS | {"max_iters": 9, "workers": workers}  # three epochs
    with Batches(DATA, Classes(), 3, settings, 0, (torch.device("cpu"), 0, 1)) as loading:
        seen = torch.cat([next(loading)[1][:, 0] - 2 for _ in range(9)])
    assert sorted(seen.tolist()) == sorted([*range(3), 4, *range(4, 12)] * 3)  # the next one stands in for it
    assert loading.counts["unusable"] == 3 and loading.faults == ["example 3: caption '3' is no class"] * 3
    assert capsys.readouterr().err.count("is replaced by another: example 3: caption '3' is no class") == 3


def test_a_refused_caption_among_the_held_out_is_replaced_and_named(capsys):
    images, text, captions, _ = next(validation_batches(DATA, Classes(), 3, 12, "cpu"))
    assert captions == ["0", "1", "2", "4", *map(str, range(4, 12))] and text[3].tolist() == [6, 6, 6]
    assert (images[3] - DATA[4][0]).abs().max() <= 1 / 256
    assert "an unusable held-out example is replaced by another: example 3: caption '3'" in capsys.readouterr().err
    many = Items(DATA * 10)
    assert len(list(validation_batches(many, Classes(), 3, 120, "cpu", bad_limit=0.1))) == 2  # ten are a twelfth
    with pytest.raises(SystemExit, match="10 of 120 held-out examples are unusable, more than bad_limit 0.05 allows.*"
                                         "The first is example 3"):
        list(validation_batches(many, Classes(), 3, 120, "cpu", bad_limit=0.05))


@pytest.mark.slow
def test_a_run_heeds_bad_limit_for_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(toy, "Numbers", Classes)
    _, path = fit(tmp_path / "few", max_iters=30, bad_limit=0.1)
    assert read_log(path.with_name("log.jsonl"))[-2]["unusable"] == 10  # a twelfth of 120
    with pytest.raises(SystemExit, match=r"10 of 1\d\d examples are unusable, more than bad_limit 0.05.*caption '3'"):
        fit(tmp_path / "many", max_iters=100, bad_limit=0.05)
    monkeypatch.setattr(Classes, "refused", [str(i) for i in range(12)])
    with pytest.raises(SystemExit, match="100.0% are refused, the first because caption '0' is no class; bad_captions"):
        fit(tmp_path / "all")
    with pytest.raises(SystemExit, match="100 examples in a row have no readable caption, the first is example"):
        fit(tmp_path / "all", bad_captions=1.0)


@pytest.mark.slow
def test_captions_of_shards_that_are_no_classes_are_replaced_and_named(tmp_path, capsys):
    """In training and validation, at the first and at a resumed one, by the real programs."""
    for split, count in (("train", 60), ("val", 20)):
        captions = [b"class %d" % (i % 10) if i != 7 else b"a dog" for i in range(count)]
        write_shard(tmp_path / "data" / split / "0.tar", [
            (f"{i:03d}", {"png": png((i, 9, 9), (8, 8)), "txt": caption}) for i, caption in enumerate(captions)])
    settings = [*TRAIN, "--dataset=shards", f"--data_dir={tmp_path / 'data'}", "--image_size=8", "--channels=3",
                "--tokenizer=classes:10", "--text_len=1", f"--out_dir={tmp_path}"]
    run("train.py", *settings, "--max_iters=9", "--batch_size=20", "--workers=1")
    _, printed = run("train.py", *settings, "--max_iters=12", "--batch_size=20", "--resume=yes")
    assert training_lines(tmp_path / "log.jsonl")[-1]["unusable"] == 4  # an epoch is three batches
    assert "val_loss" in read_log(tmp_path / "log.jsonl")[-1] and "interrupted" not in printed
    assert "1.7% are refused, the first because caption 'a dog' is not a class" in printed


@pytest.mark.slow
def test_held_out_captions_that_are_no_classes_end_a_run_above_bad_limit(tmp_path):
    """In one line, after what is trained is saved."""
    for split, known in (("train", 60), ("val", 8)):
        captions = [b"class %d" % (i % 10) if i < known else b"a dog" for i in range(20)]
        write_shard(tmp_path / "data" / split / "0.tar", [
            (f"{i:03d}", {"png": png((i, 9, 9), (8, 8)), "txt": caption}) for i, caption in enumerate(captions)])
    settings = [*TRAIN, "--dataset=shards", f"--data_dir={tmp_path / 'data'}", "--image_size=8", "--channels=3",
                "--tokenizer=classes:10", "--text_len=1", f"--out_dir={tmp_path}", "--val_examples=20"]
    line = fails("train.py", *settings, "--bad_limit=0.5")
    assert "12 of 20 held-out examples are unusable, more than bad_limit 0.5 allows" in line and "'a dog'" in line
    assert contents(tmp_path / "ckpt.pt")["iter"] == 3
    run("train.py", *settings, "--bad_limit=0.7", "--resume=yes")
    assert "12 of 20" in fails("distill.py", *DISTILL, f"--out_dir={tmp_path}", "--bad_limit=0.5", "--val_examples=20")


# ---------------------------------------------------------------------------------------------------------------
# What an example looks like in each epoch


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("refused", [False, True])
def test_crops_flips_and_captions_renew_in_every_epoch_of_a_run(tmp_path, workers, refused):
    """Of an example, and of one that stands in for another whose caption the tokenizer refuses."""
    ramp = Image.fromarray(np.linspace(0, 255, 40).astype(np.uint8)[None].repeat(10, axis=0))
    members = {"png": file_of(ramp), "json": b'{"captions": ["class 1", "class 2"]}'}
    other = {"png": png(), "txt": b"a cat"}
    write_shard(tmp_path / "train" / "0.tar", [("a", other), ("b", members)] if refused else [("a", members)])
    dataset = Shards(str(tmp_path), "train", 1, 10, 10, crop="random", flip=True)
    settings = SETTINGS | {"batch_size": len(dataset), "max_iters": 40, "workers": workers}
    views, captions = [], []
    with Batches(dataset, get_tokenizer("classes"), 1, settings, 0, (torch.device("cpu"), 0, 1)) as loading:
        for _ in range(40):  # epochs
            images, text, _ = next(loading)
            views += images[:, 0, 0].tolist()
            captions += text[:, 0].tolist()
    assert loading.counts["unusable"] == (40 if refused else 0)
    rising = sum(view[0] < view[-1] for view in views)
    assert len(views) / 4 < rising < 3 * len(views) / 4
    assert len({round(min(view), 2) for view in views}) > 10
    assert len(views) / 4 < captions.count(3) < 3 * len(views) / 4 and set(captions) == {3, 4}


@pytest.mark.parametrize("again", [0, 5])
def test_the_numbers_of_examples_run_on_from_epoch_to_epoch(again):
    numbers = sum(order(5, 5, 0, 0, 3, range(5), again), [])
    assert [number - number % 5 for number in numbers] == [again * epoch for epoch in range(3) for _ in range(5)]


# ---------------------------------------------------------------------------------------------------------------
# Noise, of which each rank has its rows
# ---------------------------------------------------------------------------------------------------------------

# of a network, and the settings of train.py for it
FM = FlowMatching(TINY), {"pairs": False}
TRAJECTORIES = NTM(TINY), {"pairs": False}
PAIRS = NTM(TINY), {"pairs": True}
SEVERAL_T = NTM(replace(TINY, steps=(2, 4))), {"pairs": True}
COUPLED = CoupledNTM(CoupledConfig(**asdict(TINY) | {"first_noise": 0.3, "parametrization": "posterior",
                                                     "transporter_blocks": 0})), {"pairs": True}


def drawn_by(network, settings, rows, batch=8):
    """The levels that a rank with these rows of the whole batch learns from."""
    config = network.config
    text = torch.ones(batch, config.text_len, dtype=torch.long)
    images = torch.linspace(-1, 1, batch)[:, None, None, None].expand(batch, config.channels, *config.image_size)
    generator = torch.Generator().manual_seed(5)
    batches = SimpleNamespace(rows=rows, randn=functools.partial(rng.randn, rows=rows))
    config = {"batch_size": batch, "max_t_min": 0.05} | settings
    noised = getattr(network, "noised_pairs", getattr(network, "noised", None))
    levels = draw_levels(network, noised, images[rows], text[rows], config, batches, generator)
    return *levels, torch.rand(8, generator=generator)  # and what comes after it


@pytest.mark.parametrize("piece", [16, 48, 2**22])
@pytest.mark.parametrize("shape", [(4, 3), (7, 5, 3), (5,), (16,), (12, 2, 2, 3), (31, 1)])
def test_noise_of_some_rows_is_that_of_the_whole_batch(monkeypatch, piece, shape):
    """Bit for bit, on a CPU, and what is drawn after it."""
    monkeypatch.setattr(rng, "PIECE", piece)
    generator = lambda: torch.Generator().manual_seed(3)
    whole, bits = torch.randn(shape, generator=generator()), generator()
    random = torch.randint(2**16, shape, generator=bits, dtype=torch.float32)
    after = torch.rand(3, generator=bits)
    for rows in (slice(None), slice(0, 2), slice(1, 3), slice(2, 4)):
        assert torch.equal(rng.randn(shape, rows, generator()), whole[rows])
        again = generator()
        assert torch.equal(rng.drawn(lambda t: t.random_(2**16, generator=again), shape, rows), random[rows])
        assert torch.equal(torch.rand(3, generator=again), after)


@pytest.mark.parametrize("way", [FM, TRAJECTORIES, PAIRS, SEVERAL_T, COUPLED],
                         ids=["fm", "trajectories", "pairs", "several T", "coupled"])
def test_a_rank_draws_the_same_randomness_as_all_of_them(way):
    *whole, after = drawn_by(*way, rows=slice(None))
    parts = []
    for first in range(0, 8, 2):
        *part, after_part = drawn_by(*way, rows=slice(first, first + 2))
        parts.append(part)
        assert torch.equal(after_part, after)
    assert len(whole[-1].unique(dim=0)) == 8  # no two examples have the same noise
    for together, apart in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(together, torch.cat(apart))


@pytest.mark.parametrize("way", [FM, PAIRS], ids=["fm", "pairs"])
def test_a_rank_has_no_memory_of_the_others_noise(way):
    """32 images of 256x256 pixels on one of eight ranks: 6 MB of noise of pixels, and 12 MB of a pair's, at a time."""
    largest = []

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            largest.append(made.untyped_storage().nbytes() if isinstance(made, torch.Tensor) else 0)
            return made

    of_tiny, settings = way
    network = type(of_tiny)(replace(TINY, image_size=256, channels=3, patch_size=16))
    with Largest():
        drawn_by(network, settings, slice(4, 8), batch=32)
        dequantize(torch.zeros(4, 3, 256, 256), torch.Generator(), 32, slice(4, 8))
    assert max(largest) < 2**24 + 100  # bytes, of the 25 MB that all have
