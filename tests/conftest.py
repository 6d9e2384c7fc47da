"""Shared by all tests: the repository root on the path, one thread, the same random numbers for every test."""
import multiprocessing
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from helpers import DISTILL, TRAIN, run  # noqa: E402, once the root is on the path
from plumbing.runtime import note  # noqa: E402

TRAINED = {"trained", "copied", "base", "ran"}  # fixtures that train

torch.set_num_threads(1)  # the models here are tiny: more threads only wait for one another


def pytest_configure(config):
    config.addinivalue_line("markers", "cuda: takes a GPU, and is skipped where there is none")
    config.addinivalue_line("markers", "slow: takes over a second, starts processes or trains by the scripts")


def pytest_collection_modifyitems(items):
    """What needs a trained model is slow."""
    for item in items:
        if TRAINED & set(item.fixturenames):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forget_notes():
    """Notes are given once in a process; each test is one."""
    note.cache_clear()


@pytest.fixture(autouse=True)
def no_process_is_left():
    """Python waits for its children before it ends: one that is deaf to SIGTERM would keep it for ever."""
    yield
    assert not multiprocessing.active_children()


def randomize(module, scale=1.0):
    """Gives every parameter, those that start at zero too, a random value: layers then emit numbers of size `scale`.

    A model at initialisation is the identity and hides most mistakes; this one stretches, gates and depends.
    """
    for parameter in module.parameters():
        fan_in = parameter.shape[-1] if parameter.dim() > 1 else 1
        nn.init.normal_(parameter, std=scale / fan_in**0.5)
    return module


def covariance(ts):
    """S_ij = m^2 (1 - M) / (1 - m), m = min(t_i, t_j), M = max(t_i, t_j), entry by entry; ts a sequence of times."""
    def entry(a, b):
        m, M = min(a, b), max(a, b)
        return 1.0 if m == 1 else m**2 * (1 - M) / (1 - m)
    return torch.tensor([[entry(float(a), float(b)) for b in ts] for a in ts], dtype=torch.float64)


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A folder after train.py and distill.py, long enough for captions to matter. Not to be written to."""
    out = tmp_path_factory.mktemp("trained")
    run("train.py", *TRAIN, f"--out_dir={out}", "--max_iters=100", "--val_interval=50", "--lr=1e-2")
    run("distill.py", *DISTILL, f"--out_dir={out}", "--max_iters=40", "--val_interval=20", "--lr=1e-2")
    return out


@pytest.fixture
def copied(trained, tmp_path):
    """A copy of that folder, to be written to."""
    return shutil.copytree(trained, tmp_path / "copy")
