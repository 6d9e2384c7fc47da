"""Processes that load data: killed, silent or without shared memory, they end a run in one line after it has saved."""
import contextlib
import errno
import itertools
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from types import SimpleNamespace

import pytest
import toy
from helpers import (ENVIRONMENT, ROOT, TRAIN, contents, fails, png, ranks_of, read_log_without_speed, run, same_training,
                     script)
from toy import DATA, Items, fit, squares

from plumbing import latents, shards, workers
from plumbing.loader import read_ahead
from plumbing.shards import write_shards
from plumbing.workers import ReadAhead

pytestmark = pytest.mark.slow


class Acting(Items):
    """Items of which the one numbered `at` does something in a process that loads."""

    def __init__(self, act, at=7, items=range(20)):
        super().__init__(items)
        self.act, self.at = act, at

    def __getitem__(self, i):
        if i == self.at and multiprocessing.parent_process():
            self.act()
        return super().__getitem__(i)


def in_pairs(dataset, count=2, **settings):
    return ReadAhead(dataset, [[i, i + 1] for i in range(0, 20, 2)], count, collate_fn=list, **settings)


def die_with(status):
    return lambda: os._exit(status) if status > 0 else os.kill(os.getpid(), -status)


@pytest.mark.parametrize("status, parts", [
    (-signal.SIGKILL, ["killed", "memory", "fewer workers than 2"]),
    (-signal.SIGBUS, ["/dev/shm", "--shm-size", "fewer workers than 2"]),
    (errno.ENOSPC, ["/dev/shm", "--shm-size", "fewer workers than 2"]),
    (errno.EMFILE, ["too many files", "ulimit -n"]),
    (3, ["exit status is 3", "fewer workers than 2"])])
def test_the_death_of_a_process_is_named_with_its_remedy(status, parts):
    with in_pairs(Acting(die_with(status))) as loaded:
        with pytest.raises(ChildProcessError) as error:
            for _ in loaded:
                pass
    assert all(part in str(error.value) for part in parts) and "\n" not in str(error.value)
    assert not multiprocessing.active_children()


class Refused:
    """What cannot be handed on, for want of shared memory or otherwise."""

    def __init__(self, message):
        self.message = message

    def __reduce__(self):
        raise RuntimeError(self.message)


@pytest.mark.parametrize("message, part", [
    ("unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)", "--shm-size"),
    ("unable to mmap 400 bytes from file </torch_1_2>: Cannot allocate memory (12)", "--shm-size"),
    ("unable to open shared memory object </torch_1_2> in read-write mode: Too many open files (24)", "ulimit"),
    ("no idea", "exit status is 1")])
def test_a_batch_that_cannot_be_handed_on_is_not_waited_for(message, part):
    items = [Refused(message) if i == 7 else i for i in range(20)]
    with in_pairs(Items(items)) as loaded, pytest.raises(ChildProcessError, match=part):
        list(loaded)


def test_nobody_waits_for_ever(monkeypatch):
    """Nor for the processes that hang, which ignore SIGTERM, when the run ends."""
    monkeypatch.setattr(workers, "LONGEST_WAIT", 2)
    with in_pairs(Acting(lambda: time.sleep(1000))) as loaded, pytest.raises(TimeoutError, match="no batch came for"):
        list(loaded)
    asked = []
    with in_pairs(Acting(lambda: time.sleep(1000)), asked=lambda: bool(asked)) as loaded:
        assert [next(loaded) for _ in range(3)] == [[0, 1], [2, 3], [4, 5]]
        threading.Timer(0.5, asked.append, [True]).start()
        with pytest.raises(InterruptedError):
            next(loaded)
    assert not multiprocessing.active_children()


def test_a_process_that_hangs_ends_with_a_run_that_does_not_wait_for_it():
    with in_pairs(Acting(lambda: time.sleep(1000))) as loaded:
        next(loaded)
        time.sleep(0.5)  # until it is there
    assert not multiprocessing.active_children()


def test_slow_data_are_waited_for():
    dataset = Acting(lambda: time.sleep(2.5))
    with in_pairs(dataset) as loaded:
        assert list(loaded) == [[i, i + 1] for i in range(0, 20, 2)]


def raises(error):
    raise error


@pytest.mark.parametrize("count", [0, 2])
@pytest.mark.parametrize("error", [ValueError("100 in a row"), OSError("no such shard")])
def test_an_error_of_the_data_is_its_one_line(count, error):
    dataset = Items(range(20))
    dataset.__class__ = type("Bad", (Items,), {"__getitems__": lambda self, numbers: raises(error)})
    with in_pairs(dataset, count) as loaded, pytest.raises(type(error), match=f"^{error}$"):
        next(loaded)


def test_a_mistake_in_the_program_keeps_its_traceback():
    with in_pairs(Acting(lambda: 1 / 0)) as loaded, pytest.raises(ZeroDivisionError, match="Original Traceback"):
        list(loaded)


def test_processes_end_with_a_generator_that_is_left():
    batches = [[i] for i in range(20)]
    for batch, loaded in zip(batches[:3], read_ahead(Items(range(20)), batches, 2, collate_fn=list)):
        assert batch == loaded and len(multiprocessing.active_children()) == 2
    del loaded
    assert not multiprocessing.active_children()


def test_processes_that_cannot_be_started_are_one_line(monkeypatch):
    def full(self, *args):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(multiprocessing.context.ForkContext, "Lock", full)
    with pytest.raises(OSError, match="2 processes that load data cannot be started.*/dev/shm"):
        in_pairs(Items(range(20)))


# ---------------------------------------------------------------------------------------------------------------
# Runs


def test_a_run_that_loses_a_process_saves_first_and_goes_on_from_there(tmp_path, capsys):
    _, whole = fit(tmp_path / "whole", max_iters=12)
    count = itertools.count(1)

    def objective(*args):
        if next(count) == 4:
            process = multiprocessing.active_children()[0]
            process.kill()
            process.join()
        return squares(*args)

    with pytest.raises(SystemExit, match="a process that loads data has died: it was killed.*fewer workers than 2"):
        fit(tmp_path / "parts", objective, workers=2, max_iters=12)
    path = tmp_path / "parts" / "ckpt.pt"
    assert contents(path)["iter"] == 4 and "holds iteration 4" in capsys.readouterr().out
    fit(tmp_path / "parts", workers=2, max_iters=12, resume="yes")
    assert same_training(path, whole)
    assert read_log_without_speed(path.with_name("log.jsonl"))[-1]["iter"] == 12


@pytest.mark.parametrize("count", [0, 2])
def test_data_that_fail_end_a_run_after_it_has_saved(tmp_path, monkeypatch, count):
    """The first epoch has three batches; in the second a disk is gone."""
    marker = tmp_path / "gone"

    class Failing(Items):
        def __getitems__(self, numbers):
            if marker.exists():
                raise OSError("the disk is gone")
            return super().__getitems__(numbers)

    def objective(*args):
        if len(calls) == 2:
            marker.touch()
        calls.append(args)
        return squares(*args)

    calls = []
    monkeypatch.setattr(toy, "DATA", Failing(DATA))
    with pytest.raises(SystemExit, match="^the disk is gone$"):
        fit(tmp_path / "run", objective, workers=count, max_iters=100)
    held = contents(tmp_path / "run" / "ckpt.pt")
    assert held["iter"] == len(calls) >= 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_run_that_waits_for_data_hears_signals(tmp_path, monkeypatch, number):
    """Two batches come, the third never: what is trained is saved at once."""
    monkeypatch.setattr(toy, "DATA", Acting(lambda: time.sleep(1000), 3, DATA))
    timer = threading.Timer(3, os.kill, [os.getpid(), number])
    timer.start()
    with toy.end_by(number):
        fit(tmp_path, workers=1, max_iters=100)  # which would raise TimeoutError if it waited to the end
    path = tmp_path / "ckpt.pt"
    assert 1 <= contents(path)["iter"] <= 3 and not multiprocessing.active_children()


def test_a_run_that_waits_for_its_first_data_hears_signals(tmp_path, monkeypatch):
    class Silent(Items):
        def __getitems__(self, numbers):
            time.sleep(1000 if multiprocessing.parent_process() else 0)
            return super().__getitems__(numbers)
    monkeypatch.setattr(toy, "DATA", Silent(DATA))
    threading.Timer(2, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with pytest.raises(SystemExit, match="interrupted while waiting for the first data"):
        fit(tmp_path, workers=1)


def test_ranks_end_together_where_one_loses_its_process(tmp_path):
    bad = script(tmp_path, """
    if os.environ["RANK"] == "1" and len(calls) == 4:
        import multiprocessing
        multiprocessing.active_children()[0].kill()
        multiprocessing.active_children()""")
    status, out, err = ranks_of(2, bad, *TRAIN, "--workers=1", "--max_iters=1000", "--val_interval=500",
                                f"--out_dir={tmp_path / 'run'}")
    assert status != 0 and "Traceback" not in err
    assert "a process that loads data has died: it was killed" in err
    assert 4 <= contents(tmp_path / "run" / "ckpt.pt")["iter"] <= 6 and "continue with" in out


def test_a_process_whose_pipe_has_closed_counts_as_dead():
    """The pipe closes a moment before the system knows, which is_alive() asks and join() waits for."""
    sentinel, other_end = os.pipe()
    os.close(other_end)

    class Process:
        exitcode = None

        def join(self, timeout):
            self.exitcode = -signal.SIGKILL

        def is_alive(self):
            return self.exitcode is None

    process = Process()
    process.sentinel = sentinel
    loaded = ReadAhead([0], [[0]], 0)
    loaded.processes = [process]
    with pytest.raises(ChildProcessError, match="it was killed"):
        loaded.check_processes()
    os.close(sentinel)


def pictures(folder, count=40):
    for split in ("train", "val"):
        examples = [(f"{i:04d}", {"png": png((i, 2 * i, 3 * i), (32, 32)), "txt": b"a picture"}) for i in range(count)]
        write_shards(folder / split, examples, per_shard=20)


def test_encoding_that_loses_a_process_is_one_line_and_goes_on(tmp_path, monkeypatch):
    pictures(tmp_path / "in")
    (tmp_path / "encoder.pt2").touch()
    monkeypatch.setattr(latents, "load_exported", lambda path, device: lambda images: images[:, :, ::4, ::4])
    settings = ["encode", f"--data_dir={tmp_path / 'in'}", f"--encoder={tmp_path / 'encoder.pt2'}", "--device=cpu",
                "--image_size=32", f"--out={tmp_path / 'out'}", "--workers=2", "--batch_size=4"]
    decode, decoded = shards.decode_image, multiprocessing.get_context("fork").Value("i", 0)

    def decode_and_die(members):
        if multiprocessing.parent_process():
            decoded.value += 1
            if decoded.value > 30:
                os.kill(os.getpid(), signal.SIGKILL)
        return decode(members)

    with monkeypatch.context() as patch:
        patch.setattr(shards, "decode_image", decode_and_die)
        line = fails("data.py", *settings)
    assert "a process that loads data has died: it was killed" in line and "fewer workers than 2" in line
    done = list((tmp_path / "out").rglob("*.tar"))
    assert len(done) == 1 and not multiprocessing.active_children()
    times = done[0].stat().st_mtime_ns
    run("data.py", *settings)
    assert len(list((tmp_path / "out").rglob("*.tar"))) == 4 and done[0].stat().st_mtime_ns == times


def can_mount():
    command = ["unshare", "-m", "mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", "/dev/shm"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True).returncode == 0
    return False


@pytest.mark.skipif(not can_mount(), reason="needs the right to mount a small /dev/shm")
def test_a_small_dev_shm_ends_a_run_in_one_line(tmp_path):
    """A megabyte, for batches of three."""
    pictures(tmp_path / "in")
    settings = [*TRAIN, "--dataset=shards", f"--data_dir={tmp_path / 'in'}", "--image_size=176", "--channels=3",
                "--patch_size=88", "--workers=2", f"--out_dir={tmp_path / 'run'}"]
    mount = "mount -t tmpfs -o size=1m tmpfs /dev/shm && exec \"$@\""
    process = subprocess.run(["unshare", "-m", "bash", "-c", mount, "bash", sys.executable, "train.py", *settings],
                             cwd=ROOT, env=ENVIRONMENT, text=True, capture_output=True, timeout=100)
    line = process.stderr.strip().splitlines()[-1]
    assert process.returncode == 1 and "Traceback" not in process.stderr
    assert "/dev/shm (1 MB) has no room" in line and "--shm-size" in line and "fewer workers than 2" in line


def test_a_full_dev_shm_is_named_where_its_size_is_unknown(monkeypatch):
    def unknown(path):
        raise OSError("no such folder")

    monkeypatch.setattr(workers.shutil, "disk_usage", unknown)
    line = ReadAhead.reason(SimpleNamespace(fewer=lambda: "choose fewer workers than 2"), -signal.SIGBUS)
    assert line.startswith("/dev/shm has no room for the batches") and line.endswith("or choose fewer workers than 2")
