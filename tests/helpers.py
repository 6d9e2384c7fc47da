"""What the tests of loop.py and of the scripts share: a script run in this process, and what it left behind."""
import contextlib
import io
import itertools
import json
import runpy
import signal
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


@contextlib.contextmanager
def handlers_kept():
    """Training takes SIGINT and SIGTERM over; the tests want theirs back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run(script, *settings):
    """Runs `python script settings`, but in this process. Returns the script's globals and what it printed."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        patch.setattr(sys, "argv", [script, *settings])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            names = runpy.run_path(str(ROOT / script), run_name="__main__")
    return names, printed.getvalue()


def interrupted_run(network, iteration, *command):
    """Runs a script that gets SIGTERM in the forward pass of an iteration (counted from 1) of a class of network."""
    forward, count = network.forward, itertools.count(1)

    def forward_and_signal(*args):
        if next(count) == iteration:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "forward", forward_and_signal)
        return run(*command)


def contents(path):
    return torch.load(path, weights_only=True)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_lines(path):
    """A log without the lines of validation."""
    return [line for line in read_log(path) if "loss" in line]


def read_log_without_speed(path):
    return [{name: value for name, value in line.items() if name != "images_per_s"} for line in read_log(path)]


def same(a, b):
    """Whether two values from a checkpoint are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def same_training(path, other):
    """Whether two checkpoints would go on alike: weights, average, optimizer and iteration."""
    a, b = contents(path), contents(other)
    return all(same(a[key], b[key]) for key in ("model", "ema", "optimizers", "iter"))
