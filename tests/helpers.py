"""What the tests of loop.py and of the scripts share: a script run in this process, and what it left behind."""
import contextlib
import gc
import io
import itertools
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from beyond import ResidualDenoiser
from networks import NETWORKS
from plumbing import checkpoint
from plumbing.runtime import note
from plumbing.shards import Shards, write_shard

ALL = {**NETWORKS, "denoiser": ResidualDenoiser}
ROOT = Path(__file__).parent.parent
SHORT = ["--device=cpu", "--batch_size=8", "--max_iters=6", "--val_interval=3", "--val_examples=16", "--num_samples=4",
         "--log_interval=1", "--warmup_iters=2", "--optimizer=adamw", "--lr=2e-3"]
SMALL = ["--width=16", "--depth=1", "--heads=2"]
TRAIN = SHORT + SMALL + ["--transporter_width=16", "--transporter_blocks=2", "--transporter_layers=1", "--shift=None"]
DISTILL = SHORT + SMALL + ["--t_min=0.03"]  # the model's own pictures end at 0.02
SAMPLE = ["--device=cpu", "--num_samples=5"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SCRIPT = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
from model import NTM

forward, calls = NTM.forward, []

def forward_with_trouble(*args):
    calls.append(args)
    {trouble}
    return forward(*args)

NTM.forward = forward_with_trouble
runpy.run_path({script!r}, run_name="__main__")
"""


def run(script, *settings):
    """Runs `python script settings`, but in this process. Returns the script's globals and what it printed."""
    return run_with_notes(script, *settings)[:2]


def run_with_notes(script, *settings):
    """The same, and the notes that it gave, a list of lines."""
    printed, errors = io.StringIO(), io.StringIO()
    note.cache_clear()  # as in a fresh process
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *settings])
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(errors):
            names = runpy.run_path(str(ROOT / script), run_name="__main__")
    notes = [line.removeprefix("note: ") for line in re.split("[\r\n]", errors.getvalue()) if line.startswith("note: ")]
    return names, printed.getvalue(), notes


def interrupted_run(network, iteration, *command):
    """Runs a script that gets SIGTERM in the forward pass of an iteration (counted from 1) of a class of network."""
    forward, count = network.forward, itertools.count(1)

    def forward_and_signal(*args, **kwargs):
        if next(count) == iteration:
            signal.raise_signal(signal.SIGTERM)
        return forward(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "forward", forward_and_signal)
        return run(*command)


def script(folder, trouble):
    """train.py with something happening in every forward pass; `calls` are the passes so far."""
    path = folder / f"script_{len(list(folder.glob('script_*')))}.py"
    path.write_text(SCRIPT.format(root=str(ROOT), script=str(ROOT / "train.py"), trouble=trouble))
    return path


def contents(path):
    return torch.load(path, weights_only=True)


def read_log(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def training_lines(path):
    """A log without the lines of validation."""
    return [line for line in read_log(path) if "loss" in line]


def read_log_without_speed(path):
    return [{name: value for name, value in line.items() if name not in ("images_per_s", "data_wait")}
            for line in read_log(path)]


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


def start(*command, environment={}):
    """A process of its own, in a session of its own, its output to be read."""
    return subprocess.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=ENVIRONMENT | environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def load(out, kind):
    """The averaged network that a folder holds."""
    path = out / ("denoiser.pt" if kind == "denoiser" else "ckpt.pt")
    return checkpoint.load_network(path, {kind: ALL[kind]})[0]


def pixels(path):
    """A picture as an int array (H, W, 3), once it is clear that it shows something."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        array = np.asarray(image.convert("RGB")).astype(int)
    assert array.min() < array.max()
    return array


def torchrun(ranks, *command):
    """Status, output and errors of a command under torchrun."""
    process = start("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", *command)
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


def restarting(ranks, restarts, *command):
    """Status, output and errors of a script under torchrun --max-restarts, whose ranks are copies of this process."""
    (done,) = copies([{}], "tests/elastic.py", ranks, restarts, *command)
    return done


def copies(environments, *command):
    """Runs a script in copies of this process, which have torch imported already: one for each {variable: value}.

    Returns (status, output, errors) of each. If one fails, the others get SIGTERM after a moment, as from torchrun.
    """
    with contextlib.ExitStack() as files:
        outputs = [[files.enter_context(tempfile.TemporaryFile("w+")) for _ in range(2)] for _ in environments]
        running = {start_copy(environment, *pair, *map(str, command)): number
                   for number, (environment, pair) in enumerate(zip(environments, outputs))}
        statuses, deadline = {}, time.monotonic() + 300
        while running:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid in running:
                statuses[running.pop(pid)] = os.waitstatus_to_exitcode(status)
                if any(statuses.values()):
                    deadline = min(deadline, time.monotonic() + 10)
            elif time.monotonic() > deadline:
                for pid in running:
                    os.kill(pid, signal.SIGTERM if any(statuses.values()) else signal.SIGKILL)
                deadline += 30
            else:
                time.sleep(0.02)
        texts = [[(file.seek(0), file.read())[1] for file in pair] for pair in outputs]
    return [(statuses[number], *text) for number, text in enumerate(texts)]


def start_copy(environment, out, err, script, *arguments):
    """The number of a new process, which runs a script as this one would with those variables."""
    if pid := os.fork():
        return pid
    # What is left of earlier tests belongs to the parent. Were it freed here, for instance a DataLoader with processes,
    # the error could be reported in the middle of ast.parse, which Python 3.11.7 does not bear (gh-106905).
    gc.freeze()
    status = 1
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))
        for name in [name for name in os.environ if name.startswith("SLURM_")]:
            del os.environ[name]
        os.environ.update(environment)
        sys.argv = [script, *arguments]
        try:
            runpy.run_path(str(ROOT / script), run_name="__main__")
            status = 0
        except SystemExit as end:
            print(end.code or "", file=sys.stderr)
            status = 1 if isinstance(end.code, str) else int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # without the end of pytest


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return str(found.getsockname()[1])


def ranks_of(ranks, *command):
    """Status, output and errors of a command on several ranks: what torchrun would start, in copies of this process."""
    shared = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "localhost",
              "MASTER_PORT": free_port()}
    done = copies([{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)], *command)
    statuses, outputs, errors = zip(*done)
    return next((status for status in statuses if status), 0), "".join(outputs), "".join(errors)


def on_ranks(ranks, *command):
    """What a command printed, once all of its ranks are through."""
    status, out, err = ranks_of(ranks, *command)
    assert status == 0, err
    return out


def file_of(picture, kind="PNG", **options):
    """A PIL.Image as the bytes of a file."""
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def png(colour=(200, 100, 50), size=(12, 12), mode="RGB"):
    """A picture of one colour as the bytes of a PNG."""
    return file_of(Image.new(mode, size, colour))


def npy(array):
    """An array as the bytes of a .npy file."""
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def latent_shard(path, latents, captions):
    """A shard of latents, float16."""
    write_shard(path, [(f"{i:03d}", {"npy": npy(latent.astype(np.float16)), "txt": caption.encode()})
                       for i, (latent, caption) in enumerate(zip(latents, captions))])


def assert_close_training(out, other, name, log):
    """Losses, validation and final weights of two runs are equal to rounding."""
    for a, b in zip(read_log_without_speed(out / log), read_log_without_speed(other / log), strict=True):
        assert a == pytest.approx(b, rel=1e-4)
    a, b = contents(out / name), contents(other / name)
    for key in ("model", "ema"):
        torch.testing.assert_close(a[key], b[key], rtol=1e-4, atol=2e-5)


def fails(script, *settings):
    """The one line that a script ends with."""
    with pytest.raises(SystemExit) as stop:
        run(script, *settings)
    line = stop.value.code
    assert isinstance(line, str) and line.strip() and "\n" not in line
    return line


def command(*arguments):
    """Runs `python data.py arguments` in this process. Returns what it printed."""
    return run("data.py", *map(str, arguments))[1]


def examples_of(folder, split):
    """{caption: pixels (C, H, W)} of some shards."""
    return {caption: image for image, caption in Shards(str(folder), split, 3, 8, 8)}
