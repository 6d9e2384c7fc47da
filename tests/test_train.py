"""The training loop keeps its promises: order, schedule, randomness, skipped updates, interruption, and checkpoints."""
import contextlib
import errno
import itertools
import json
import math
import multiprocessing
import os
import signal
import time
from dataclasses import asdict

import pytest
import torch
import toy
from helpers import (DISTILL, SHORT, SMALL, TRAIN, contents, load, read_log, read_log_without_speed, run, same,
                     same_training, training_lines)
from tiny import levels_of, make_images, make_model, make_text
from torch import nn
from toy import DATA, SETTINGS, TINY, Items, Numbers, Toy, end_by, fit, squares

import data
import train
from losses import TrainingLoss, losses_of_batch
from model import NTM, Denoiser
from networks import NETWORKS
from plumbing import checkpoint, images, optim, runtime
from plumbing.loader import Batches, examine, key, order, validation_batches
from plumbing.log import Log
from plumbing.optim import learning_rate, make_optimizers
from plumbing.pace import Pace
from plumbing.tokenizer import NULL, PAD
from plumbing.workers import leave_signals_to_the_trainer


def record(out_dir, **settings):
    """What the objective was given in every iteration: [(images, text, draws), ...]."""
    seen = []

    def objective(network, images, text, draws):
        seen.append((images, text, *draws))
        return squares(network, images, text, draws)

    fit(out_dir, objective, **settings)
    passes = settings.get("grad_accum", 1)
    return [tuple(map(torch.cat, zip(*seen[i:i + passes]))) for i in range(0, len(seen), passes)]


# ---------------------------------------------------------------------------------------------------------------
# Which examples, and what is random about them


def batches(size=10, batch_size=4, seed=0, start=0, stop=25, rows=None):
    return list(order(size, batch_size, seed, start, stop, rows or range(batch_size)))


def test_every_epoch_has_each_example_once():
    drawn = batches()
    assert len(drawn) == 25
    sequence = sum(drawn, [])
    epochs = [sequence[i:i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 10  # each shuffled anew


def test_data_workers_outlive_what_interrupts_the_trainer():
    """A terminal's Ctrl-C reaches them too."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        leave_signals_to_the_trainer()
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_batch_larger_than_the_data_set():
    assert sorted(batches(size=3, batch_size=6, stop=1)[0]) == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_share_the_batches_of_one_process(world):
    share = 4 // world
    ranks = [batches(rows=range(r * share, (r + 1) * share)) for r in range(world)]
    assert [sum(rows, []) for rows in zip(*ranks)] == batches()


@pytest.mark.parametrize("start", [1, 7, 24])  # inside an epoch, and across its end
def test_order_continues_where_it_was(start):
    assert batches(start=start) == batches()[start:]


def test_order_follows_the_seed():
    assert batches(seed=1) == batches(seed=1) != batches(seed=2)


def test_seeds_have_no_epoch_and_no_noise_in_common():
    epochs = {tuple(sum(batches(10, 10, seed, epoch, epoch + 1), [])) for seed in range(30) for epoch in range(30)}
    assert len(epochs) == 900  # seed + epoch would make 59
    keys = {key(seed, number, use) & (2**32 - 1) for seed, number in (  # which is what a generator on CPU looks at
        (0, 0), (0, 1), (1, 0), (1, 1), (0, 1_000_003), (4295, 0), (0, 45_589), (2**31 - 1, 10**9)) for use in (0, 1)}
    assert len(keys) == 16
    for seed in (-1, 2**40):
        assert sorted(batches(3, 3, seed, stop=1)[0]) == [0, 1, 2]


def test_words_and_the_first_faults_of_batches_are_kept():
    class Spoilt(Items):
        runs_on = True

        def __getitems__(self, numbers):
            return [(*self[number % len(self)], f"fault {number}") for number in numbers]

    dataset = Spoilt((image, f"The {word}-Cat, {caption}") for (image, caption), word in zip(DATA, "abcdefghijkl"))
    settings = SETTINGS | {"text_len": 4, "max_iters": 6}
    with Batches(dataset, data.get_tokenizer(), 4, settings, 0, (torch.device("cpu"), 0, 1)) as loading:
        next(loading)
        assert len(loading.words) == 5 and loading.words < {"the", *(f"{letter}-cat" for letter in "abcdefghijkl")}
        for _ in range(5):
            next(loading)
    assert len(loading.words) == 13 and loading.counts["unusable"] == 24
    assert len(loading.faults) == 10 and loading.faults[0].startswith("fault ")


@pytest.mark.slow
def test_what_is_wrong_with_the_data_is_said_before_a_run_starts(tmp_path, capsys):
    fit(tmp_path / "few")
    said = capsys.readouterr().out
    assert "12 examples are held out, fewer than 50" in said and "captions" not in said
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Numbers, "tokens", lambda self, caption: [5] * 8)
        with pytest.raises(SystemExit, match="100.0% are longer than text_len 3 and cut .text_len 8 would hold 99%.; bad"):
            fit(tmp_path / "long")
        fit(tmp_path / "all_the_same", bad_captions=1.0)


def test_built_in_data_sets_pass_with_the_settings_of_their_configs():
    for name, size, channels, text_len in (("digits", 8, 1, 4), ("shapes", 16, 3, 8)):
        sets = [data.get_dataset(name, split, size, channels) for split in ("train", "val")]
        assert list(sets[0].captions(range(0, 900, 7))) == [sets[0][i][1] for i in range(0, 900, 7)]
        assert examine(*sets, data.get_tokenizer(), text_len, 0.0) == []
    assert examine(*sets, data.get_tokenizer("emoji"), 16, 0.0) == []


def test_pixels_stay_in_their_bins_and_noise_is_new_each_iteration(tmp_path):
    seen = record(tmp_path, batch_size=12, max_iters=20)  # the whole data set, twenty times
    offsets = []
    for images, text, _ in seen:
        items = text[:, 0] - 2
        assert sorted(items.tolist()) == list(range(12))
        offsets.append(images[items.argsort()] - torch.stack([image for image, _ in DATA]))
    offsets = torch.stack(offsets) * 128  # in bins
    assert offsets.abs().max() <= 0.5
    assert offsets.std() == pytest.approx(12**-0.5, abs=0.02)
    assert offsets.flatten(1).unique(dim=0).shape[0] == 20


@pytest.mark.slow
def test_share_of_null_captions(tmp_path):
    for share in (0.0, 0.25, 1.0):
        seen = record(tmp_path / str(share), caption_dropout=share, max_iters=200)
        text = torch.cat([text for _, text, _ in seen])
        null = (text == torch.tensor([NULL, PAD, PAD])).all(dim=1)
        assert (text[~null] == text[~null][:, :1]).all() and (text[~null] >= 2).all()  # the others are whole
        assert null.float().mean() == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 800))


def test_randomness_is_of_seed_and_iteration(tmp_path):
    whole = record(tmp_path / "a", caption_dropout=0.5)
    assert same(whole, record(tmp_path / "b", caption_dropout=0.5))
    assert same(whole, record(tmp_path / "c", caption_dropout=0.5, grad_accum=2))  # however the batch is cut
    assert not same(whole[0], whole[3])  # the same examples, three iterations of four being an epoch
    other = record(tmp_path / "d", caption_dropout=0.5, seed=1)
    assert not any(same(a[k], b[k]) for a, b in zip(whole, other) for k in range(3))


def test_validation_batches_do_not_depend_on_ranks():
    dataset, tokenizer = data.get_dataset("digits", "val", 8, 1), data.get_tokenizer()

    def validation(count, rank=0, world=1):
        return [(images, text, captions, torch.randn(3, generator=generator)) for images, text, captions, generator
                in validation_batches(dataset, tokenizer, 4, count, "cpu", rank, world, batch_size=20)]

    alone = validation(90)
    assert [len(images) for images, *_ in alone] == [20, 20, 20, 20, 10]
    assert same(alone, validation(90))  # the same noise every time
    ranks = [validation(90, rank, 2) for rank in range(2)]
    assert same(alone[0::2], ranks[0]) and same(alone[1::2], ranks[1])
    items = [dataset[i] for i in range(90)]
    assert sum((captions for _, _, captions, _ in alone), []) == [caption for _, caption in items]
    offsets = torch.cat([images for images, *_ in alone]) - torch.stack([image for image, _ in items])
    assert offsets.abs().max() <= 1 / 256 and offsets.flatten(1).unique(dim=0).shape[0] == 90
    assert sum(len(images) for images, *_ in validation(10_000)) == len(dataset)


# ---------------------------------------------------------------------------------------------------------------
# The update


def test_learning_rate_warms_up_and_falls_as_a_cosine():
    config = dict(lr=1.0, min_lr=0.2, warmup_iters=10, max_iters=110)
    rates = [learning_rate(config, i) for i in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == 1.0 and rates[110] == pytest.approx(0.2)
    assert rates[60] == pytest.approx(0.6) and rates[35] == pytest.approx(0.2 + 0.8 * (1 + 0.5**0.5) / 2)
    assert all(a > b for a, b in zip(rates[10:], rates[11:]))
    assert learning_rate(config | {"warmup_iters": 0}, 0) == 1.0


def test_average_forgets_the_first_iterations_faster():
    ema, model = nn.Linear(2, 2), nn.Linear(2, 2)
    for i, decay in ((0, 1 / 10), (5, 6 / 15), (89, 0.9), (1000, 0.9)):
        expected = [decay * a + (1 - decay) * b for a, b in zip(ema.parameters(), model.parameters())]
        optim.update_average(ema, model, 0.9, i)
        torch.testing.assert_close(list(ema.parameters()), expected)


def test_update_is_adamw_with_clipped_gradients(tmp_path):
    model, path = fit(tmp_path, max_iters=8, grad_clip=0.1)
    lines = read_log(path.with_name("log.jsonl"))
    other = Toy()
    average = other.weight.detach().clone()
    optimizer = torch.optim.AdamW(other.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for i, given in enumerate(record(tmp_path / "again", max_iters=8)):
        loss = squares(other, given[0], given[1], given[2:])
        loss.backward()
        norm = other.weight.grad.norm()
        other.weight.grad *= min(1, 0.1 / norm)
        optimizer.param_groups[0]["lr"] = learning_rate(SETTINGS | {"max_iters": 8}, i)
        optimizer.step()
        optimizer.zero_grad()
        average.lerp_(other.weight.detach(), 1 - min(0.9, (1 + i) / (10 + i)))
        assert lines[i]["iter"] == i + 1 and lines[i]["lr"] == optimizer.param_groups[0]["lr"]
        assert [lines[i]["loss"], lines[i]["grad_norm"]] == pytest.approx([loss.item(), norm.item()], rel=1e-5)
    torch.testing.assert_close(model.weight, other.weight)
    torch.testing.assert_close(contents(path)["ema"]["weight"], average)


def test_two_steps_of_adamw():
    """Of a weight with gradients 1 and 3. Step 1: m = 0.1 / (1 - 0.9) = 1, v = 0.05 / (1 - 0.95) = 1. Step 2:
    m = (0.09 + 0.3) / (1 - 0.81) = 2.052632, v = (0.0475 + 0.45) / (1 - 0.9025) = 5.102564."""
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizers = make_optimizers(model, "adamw", 0.0, torch.device("cpu"))
    for gradient in (1.0, 3.0):
        model.weight.grad = torch.full((1, 1), gradient)
        optim.update_weights(optimizers, 0.5)
    assert model.weight.item() == pytest.approx(-0.5 * (1 + 2.052632 / 5.102564**0.5), rel=1e-5)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has no Muon before 2.9")
def test_muon_does_as_torchs(bfloat16):
    ours, theirs = NTM(TINY), NTM(TINY)
    theirs.load_state_dict(ours.state_dict())
    muon, _ = make_optimizers(ours, "muon", 0.1, torch.device("cpu"), bfloat16)
    names = [name for name, p in ours.named_parameters() if any(p is q for q in muon.param_groups[0]["params"])]
    copies = [dict(theirs.named_parameters())[name] for name in names]
    other = torch.optim.Muon(copies, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for matrix, copied in zip(muon.param_groups[0]["params"], copies):
            matrix.grad = torch.randn(matrix.shape)
            copied.grad = matrix.grad.clone()
        before = [matrix.detach().clone() for matrix in copies]
        optim.update_weights([muon, other], 0.01)
        for name, matrix, copied, old in zip(names, muon.param_groups[0]["params"], copies, before):
            difference = (matrix - copied).norm() / (copied - old).norm()
            assert difference < (0.1 if bfloat16 else 0.05), name  # of an update: torch computes in bfloat16
            copied.data.copy_(matrix)


def test_muon_moves_every_matrix_by_a_fifth_of_the_learning_rate():
    """As AdamW about does, so that one learning rate serves both: an orthogonal (m, n) matrix has the root mean square
    max(m, n)^-1/2, and is scaled by 0.2 max(m, n)^1/2. Muon orthogonalises only roughly."""
    model = NTM(TINY)
    muon, _ = make_optimizers(model, "muon", 0.0, torch.device("cpu"))
    matrices = muon.param_groups[0]["params"]
    before = [matrix.detach().clone() for matrix in matrices]
    for matrix in matrices:
        matrix.grad = torch.randn(matrix.shape)
    optim.update_weights([muon], 0.01)
    for matrix, old in zip(matrices, before):
        assert (matrix - old).square().mean().sqrt().item() == pytest.approx(0.002, rel=0.3), matrix.shape


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_weight_has_one_optimizer(name):
    model = NTM(TINY)
    optimizers = make_optimizers(model, name, 0.07, torch.device("cpu"))
    groups = [[p for group in optimizer.param_groups for p in group["params"]] for optimizer in optimizers]
    assert sorted(map(id, sum(groups, []))) == sorted(map(id, model.parameters()))
    assert all(group["weight_decay"] == 0.07 for optimizer in optimizers for group in optimizer.param_groups)
    names = [type(optimizer).__name__ for optimizer in optimizers]
    assert names == {"adamw": ["AdamW"], "muon": ["Muon", "AdamW"]}[name]
    if name == "muon":  # four matrices in each of the two layers
        assert sorted(p.shape for p in groups[0]) == sorted([(24, 8), (8, 8), (32, 8), (8, 32)] * 2)


def test_words_have_a_learning_rate_of_their_own():
    model = NTM(TINY)
    words = model.predictor.trunk.embed.weight
    optimizers = make_optimizers(model, "muon", 0.0, torch.device("cpu"), words_lr=25.0)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optim.update_weights(optimizers, 1e-3)  # AdamW's first step has the size of its rate
    torch.testing.assert_close(before["predictor.trunk.embed.weight"] - words, torch.full_like(words, 0.025))
    bias = model.predictor.head.bias
    torch.testing.assert_close(before["predictor.head.bias"] - bias, torch.full_like(bias, 0.001))


def test_resuming_keeps_what_optimizers_gathered_but_not_their_rates(tmp_path):
    model, path = NTM(TINY), tmp_path / "ckpt.pt"
    before = make_optimizers(model, "muon", 0.07, torch.device("cpu"), words_lr=25.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optim.update_weights(before, 1e-3)
    checkpoint.save(path, kind="ntm", model=model, ema=model, optimizers=before, settings={})
    held, after = checkpoint.load(path, "ntm"), make_optimizers(model, "muon", 0.01, torch.device("cpu"), words_lr=3.0)
    checkpoint.resume(held, path, model, model, after, {})
    assert after[1].param_groups[1]["factor"] == 3.0 and after[0].param_groups[0]["weight_decay"] == 0.01
    for old, new in zip(before, after):
        assert all(same(old.state[parameter], new.state[parameter]) for parameter in old.state)
    first, second = held["optimizers"][1]["param_groups"]
    held["optimizers"][1]["param_groups"] = [first | {"params": first["params"] + second["params"]}]
    with pytest.raises(ValueError, match="ckpt.pt groups its weights as another version did"):
        checkpoint.resume(held, path, model, model, after, {})


def test_every_network_that_samples_can_be_passed_on():
    """plumbing imports nothing of the root, so that it lists the kinds of networks.py once more."""
    assert set(checkpoint.KINDS) == {*NETWORKS, "denoiser"}


def test_optimizer_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="'sgd' is unknown: choose 'adamw' or 'muon'"):
        make_optimizers(Toy(), "sgd", 0.1, torch.device("cpu"))


def test_accumulated_gradients_are_those_of_the_whole_batch(tmp_path):
    (whole, _), (parts, _) = fit(tmp_path / "1"), fit(tmp_path / "4", grad_accum=4)
    torch.testing.assert_close(parts.weight, whole.weight)
    logs = [training_lines(tmp_path / name / "log.jsonl") for name in "14"]
    for a, b in zip(*logs, strict=True):
        assert [a["loss"], a["grad_norm"]] == pytest.approx([b["loss"], b["grad_norm"]], rel=1e-5)


def test_validation_sees_the_averaged_weights_every_interval(tmp_path):
    seen = []

    def validate(ema, i):
        assert not ema.training and not any(p.requires_grad for p in ema.parameters())
        seen.append((i, ema.weight.clone()))
        return {"val_loss": float(i)}

    model, path = fit(tmp_path, validate=validate, max_iters=7, val_interval=3)
    assert [i for i, _ in seen] == [3, 6, 7]  # and at the end
    assert torch.equal(seen[-1][1], contents(path)["ema"]["weight"])
    assert not torch.equal(seen[-1][1], model.weight)
    lines = [line for line in read_log(path.with_name("log.jsonl")) if "val_loss" in line]
    assert lines == [{"iter": i, "val_loss": float(i)} for i in (3, 6, 7)]


def test_validation_weighs_all_examples_alike(monkeypatch):
    """Of 16 pixels each, in batches of three and of one, at most two at once."""
    model, ts = NTM(TINY), torch.tensor([0.02, 0.5, 1.0])
    asked = []

    def bound(x, ts, text):
        assert len(x) <= 2 and x.shape[1:] == (3, 4, 4) and not torch.is_grad_enabled()
        nats = text[:, 0].float()
        return torch.stack([16 * nats, 32 * nats, nats], dim=1), 80 * nats  # two steps and the prior; their bound

    monkeypatch.setattr(model, "trajectory_bound", bound)
    monkeypatch.setattr(train, "examples_at_once", lambda *args, **kwargs: asked.append((args[1:], kwargs)) or 2)
    batches = [(torch.zeros(n, 1, 4, 4), torch.full((n, 2), value), None, None) for n, value in ((3, 1), (1, 5))]
    found = train.validate(model, batches, ts, {"bfloat16": None, "chunk": 0})
    assert found == pytest.approx({"val_step_0": 2, "val_step_1": 4, "val_loss": 3, "val_bound": 10})
    assert asked[0] == ((2,), {"gradients": False})


# ---------------------------------------------------------------------------------------------------------------
# Updates that are not finite


def spoiled(kind, iterations):
    """An objective whose loss, gradient or both are not finite in some iterations (counted from 1)."""
    count = itertools.count(1)

    def objective(*args):
        loss = squares(*args)
        if next(count) not in iterations:
            return loss
        if kind == "gradient":
            loss.register_hook(lambda gradient: gradient * math.inf)
            return loss
        return loss + math.inf if kind == "loss" else loss * math.nan

    return objective


@pytest.mark.parametrize("kind", ["loss", "gradient", "both"])
def test_update_that_is_not_finite_is_skipped(tmp_path, kind):
    states, objective = [], spoiled(kind, {3})

    def validate(ema, i):  # called once the checkpoint of iteration i is written
        states.append(contents(tmp_path / "ckpt.pt"))
        return {}

    fit(tmp_path, objective, validate, val_interval=1)
    assert [state["iter"] for state in states] == [1, 2, 3, 4, 5, 6]
    for key in ("model", "ema"):
        changes = [not same(a[key], b[key]) for a, b in zip(states, states[1:])]
        assert changes == [True, False, True, True, True], key
    assert same(states[1]["optimizers"][0]["state"], states[2]["optimizers"][0]["state"])
    assert all(t.isfinite().all() for state in states for t in (state["model"]["weight"], state["ema"]["weight"]))
    assert [line["skipped"] for line in training_lines(tmp_path / "log.jsonl")] == [0, 0, 1, 1, 1, 1]
    assert "NaN" not in (tmp_path / "log.jsonl").read_text()  # which JSON does not have


def test_nine_skipped_updates_in_a_row_are_survived(tmp_path):
    bad = {*range(2, 11), *range(12, 21)}
    model, path = fit(tmp_path, spoiled("both", bad), max_iters=22)
    assert model.weight.isfinite().all()
    assert training_lines(path.with_name("log.jsonl"))[-1]["skipped"] == 18


@pytest.mark.parametrize("kind", ["loss", "gradient", "both"])
def test_ten_skipped_updates_in_a_row_end_the_run(tmp_path, kind):
    _, path = fit(tmp_path, max_iters=4)
    before = path.read_bytes()
    with pytest.raises(SystemExit) as error:
        fit(tmp_path, spoiled(kind, range(100)), max_iters=100, resume="yes")
    message = error.value.code
    for part in ("not finite 10 times", "iteration 14", str(path), "lower lr", "warmup_iters"):
        assert part in message
    assert "\n" not in message
    assert path.read_bytes() == before
    assert read_log(path.with_name("log.jsonl"))[-1]["skipped"] == 10


# ---------------------------------------------------------------------------------------------------------------
# Interruption and resumption


def interrupted(number, iteration):
    """An objective during which the process gets a signal."""
    count = itertools.count(1)

    def objective(*args):
        if next(count) == iteration:
            signal.raise_signal(number)
        return squares(*args)

    return objective


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("iteration", [1, 5, 6])  # the first, in the middle, and where it validates
def test_interrupted_and_resumed_is_uninterrupted(tmp_path, capsys, number, iteration):
    settings = dict(max_iters=9, val_interval=6, caption_dropout=0.5)
    _, whole = fit(tmp_path / "whole", **settings)
    capsys.readouterr()
    path = tmp_path / "parts" / "ckpt.pt"
    with end_by(number):
        fit(tmp_path / "parts", interrupted(number, iteration), **settings)
    assert contents(path)["iter"] == iteration
    assert f"{path} holds iteration {iteration}; continue with --resume=yes" in capsys.readouterr().out
    fit(tmp_path / "parts", resume="yes", **settings)
    assert same_training(path, whole) and contents(path)["iter"] == 9
    logs = [read_log_without_speed(p.with_name("log.jsonl")) for p in (path, whole)]
    assert logs[0] == logs[1]
    assert [line["iter"] for line in logs[0]] == [1, 2, 3, 4, 5, 6, 6, 7, 8, 9, 9]


def test_interrupted_in_its_last_iteration_is_done(tmp_path, capsys):
    _, path = fit(tmp_path, interrupted(signal.SIGTERM, 6))
    assert contents(path)["iter"] == 6 and "interrupted" not in capsys.readouterr().out


def test_second_ctrl_c_ends_at_once(tmp_path):
    def objective(*args):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        fit(tmp_path, objective)
    assert not (tmp_path / "ckpt.pt").exists()


@pytest.mark.parametrize("end, error", [(lambda: None, contextlib.nullcontext()),
                                        (lambda: signal.raise_signal(signal.SIGTERM), contextlib.nullcontext()),
                                        (lambda: 1 / 0, pytest.raises(ZeroDivisionError))])
def test_workers_and_signal_handlers_end_with_the_run(tmp_path, end, error):
    """Even while somebody still holds the error, and with it the frames that it passed through."""
    def objective(*args):
        assert len(multiprocessing.active_children()) == 2
        end()
        return squares(*args)

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with error as held:
        fit(tmp_path, objective, workers=2, max_iters=2)
    assert not multiprocessing.active_children(), held
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_killed_run_resumes_from_its_last_checkpoint(tmp_path):
    """Killed without warning: the log is ahead of the checkpoint, and its last line is half written."""
    _, whole = fit(tmp_path / "whole", max_iters=8, val_interval=3)

    count = itertools.count(1)

    def killed(*args):
        if next(count) == 6:
            raise RuntimeError("killed")
        return squares(*args)

    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path / "parts", killed, max_iters=8, val_interval=3)
    log = tmp_path / "parts" / "log.jsonl"
    assert read_log(log)[-1]["iter"] == 5
    log.write_text(log.read_text() + '{"iter": 6, "lo')
    _, path = fit(tmp_path / "parts", max_iters=8, val_interval=3, resume="yes")
    assert same_training(path, whole)
    assert read_log_without_speed(log) == read_log_without_speed(whole.with_name("log.jsonl"))


def test_log_drops_what_comes_after_the_checkpoint(tmp_path):
    path = tmp_path / "new" / "log.jsonl"
    lines = [json.dumps({"iter": i}) + "\n" for i in range(1, 6)]
    log = Log(path, 0, SETTINGS)
    for i in range(1, 6):
        log.write(iter=i)
    assert path.read_text() == "".join(lines)
    path.write_text("".join(lines) + '{"iter": 2')
    Log(path, 3, SETTINGS)
    assert path.read_text() == "".join(lines[:3])
    Log(path, 0, SETTINGS)
    assert path.read_text() == ""


def test_auto_starts_and_then_resumes(tmp_path):
    _, whole = fit(tmp_path / "whole", max_iters=6)
    fit(tmp_path / "parts", interrupted(signal.SIGTERM, 2), resume="auto")
    _, path = fit(tmp_path / "parts", resume="auto")
    assert same_training(path, whole)


def test_finished_run_is_left_alone(tmp_path):
    _, path = fit(tmp_path)
    before = path.read_bytes(), path.with_name("log.jsonl").read_bytes()
    fit(tmp_path, resume="yes")
    assert (path.read_bytes(), path.with_name("log.jsonl").read_bytes()) == before


def test_a_run_that_has_nothing_to_do_says_so(tmp_path, capsys):
    fit(tmp_path)
    assert "nothing to do" not in "".join(capsys.readouterr())
    _, path = fit(tmp_path, resume="auto", max_iters=5)
    assert f"nothing to do: {path} holds iteration 6, and max_iters is 5" in "".join(capsys.readouterr())


def test_a_sheet_that_fails_is_a_warning(tmp_path, monkeypatch, capsys):
    """Whatever it was: the run goes on, validates, and leaves its checkpoint."""
    _, whole = fit(tmp_path / "whole")
    monkeypatch.setattr(toy, "sample_sheet", lambda *_: torch.empty(1).view(7))
    _, path = fit(tmp_path / "run")
    printed = "".join(capsys.readouterr())
    assert "warning: there is no sheet of samples of iteration 6: shape '[7]' is invalid" in printed
    assert same_training(path, whole)
    assert "val_loss" in read_log(path.with_name("log.jsonl"))[-1]


def test_speed_and_waiting_are_those_since_the_line_before(tmp_path, monkeypatch):
    """On a clock on which to load a batch of 4 takes three seconds, or six from the third on, and an update one."""
    now, loads = [0.0], itertools.count(1)

    class Slow(Items):
        def __getitems__(self, numbers):
            now[0] += 3 if next(loads) <= 3 else 6
            return super().__getitems__(numbers)

    def objective(*args):
        now[0] += 1
        return squares(*args)

    monkeypatch.setattr(toy, "DATA", Slow(DATA))
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    _, path = fit(tmp_path, objective, max_iters=6, save_minutes=0.0)
    lines = training_lines(path.with_name("log.jsonl"))[1:5]  # after the first, which waits for two batches
    assert [line["data_wait"] for line in lines] == [0.75, 0.857, 0.857, 0.857]
    assert [line["images_per_s"] for line in lines] == [1.0, 0.6, 0.6, 0.6]


def paced(monkeypatch, seconds, durations):
    """max_iters of a run of so many seconds whose updates take these durations, and the time when it is known."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    config = {"minutes": seconds / 60, "max_iters": 5}
    pace = Pace(config)
    for done, duration in enumerate(durations, 1):
        now[0] += duration
        if pace.updated(done):
            return config, now[0] - 100
    return config, None


@pytest.mark.parametrize("update, known_by", [(0.1, 30), (1.0, 60), (20.0, 200)])
def test_iterations_follow_from_the_speed_of_the_first_updates(monkeypatch, update, known_by):
    durations = [20, *[update] * 1000]  # the first waits for compilation
    config, known = paced(monkeypatch, 200, durations)
    ends = 20 + (config["max_iters"] - 1) * update
    assert known <= known_by and config["minutes"] == 0
    assert ends == pytest.approx(200, abs=update + 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("script, settings, name", [("train.py", TRAIN, ""), ("distill.py", DISTILL, "denoiser")])
def test_a_run_of_so_many_minutes_ends_with_its_schedule(copied, tmp_path, script, settings, name):
    out = copied if name else tmp_path / "new"
    for path in out.glob("denoiser*"):
        path.unlink()
    _, printed = run(script, *settings, f"--out_dir={out}", "--val_interval=1000000", "--minutes=0.02")
    saved = contents(out / f"{name or 'ckpt'}.pt")
    iterations = saved["iter"]
    assert iterations > 8 and f"{iterations} iterations fit into 0.02 minutes" in printed
    assert saved["settings"]["max_iters"] == iterations and saved["settings"]["minutes"] == 0  # so it is resumed to there
    *_, last = training_lines(out / f"{name}_log.jsonl" if name else out / "log.jsonl")
    assert last["iter"] == iterations and last["lr"] < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("script, settings", [("train.py", TRAIN), ("distill.py", DISTILL),
                                              ("train.py", [*SHORT, *SMALL, "--shift=1", "--objective=fm"])])
def test_sheets_while_training_have_no_guidance(copied, tmp_path, monkeypatch, script, settings):
    """They show what the averaged weights sample for held-out captions: with guidance they would be other images."""
    shown, sheet = [], images.contact_sheet
    monkeypatch.setattr(images, "contact_sheet", lambda found, captions: shown.append(found) or sheet(found, captions))
    out = copied if script == "distill.py" else tmp_path / "new"
    (copied / "denoiser.pt").unlink()
    run(script, *settings, f"--out_dir={out}", "--max_iters=20", "--val_interval=20", "--lr=1e-2")
    held_out = data.get_dataset("digits", "val", 8, 1), data.get_tokenizer("captions"), 4
    _, text, _, generator = next(validation_batches(*held_out, 4, "cpu", batch_size=4))
    kind = "fm" if "--objective=fm" in settings else "ntm"
    network = load(out, kind)
    if kind == "fm":
        ts = torch.linspace(0, 1, 51)
    else:
        ts = network.config.time_grid(0.03 if script == "distill.py" else 0.02)
    expected = {}
    for guidance in (0.0, 1.0):
        same_noise = torch.Generator()
        same_noise.set_state(generator.get_state())
        u = network.sample(text, ts, guidance, same_noise)
        if script == "distill.py":
            tokens = load(out, "denoiser")(u[:, 0], text)
        elif kind == "ntm":
            tokens = network.score_denoise(network.invert(u, ts), ts.expand(4, -1), text)
        else:
            tokens = u[:, 0]
        expected[guidance] = network.unpatchify(tokens)
    torch.testing.assert_close(shown[-1], expected[0.0], atol=1e-4, rtol=1e-4)
    assert (expected[1.0] - expected[0.0]).abs().max() > 1e-2


@pytest.mark.parametrize("seen", [[True, False], [False, True]])
@pytest.mark.parametrize("resume", checkpoint.RESUME)
def test_a_checkpoint_that_not_all_ranks_see(tmp_path, monkeypatch, seen, resume):
    """Else some would go on and others start anew; and all of them are asked, or those that ask would wait for ever."""
    asked = []
    monkeypatch.setattr(checkpoint, "gathered", lambda mine: asked.append(mine) or [(here, 0) for here in seen])
    with pytest.raises(ValueError, match="ckpt.pt is seen by some ranks only"):
        checkpoint.find_resumable(resume, tmp_path / "ckpt.pt", "ntm")
    assert asked == [(False, 0)]


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints


def half_written(error):
    def save(contents, file):
        file.write(b"half of a checkpoint")
        raise error
    return save


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("unexpected pos 64")])
def test_failed_write_keeps_the_old_checkpoint(tmp_path, monkeypatch, error):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, kind="ntm", iter=1)
    before = path.read_bytes()
    monkeypatch.setattr(torch, "save", half_written(error))
    with pytest.raises(SystemExit) as stop:
        checkpoint.save(path, kind="ntm", iter=2)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["ckpt.pt"]
    message = str(stop.value)
    assert str(path) in message and "the one before it is kept" in message and "\n" not in message


def test_failed_first_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "save", half_written(OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(SystemExit) as stop:
        checkpoint.save(tmp_path / "ckpt.pt", kind="ntm")
    assert os.listdir(tmp_path) == []
    assert "No space left on device" in str(stop.value) and "kept" not in str(stop.value)


@pytest.mark.parametrize("network", [NTM, Denoiser])
def test_checkpoint_brings_the_averaged_network_back(tmp_path, network):
    kind = {NTM: "ntm", Denoiser: "denoiser"}[network]
    model, ema = network(TINY), network(TINY)
    checkpoint.save(tmp_path / "x.pt", kind=kind, model=model, ema=ema)
    restored, held = checkpoint.load_network(tmp_path / "x.pt", {kind: network})
    assert held["kind"] == kind
    assert type(restored) is network and restored.config == TINY and not restored.training
    assert same(dict(restored.state_dict()), dict(ema.state_dict()))
    assert not any(p.requires_grad for p in restored.parameters())


def refused(path, kind="ntm"):
    """The one line that says why a checkpoint is not taken."""
    with pytest.raises(ValueError) as stop:
        checkpoint.load(path, kind)
    assert str(path) in str(stop.value) and "\n" not in str(stop.value)
    return str(stop.value)


def test_missing_checkpoint_names_the_script_that_makes_it(tmp_path):
    assert "train.py" in refused(tmp_path / "ckpt.pt")
    assert "distill.py" in refused(tmp_path / "denoiser.pt", "denoiser")


@pytest.mark.parametrize("left", [0, 1, 100, 0.5, 0.99])  # bytes, or the share of them
def test_truncated_checkpoint(tmp_path, left):
    path = tmp_path / "ckpt.pt"
    checkpoint.save(path, kind="ntm", model=NTM(TINY).state_dict())
    whole = path.read_bytes()
    path.write_bytes(whole[:int(left * len(whole)) if left < 1 else left])
    assert "truncated" in refused(path)


@pytest.mark.parametrize("text", [b"a text file", b"question", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\x80\x02}q"])
def test_file_that_is_no_checkpoint(tmp_path, text):
    (tmp_path / "ckpt.pt").write_bytes(text)
    assert "not a checkpoint" in refused(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("value", [{"weight": torch.zeros(2)}, [1, 2], torch.zeros(3)])
def test_checkpoint_of_something_else(tmp_path, value):
    torch.save(value, tmp_path / "ckpt.pt")
    assert "no checkpoint of an NTM" in refused(tmp_path / "ckpt.pt")


class Malice:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoint_runs_no_code(tmp_path, zipped):
    path = tmp_path / "ckpt.pt"
    torch.save({"kind": "ntm", "model": Malice(tmp_path / "owned")}, path, _use_new_zipfile_serialization=zipped)
    refused(path)
    assert not (tmp_path / "owned").exists()
    torch.load(path, weights_only=False)  # the same file where code may run
    assert (tmp_path / "owned").exists()


def test_every_tensor_that_does_not_fit_is_named():
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    state = dict(model.state_dict())
    state["0.weight"], state["extra"] = torch.zeros(5, 2), torch.zeros(1)
    del state["1.bias"]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError) as stop:
        checkpoint.restore(model, state, "x/ckpt.pt")
    for part in ("x/ckpt.pt", "0.weight is (5, 2), expected (3, 2)", "1.bias is missing", "extra is unknown"):
        assert part in str(stop.value)
    assert "0.bias" not in str(stop.value) and "1.weight" not in str(stop.value)
    assert same(before, dict(model.state_dict()))


def test_checkpoint_of_another_version_is_named(tmp_path):
    config = asdict(TINY) | {"rotary": True}
    checkpoint.save(tmp_path / "x.pt", kind="ntm", model_config=config, ema=NTM(TINY))
    with pytest.raises(ValueError, match="another version, with rotary in its model_config: use that one"):
        checkpoint.load_network(tmp_path / "x.pt", {"ntm": NTM})


def test_what_a_validation_finds_is_printed(tmp_path, capsys):
    fit(tmp_path, validate=lambda ema, i: {"val_loss": i / 4, "val_bound": 1.5}, val_interval=3)
    printed = capsys.readouterr().out
    for line in "iteration 3: val_loss 0.7500, val_bound 1.5000\n", "iteration 6: val_loss 1.5000, val_bound 1.5000\n":
        assert printed.count(line) == 1


def test_a_validation_that_fails_does_not_cost_the_weights(tmp_path):
    def validate(ema, i):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError):
        fit(tmp_path, validate=validate, max_iters=3)
    assert contents(tmp_path / "ckpt.pt")["iter"] == 3


def test_a_folder_of_work_that_goes_on_is_made_with_those_above_it(tmp_path):
    path = tmp_path / "a" / "b" / "settings.json"
    runtime.claim(path, {"seed": 1}, "other settings")
    assert json.loads(path.read_text()) == {"seed": 1} and os.listdir(path.parent) == [path.name]
    with pytest.raises(ValueError, match="other settings"):
        runtime.claim(path, {"seed": 2}, "other settings")


def test_out_dir_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match="file"):
        fit(tmp_path / "file" / "out")


# ---------------------------------------------------------------------------------------------------------------
# The machine


@pytest.mark.parametrize("name", ["broadcast_buffers", "forward_sync_buffers"])
def test_gradients_are_in_memory_once(monkeypatch, name):
    """DDP's buckets are the gradients, and no buffers are sent round before every pass, whatever that is called."""
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    settings = {}

    def old(network, device_ids, gradient_as_bucket_view, broadcast_buffers=True):
        settings.update(locals())

    def new(network, device_ids, gradient_as_bucket_view, broadcast_buffers=None, forward_sync_buffers=None):
        assert broadcast_buffers is None  # or it warns
        settings.update(locals())

    monkeypatch.setattr(runtime, "DistributedDataParallel", old if name == "broadcast_buffers" else new)
    runtime.for_training(Toy(), {"compile": False}, torch.device("cpu"))
    assert settings["device_ids"] is None and settings["gradient_as_bucket_view"] and settings[name] is False


@pytest.mark.parametrize("device, precision", [("cuda", "high"), ("cpu", "highest")])
def test_products_are_coarse_for_a_while_on_cuda(device, precision):
    with pytest.raises(KeyError), runtime.coarse_products(torch.device(device)):
        assert torch.get_float32_matmul_precision() == precision
        raise KeyError
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("level_weight", [0.0, 1.0])
def test_what_is_logged_has_no_weights(level_weight):
    model = make_model(dtype=torch.float32)
    images, text = make_images(4), make_text(4)
    levels = levels_of(model, images, text, *model.draw_trajectories(4))
    settings = dict(level_weight=level_weight, velocity_weight=0.0, closed_form=False, mirrored=False, pairs=False, max_t_min=0.05)
    losses = losses_of_batch(TrainingLoss(model, settings), None, 0.0, images, text, *levels)
    torch.testing.assert_close(losses["loss"], model(images, text, levels))
    assert (losses["minimised"] != losses["loss"]) == bool(level_weight)
