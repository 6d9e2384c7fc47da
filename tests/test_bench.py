"""bench.py counts and measures what it says; no test depends on how fast the machine is."""
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import fails, run

import bench
from fm import FlowMatching
from model import NTM, NTMConfig

SMALL = ["--device=cpu", "--repeats=1", "--batch_size=2", "--tolerances=(1e-2, 1e-5)"]
TINY = NTMConfig(image_size=4, width=8, depth=1, heads=2, transporter_width=8, transporter_layers=1)


def test_every_figure_is_there(copied):
    _, printed = run("bench.py", *SMALL, f"--out_dir={copied}", "--image_sizes=(4, 8)")
    results = json.loads((copied / "bench.json").read_text())
    assert {"NTM, pairs", "NTM, trajectories", "NTM, no transporter", "flow matching",
            "matrix product GFLOP/s"} == set(results["training"])
    for row in list(results["training"].values())[1:]:
        assert row["images/s"] > 0 and 0 < row["utilisation"] < 1
    work = {name: row["GFLOP an image"] for name, row in list(results["training"].items())[1:]}
    assert work["flow matching"] < work["NTM, no transporter"] * 1.01 < work["NTM, pairs"] < work["NTM, trajectories"]

    inversion = results["inversion"]
    assert len(inversion) == 2 * 3  # two N; cache, and sweeps to two tolerances
    for N in (4, 16):
        assert inversion[f"N = {N}, cache"]["largest error"] < 1e-4
        loose, tight = (inversion[f"N = {N}, jacobi, tolerance {tol}"] for tol in ("0.01", "1e-05"))
        assert tight["largest error"] <= loose["largest error"] and tight["largest error"] < 1e-3
        assert 1 <= loose["sweeps a block"] <= tight["sweeps a block"] <= N
    assert list(results["sampling"]) == ["NTM, 4 steps, none", "NTM, 4 steps, score", "NTM, 4 steps, learned",
                                         "flow matching, 4 steps", "flow matching, 50 steps"]
    for title in ("training", "inversion", "sampling", "wrote"):
        assert title in printed


def test_random_weights_are_not_the_identity():
    model = bench.network(NTM, TINY, torch.device("cpu"))
    x = torch.randn(2, 4, 4)
    u, logdet = model.transporter(x, torch.full((2,), 0.5), torch.full((2,), 4))
    assert (u - x).abs().max() > 0.01 and logdet.abs().min() > 0


def test_medians_take_turns(monkeypatch):
    calls = []
    monkeypatch.setattr(bench, "repeats", 3)
    functions = {name: lambda name=name: calls.append(name) for name in "ab"}
    assert bench.medians(functions, torch.device("cpu")).keys() == {"a", "b"}
    assert calls == ["a", "b"] * 4  # the warm-up and three


def test_medians_are_of_seconds_after_the_warm_up(monkeypatch):
    """By a clock that each call moves on: by 100 in the warm-up, then by 1, 2 and 9."""
    now, durations = [0], iter((100, 1, 2, 9))
    monkeypatch.setattr(bench, "repeats", 3)
    monkeypatch.setattr(bench, "time", SimpleNamespace(perf_counter=lambda: sum(now)))
    assert bench.medians({"a": lambda: now.append(next(durations))}, torch.device("cpu")) == {"a": 2}


@pytest.mark.slow
def test_speed_is_of_images(monkeypatch):
    """Where everything takes half a second, 6 images each time are 12 a second."""
    monkeypatch.setattr(bench, "batch_size", 6)
    monkeypatch.setattr(bench, "medians", lambda functions, device: dict.fromkeys(functions, 0.5))
    cpu, model = torch.device("cpu"), bench.network(NTM, TINY, torch.device("cpu"))
    training = bench.bench_training(model, cpu)
    assert training.pop("matrix product GFLOP/s") == pytest.approx(2 * 2048**3 / 0.5 / 1e9)
    for measured in (training, bench.bench_inversion(model, cpu), bench.bench_sampling(model, cpu)):
        assert {row["images/s"] for row in measured.values()} == {12}


@pytest.mark.parametrize("kind", [NTM, FlowMatching])
def test_a_training_step_goes_forward_and_back_and_moves_the_weights(monkeypatch, kind):
    monkeypatch.setattr(bench, "batch_size", 3)
    model, (images, text) = bench.network(kind, TINY, torch.device("cpu")), bench.inputs(TINY, torch.device("cpu"))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    monkeypatch.setattr(bench, "network", lambda *_: model)
    update = bench.training_step(kind, TINY, torch.device("cpu"), pairs=True)
    forward = bench.flops_of(lambda: model(images, text, bench.draw(model, images, text, True)))
    assert 2.7 < bench.flops_of(update) / forward <= 3  # a product has one of each kind of gradient, inputs have none
    # each weight with a gradient moves by the learning rate, for that is AdamW's first step
    for parameter, old in zip(model.parameters(), before):
        assert (parameter - old).abs().max().item() == pytest.approx(1e-3, rel=0.05)


def test_flops_are_counted():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert bench.flops_of(lambda: (a @ b).sum().backward()) == 3 * 2 * 3 * 4 * 5  # forward, and a gradient for each


@pytest.mark.parametrize("settings, part", [
    (["--repeats=0"], "repeats is 0"), (["--out_dir=nowhere"], "nowhere/ckpt.pt"),
    (["--width=30", "--heads=4"], "width 30 is not divisible by twice 4 heads")])
def test_wrong_settings_are_named(settings, part):
    assert part in fails("bench.py", "--device=cpu", *settings)
