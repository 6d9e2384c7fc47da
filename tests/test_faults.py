"""Nothing is lost: many processes, kills at any moment, full disks, folders that belong to another run."""
import errno
import fcntl
import itertools
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import pytest
from helpers import (DISTILL, ENVIRONMENT, ROOT, SAMPLE, TRAIN, assert_close_training, contents, copies, fails, free_port,
                     interrupted_run, on_ranks, ranks_of, read_log, read_log_without_speed, restarting, run,
                     run_with_notes, same, same_training, script, start, torchrun, training_lines)
from PIL import Image

from model import NTM
from plumbing import checkpoint, lock, log, runtime
from plumbing.lock import lock_folder

pytestmark = pytest.mark.slow

# ---------------------------------------------------------------------------------------------------------------
# Many processes

ONE_BAD_RANK = """
import os, runpy, signal, sys
sys.path.insert(0, {root!r})
import torch
from model import NTM

rank, forward, calls = os.environ["RANK"], NTM.forward, []

def forward_badly(*args):
    calls.append(args)
    if rank == "1" and len(calls) == 5:
        signal.raise_signal(signal.SIGTERM)
    loss = forward(*args)
    return loss * float("nan") if rank == "1" and len(calls) == 3 else loss

NTM.forward = forward_badly
runpy.run_path({script!r}, run_name="__main__")
torch.save(calls[0][0].state_dict(), os.path.join({out!r}, f"rank{{rank}}.pt"))
"""


def test_two_and_four_processes_train_as_one_does(tmp_path):
    alone, accumulated, both, four = (tmp_path / name for name in ("alone", "accumulated", "both", "four"))
    settings = ["--val_examples=120", "--caption_dropout=0.5"]  # two batches of validation, one a rank
    run("train.py", *TRAIN, *settings, f"--out_dir={alone}")
    run("train.py", *TRAIN, *settings, f"--out_dir={accumulated}", "--grad_accum=2")
    assert_close_training(accumulated, alone, "ckpt.pt", "log.jsonl")
    on_ranks(4, "train.py", *TRAIN, *settings, f"--out_dir={four}")
    assert_close_training(four, alone, "ckpt.pt", "log.jsonl")
    printed = on_ranks(2, "train.py", *TRAIN, *settings, f"--out_dir={both}", "--grad_accum=2")
    assert_close_training(both, alone, "ckpt.pt", "log.jsonl")
    assert printed.count("M parameters") == printed.count("iteration 6: val_loss") == 1  # one rank speaks

    shutil.copy(alone / "ckpt.pt", both)  # the same teacher
    run("distill.py", *DISTILL, *settings, f"--out_dir={alone}")
    on_ranks(2, "distill.py", *DISTILL, *settings, f"--out_dir={both}")
    assert_close_training(both, alone, "denoiser.pt", "denoiser_log.jsonl")


def test_ranks_skip_and_stop_together(tmp_path):
    """One rank's loss is not finite in iteration 3, and one rank gets SIGTERM in iteration 5."""
    script = tmp_path / "one_bad_rank.py"
    script.write_text(ONE_BAD_RANK.format(root=str(ROOT), script=str(ROOT / "train.py"), out=str(tmp_path)))
    printed = on_ranks(2, script, *TRAIN, f"--out_dir={tmp_path}")
    held = contents(tmp_path / "ckpt.pt")
    ranks = [contents(tmp_path / f"rank{rank}.pt") for rank in range(2)]
    assert same(*ranks) and same(ranks[0], held["model"])
    assert all(tensor.isfinite().all() for tensor in ranks[0].values())
    lines = training_lines(tmp_path / "log.jsonl")
    assert [line["skipped"] for line in lines] == [0, 0, 1, 1, 1]
    assert held["iter"] == 5 and printed.count("holds iteration 5") == 1


def test_another_number_of_ranks_continues_the_run(tmp_path):
    alone, other = tmp_path / "alone", tmp_path / "other"
    run("train.py", *TRAIN, f"--out_dir={alone}", "--caption_dropout=0.5")
    for ranks, iterations in ((2, 2), (1, 4), (4, 6)):
        # the learning rate goes down to the end of the whole run, wherever a part of it ends
        on_ranks(ranks, stopping(tmp_path, iterations), *TRAIN, f"--out_dir={other}", "--caption_dropout=0.5",
                 "--resume=auto")
    assert_close_training(other, alone, "ckpt.pt", "log.jsonl")


UNLIKE_RANKS = """
import os, runpy, sys
sys.path.insert(0, {root!r})
import torch
from plumbing import optim

rank, average, manual_seed = os.environ["RANK"], optim.update_average, torch.manual_seed
torch.manual_seed = lambda seed: manual_seed(seed + int(rank))  # each has initial weights of its own

def update_and_keep(ema, model, decay, i):
    if i == 0:
        torch.save([ema.state_dict(), model.state_dict()], os.path.join({out!r}, f"start{{rank}}.pt"))
    average(ema, model, decay, i)
    torch.save(ema.state_dict(), os.path.join({out!r}, f"average{{rank}}.pt"))

optim.update_average = update_and_keep
runpy.run_path({script!r}, run_name="__main__")
"""


@pytest.mark.parametrize("name, settings", [("train.py", TRAIN), ("distill.py", DISTILL)])
def test_averaged_weights_are_alike_on_all_ranks_whatever_they_start_with(copied, tmp_path, name, settings):
    """And no rank is warned of anything."""
    path = tmp_path / "unlike_ranks.py"
    path.write_text(UNLIKE_RANKS.format(root=str(ROOT), script=str(ROOT / name), out=str(tmp_path)))
    out = tmp_path / "new" if name == "train.py" else copied
    if out == copied:
        (out / "denoiser.pt").unlink()
    status, _, err = ranks_of(2, path, *settings, "--max_iters=3", f"--out_dir={out}")
    assert status == 0 and "Warning" not in err, err
    starts = [contents(tmp_path / f"start{rank}.pt") for rank in range(2)]
    assert same(*starts) and not same(*starts[0])  # after the first update
    assert same(*(contents(tmp_path / f"average{rank}.pt") for rank in range(2)))


def stopping(folder, iterations):
    """train.py that is asked to end after some more iterations of the run."""
    resumed = contents(folder / "other" / "ckpt.pt")["iter"] if (folder / "other" / "ckpt.pt").exists() else 0
    return script(folder, f"if len(calls) == {iterations - resumed}: signal.raise_signal(signal.SIGTERM)")


@pytest.mark.parametrize("launch, trouble, message", [
    (torchrun, "os.kill(os.getpid(), signal.SIGKILL)", "Signal 9 (SIGKILL)"),
    (lambda ranks, *command: restarting(ranks, 0, *command), "raise RuntimeError('a cosmic ray')", "RuntimeError: a cosmic ray")])
def test_a_rank_that_dies_takes_the_job_down_with_its_message(tmp_path, launch, trouble, message):
    bad = script(tmp_path, f"if os.environ['RANK'] == '1' and len(calls) == 5: {trouble}")
    status, _, err = launch(2, bad, *TRAIN, f"--out_dir={tmp_path / 'run'}")
    assert status != 0 and message in err
    assert contents(tmp_path / "run" / "ckpt.pt")["iter"] == 3


def test_a_run_that_dies_does_not_wait_for_its_data_workers(tmp_path):
    process = start(script(tmp_path, "if len(calls) == 3: raise RuntimeError('a cosmic ray')"), *TRAIN,
                    f"--out_dir={tmp_path / 'run'}", "--workers=2")
    try:
        _, err = process.communicate(timeout=120)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 1 and "RuntimeError: a cosmic ray" in err


def test_torchrun_restarts_a_run_by_itself(tmp_path):
    """A rank raises before the first checkpoint, and one is killed after it; the result is that of two left in peace."""
    peace, war = tmp_path / "peace", tmp_path / "war"
    on_ranks(2, "train.py", *TRAIN, f"--out_dir={peace}")
    trouble = """
    now = os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"], len(calls)
    if now == ("0", "1", 2):
        raise RuntimeError("a cosmic ray")
    if now == ("1", "0", 5):
        os.kill(os.getpid(), signal.SIGKILL)"""
    status, _, err = restarting(2, 3, script(tmp_path, trouble), *TRAIN, f"--out_dir={war}")
    assert status == 0 and "RuntimeError: a cosmic ray" in err, err
    assert same_training(war / "ckpt.pt", peace / "ckpt.pt")
    assert read_log_without_speed(war / "log.jsonl") == read_log_without_speed(peace / "log.jsonl")


def tasks(count, variables, *command):
    """Statuses, outputs and errors of processes as a plain `srun` starts them, each with the variables that name it."""
    return copies([{name: value.format(rank=rank) for name, value in variables.items()} for rank in range(count)],
                  *command)


SRUN = {"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}",
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}


@pytest.mark.parametrize("variables", [
    {**SRUN, "SLURM_STEP_NODELIST": "localhost"},
    {"SLURM_PROCID": "{rank}", "SLURM_LOCALID": "{rank}", "SLURM_NTASKS": "2", "MASTER_ADDR": "localhost"},
    {"RANK": "{rank}", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}])  # as scripts set them by hand
def test_tasks_of_srun_train_as_the_ranks_of_torchrun_do(tmp_path, variables):
    alone, both = tmp_path / "alone", tmp_path / "both"
    run("train.py", *TRAIN, "--max_iters=3", f"--out_dir={alone}")
    done = tasks(2, variables | {"MASTER_PORT": free_port()}, "train.py", *TRAIN, "--max_iters=3", f"--out_dir={both}")
    assert [status for status, _, _ in done] == [0, 0], done
    assert_close_training(both, alone, "ckpt.pt", "log.jsonl")
    assert "2 x cpu" in done[0][1] and "cpu" not in done[1][1]


FAKE_SRUN = """
import os, signal, subprocess, sys
variables = {variables!r}
tasks = [subprocess.Popen(sys.argv[1:], env=os.environ | {{name: value.format(rank=rank)
                                                          for name, value in variables.items()}}) for rank in range(2)]
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
sys.exit(max(task.wait() for task in tasks))
"""


def test_the_script_for_slurm_saves_and_puts_itself_back_into_the_queue(tmp_path):
    """The first one of docs/scaling.md, with a srun that starts two tasks here and passes SIGUSR1 on."""
    text = (ROOT / "docs" / "scaling.md").read_text().partition("#!/bin/bash")[2].partition("```")[0]
    settings = [*TRAIN, "--max_iters=100000", "--val_interval=50000", f"--out_dir={tmp_path / 'run'}", "--workers=1"]
    text = text.replace("config/t2i.py --out_dir=out/t2i --resume=auto --workers=6", " ".join(settings))
    text = text.replace("python train.py", f"{sys.executable} train.py")
    assert "--val_interval=50000" in text
    variables = {**SRUN, "SLURM_STEP_NODELIST": "localhost", "MASTER_PORT": free_port()}
    (tmp_path / "fake_srun.py").write_text(FAKE_SRUN.format(variables=variables))
    for name, line in (("srun", f'exec {sys.executable} {tmp_path / "fake_srun.py"} "$@"'),
                       ("scontrol", f'echo "$@" > {tmp_path / "queued"}')):
        (tmp_path / name).write_text(f"#!/bin/bash\n{line}\n")
        (tmp_path / name).chmod(0o755)
    environment = ENVIRONMENT | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "4711"}
    process = subprocess.Popen(["bash", "-c", text], cwd=ROOT, env=environment, text=True, stderr=subprocess.PIPE)
    log = tmp_path / "run" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.1)
    process.send_signal(signal.SIGUSR1)
    _, err = process.communicate(timeout=60)
    assert (tmp_path / "queued").read_text() == "requeue 4711\n" and "Traceback" not in err
    assert contents(tmp_path / "run" / "ckpt.pt")["iter"] >= 3


@pytest.mark.parametrize("variables, expected", [
    ({}, None),
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "1"}, None),  # a batch script
    ({**SRUN, "SLURM_STEP_NUM_TASKS": "1"}, None),  # srun --pty bash
    ({**SRUN, "SLURM_PROCID": "1", "SLURM_LOCALID": "1"}, (1, 2, 1)),
    ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1"}, (3, 4, None)),
    ({"RANK": "3", "WORLD_SIZE": "4", "MASTER_ADDR": "a", "MASTER_PORT": "1", "SLURM_LOCALID": "1"}, (3, 4, 1)),
    ({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "a", "MASTER_PORT": "1",
      **SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, (1, 2, 1))])  # torchrun in a task of srun
def test_which_rank_a_process_is(monkeypatch, variables, expected):
    for name in [name for name in os.environ if name.startswith("SLURM_")]:
        monkeypatch.delenv(name)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runtime.ranks_of_environment() == expected


@pytest.mark.parametrize("variables, part", [
    ({"RANK": "0"}, "WORLD_SIZE is None"), ({"RANK": "one", "WORLD_SIZE": "2"}, "RANK is 'one'"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_ADDR is None"),
    ({"RANK": "2", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}, "WORLD_SIZE 2"),
    ({"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "x"}, "MASTER_PORT is 'x'")])
def test_a_rank_that_is_named_in_part_is_one_line(tmp_path, variables, part):
    (status, _, err), = tasks(1, variables, "train.py", *TRAIN, f"--out_dir={tmp_path}")
    assert status == 1 and part in err and len(err.splitlines()) == 1


def test_a_port_that_is_taken_is_one_line(tmp_path):
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        variables = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        (status, _, err), = tasks(1, variables, "train.py", *TRAIN, f"--out_dir={tmp_path}")
    assert status == 1 and err.splitlines()[-1].startswith(f"the 2 processes cannot meet at localhost:{port}")
    assert "Traceback" not in err


@pytest.mark.parametrize("nodes, first", [("gpu7", "gpu7"), ("gpu[003-006,9],cpu1", "gpu003"), ("a1,b2", "a1"),
                                          ("rack[1-2]node[3,4]", "rack1node3"), ("n-1-[08-11]", "n-1-08")])
def test_tasks_of_srun_meet_on_the_first_node(monkeypatch, nodes, first):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in {**SRUN, "SLURM_STEP_NODELIST": nodes}.items():
        monkeypatch.setenv(name, value)
    runtime.meet_in_slurm()
    assert os.environ["MASTER_ADDR"] == first and 10_000 <= int(os.environ["MASTER_PORT"]) < 30_000


@pytest.mark.parametrize("local_rank, count, slurm, expected", [
    (2, 4, False, 2), (3, 1, True, 0), (0, 1, False, 0), (3, 2, False, "there are 2 GPUs here for 4 processes"),
    (None, 2, False, "LOCAL_RANK is not")])
def test_whose_gpu_is_whose(monkeypatch, local_rank, count, slurm, expected):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("SLURM_LOCALID", "3")
    if not slurm:
        monkeypatch.delenv("SLURM_LOCALID")
    if type(expected) is int:
        assert runtime.own_gpu(local_rank, count) == expected
    else:
        with pytest.raises(ValueError, match=expected):
            runtime.own_gpu(local_rank, count)


def test_restarts_do_not_continue_another_job(tmp_path):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--max_iters=3")
    before = (tmp_path / "ckpt.pt").read_bytes()
    status, _, err = restarting(2, 1, ROOT / "train.py", *TRAIN, f"--out_dir={tmp_path}")
    assert status != 0 and "is there already" in err and "is of another job" in err
    assert (tmp_path / "ckpt.pt").read_bytes() == before


LEAVING = """
import atexit, os, sys
sys.path.insert(0, {root!r})
from plumbing.runtime import all_sum, leave_ranks, meet_ranks, one_line_errors, start_ranks
import torch

class Late:
    def __del__(self):
        os._exit(9)  # Python's own end comes here

late = Late()
rank = start_ranks("cpu")[1]
atexit.register(sys.stdout.write, f"handler of {{rank}}\\n")
sys.stdout.write(f"sum {{all_sum(torch.ones(1)).item()}}\\n")
meet_ranks()
if sys.argv[1] == "refused":
    with one_line_errors():
        raise ValueError("refused")
if sys.argv[1] == "exit":
    raise SystemExit("refused")
leave_ranks()
assert sys.argv[1] == "well"
"""


@pytest.mark.parametrize("end", ["well", "refused", "badly", "exit"])
def test_ranks_end_without_pythons_own_end(tmp_path, end):
    """It could hang or abort in gloo's threads. Handlers run, what was printed arrives, and an error stays one."""
    program = tmp_path / "leaving.py"
    program.write_text(LEAVING.format(root=str(ROOT)))
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": free_port()}
    ranks = [start(program, end, environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(2)]
    out, err = map("".join, zip(*(rank.communicate(timeout=60) for rank in ranks)))
    statuses = [rank.returncode for rank in ranks]
    assert sorted(out.splitlines()) == ["handler of 0", "handler of 1", "sum 2.0", "sum 2.0"]
    expected = {"well": 0, "refused": 1, "badly": 9, "exit": 9}
    assert statuses == [expected[end]] * 2, err
    assert ("AssertionError" in err) == (end == "badly")
    assert ("refused" in err) == (end in ("refused", "exit"))


# ---------------------------------------------------------------------------------------------------------------
# Killed


class Dying:
    """Counts what a run does, a forward pass or a write to its checkpoint, and kills the process at a chosen one."""

    def __init__(self, what, number):
        self.what, self.left = what, number

    def __call__(self, what):
        if what == self.what:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def open(self, path, mode):
        file = open(path, mode, buffering=0)  # so that what is written before the kill is on the disk
        write = file.write

        class Counted:
            def write(_, data):
                self("write")
                return write(data)

            def __getattr__(_, name):
                return getattr(file, name)

            def __enter__(_):
                return _

            def __exit__(_, *error):
                self("write")
                file.close()
        return Counted()

    def replace(self, source, target, replace=os.replace):
        self("write")
        replace(source, target)
        self("write")


def forked(settings, dying):
    """Runs train.py in a copy of this process, killed by `dying`. Returns its exit status."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            forward = NTM.forward
            NTM.forward = lambda *args: (dying("forward"), forward(*args))[1]
            checkpoint.open, checkpoint.os.replace = dying.open, dying.replace
            run("train.py", *settings)
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_killed_more_than_twenty_times_a_run_ends_as_if_it_had_not_been(tmp_path):
    settings = [*TRAIN, "--max_iters=60", "--val_interval=3"]
    run("train.py", *settings, f"--out_dir={tmp_path / 'peace'}")
    settings += [f"--out_dir={tmp_path / 'war'}", "--resume=auto"]
    path, moments = tmp_path / "war" / "ckpt.pt", random.Random(0)
    kills, reached = {"forward": 0, "write": 0}, 0
    for attempt in itertools.count():
        what, most = (("forward", 7), ("write", 300))[attempt % 2]
        status = forked(settings, Dying(what, moments.randint(1, most)))
        assert status in (0, -signal.SIGKILL)
        if path.exists():
            held = checkpoint.load(path, "ntm")
            assert held["iter"] >= reached and held["iter"] % 3 == 0
            reached = held["iter"]
        if status == 0:
            break
        kills[what] += 1
    print(f"killed in forward passes and in writing: {kills}")
    assert sum(kills.values()) >= 20 and min(kills.values()) >= 8
    assert same_training(path, tmp_path / "peace" / "ckpt.pt")
    assert read_log_without_speed(path.with_name("log.jsonl")) == read_log_without_speed(
        tmp_path / "peace" / "log.jsonl")


# ---------------------------------------------------------------------------------------------------------------
# Full disks, and folders of other runs


def test_full_disk_keeps_the_old_checkpoint_and_says_so(tmp_path):
    """The kernel's own full disk: whatever is written to the part file fails with ENOSPC."""
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--max_iters=3")
    before = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt.part").symlink_to("/dev/full")
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes")
    assert "is the disk full?" in line and "No space left on device" in line and "the one before it is kept" in line
    assert (tmp_path / "ckpt.pt").read_bytes() == before
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes")  # there is room again
    assert contents(tmp_path / "ckpt.pt")["iter"] == 6


def test_a_folder_of_another_run_is_refused_with_the_two_ways_on(tmp_path):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--max_iters=3")
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}")
    assert "is there already" in line and "--resume=yes" in line and "another --out_dir" in line
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes", "--width=32")
    assert "is of another model: width is 16, the settings say 32" in line
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


# ---------------------------------------------------------------------------------------------------------------
# Two runs in one folder


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_a_folder_in_which_a_run_is_at_work_is_refused(copied, script):
    """Also for a distillation beside training: the model would move on, and its denoiser be refused."""
    files = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
    with lock_folder(copied):
        process = start(script, f"--out_dir={copied}", "--resume=yes", "--max_iters=200")
        out, err = process.communicate(timeout=120)
    assert process.returncode == 1 and out == "" and err.count("\n") == 1
    assert f"another run is at work in out_dir {copied} (process {os.getpid()} on " in err
    assert "wait for its end, or choose another --out_dir" in err
    assert files.items() <= {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}.items()


def test_every_rank_is_refused_with_the_first(tmp_path, monkeypatch):
    """Else the others would wait for it."""
    monkeypatch.setattr(lock, "rank_and_world", lambda: (1, 2))
    monkeypatch.setattr(lock, "gathered", lambda mine: ["it is taken", mine])
    with pytest.raises(ValueError, match="^it is taken$"):
        lock_folder(tmp_path / "run")
    monkeypatch.setattr(lock, "gathered", lambda mine: ["", mine])
    with lock_folder(tmp_path / "run"):
        assert not (tmp_path / "run").exists()  # the first holds the lock


def test_a_lock_dies_with_its_process_even_if_its_data_workers_live(tmp_path):
    process = start(script(tmp_path, "if len(calls) == 3: print('here', flush=True); import time; time.sleep(600)"),
                    *TRAIN, f"--out_dir={tmp_path / 'run'}", "--workers=1")
    try:
        while process.stdout.readline() != "here\n":
            pass
        with pytest.raises(ValueError, match="another run is at work"):
            lock_folder(tmp_path / "run")
        os.kill(process.pid, signal.SIGSTOP)  # so that its children are still there when it is killed
        os.kill(process.pid, signal.SIGKILL)
        process.wait(timeout=60)
        with lock_folder(tmp_path / "run"):
            pass
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.stderr.close()


def test_a_mistake_leaves_no_folder(tmp_path):
    assert "no checkpoint" in fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'run'}", "--resume=yes")
    assert "no checkpoint" in fails("distill.py", *DISTILL, f"--out_dir={tmp_path / 'run'}")
    assert list(tmp_path.iterdir()) == []


def test_a_mistake_leaves_a_folder_that_was_there(tmp_path):
    """Somebody else made it, and is about to write there."""
    (tmp_path / "run").mkdir()
    assert "no checkpoint" in fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'run'}", "--resume=yes")
    assert list(tmp_path.iterdir()) == [tmp_path / "run"] and list((tmp_path / "run").iterdir()) == []


def test_a_folder_that_cannot_be_locked_is_used_with_a_note(tmp_path, monkeypatch):
    """A network file system without locks, and a platform without fcntl."""
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    _, _, notes = run_with_notes("train.py", *TRAIN, f"--out_dir={tmp_path / 'a'}", "--max_iters=1")
    assert [note for note in notes if "cannot be locked ([Errno 37] No locks available)" in note]
    monkeypatch.setattr(lock, "fcntl", None)
    _, _, notes = run_with_notes("train.py", *TRAIN, f"--out_dir={tmp_path / 'b'}", "--max_iters=1")
    assert [note for note in notes if "cannot be locked" in note and "make sure" in note]
    assert contents(tmp_path / "a" / "ckpt.pt")["iter"] == contents(tmp_path / "b" / "ckpt.pt")["iter"] == 1


# ---------------------------------------------------------------------------------------------------------------
# Damaged and full


@pytest.mark.parametrize("damage", [
    b"", b"\n", b"{", b"null", b"[1]", b"3", b'"iter"', b"{}", b'{"iter": "3"}', b'{"iter": 1.5}', b'{"iter": true}',
    b'{"iter": null}', b'{"iter": 2, "loss": "low"}', b'{"iter": 2, "loss": {}}', b'{"iter": 2, "loss": NaN}',
    b'{"iter": 2, "loss": 1' + 400 * b"0" + b"}", b"[" * 100_000, bytes(4096), b"\xff\xfe", b'{"iter": 2}{"iter": 3}'],
    ids=lambda damage: repr(damage[:25]))
@pytest.mark.parametrize("script, log", [("train.py", "log.jsonl"), ("distill.py", "denoiser_log.jsonl")])
def test_damaged_lines_of_a_log_are_dropped_with_a_note(copied, script, log, damage):
    path, stop = copied / log, {"train.py": 100, "distill.py": 40}[script]
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:3], damage + b"\n", *lines[3:]]))
    _, _, notes = run_with_notes(script, f"--out_dir={copied}", "--resume=yes", f"--max_iters={stop}")
    count = 1 + damage.count(b"\n")
    assert [note for note in notes if f"{count} damaged lines of {path} are dropped" in note]
    assert path.read_bytes() == b"".join(lines)


def test_a_log_that_is_damaged_while_a_run_goes_on_does_not_stop_it(tmp_path):
    trouble = "if len(calls) == 2: open(calls_log, 'a').write('{\\n'); os.mkdir(calls_log.replace('.jsonl', '.png'))"
    program = script(tmp_path, trouble)
    program.write_text(f"calls_log = {str(tmp_path / 'run' / 'log.jsonl')!r}\n" + program.read_text())
    process = start(program, *TRAIN, f"--out_dir={tmp_path / 'run'}")
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "warning: " in out + err and "log.png is not drawn at iteration 3" in out + err
    assert contents(tmp_path / "run" / "ckpt.pt")["iter"] == 6


class FullDisk:
    """open() of a log on a disk that is full for its line number `number` and all after it, or for that one alone."""

    def __init__(self, number, again=False):
        self.left, self.again = number, again

    def __call__(self, path, mode, **how):
        self.left -= 1
        if self.left == 0 or (self.again and self.left < 0):
            return open("/dev/full", mode, **how)
        return open(path, mode, **how)


@pytest.mark.parametrize("script, name", [("train.py", "ckpt.pt"), ("distill.py", "denoiser.pt")])
@pytest.mark.parametrize("line, held", [(1, 2), (4, 5), (6, 6), (7, 6)])  # 7: of the last validation
def test_a_full_disk_at_a_log_line_saves_first(trained, tmp_path, monkeypatch, script, name, line, held):
    """There is no validation but the last, so that the checkpoint is there for the log alone."""
    shutil.copy(trained / "ckpt.pt", tmp_path) if script == "distill.py" else None
    settings = [*(TRAIN if script == "train.py" else DISTILL), "--val_interval=50", f"--out_dir={tmp_path}"]
    monkeypatch.setattr(log, "open", FullDisk(line), raising=False)
    message = fails(script, *settings)
    assert "is the disk full? [Errno 28] No space left on device" in message and "log.jsonl" in message
    assert f"{tmp_path / name} holds iteration {held}" in message and "--resume=yes" in message
    assert contents(tmp_path / name)["iter"] == held
    of_script = tmp_path / ("log.jsonl" if script == "train.py" else "denoiser_log.jsonl")
    assert len(read_log(of_script)) == line - 1  # nothing follows a line that may be half written
    monkeypatch.undo()
    run(script, *settings, "--resume=yes")
    assert contents(tmp_path / name)["iter"] == 6


def test_a_disk_that_is_full_for_the_checkpoint_too_is_one_line(tmp_path, monkeypatch):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--max_iters=3")
    before = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt.part").symlink_to("/dev/full")
    monkeypatch.setattr(log, "open", FullDisk(1, again=True), raising=False)
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes", "--val_interval=50")
    assert "cannot write checkpoint" in line and "the one before it is kept" in line
    assert (tmp_path / "ckpt.pt").read_bytes() == before


def test_ranks_end_together_where_the_log_cannot_be_written(tmp_path):
    program = script(tmp_path, "")
    program.write_text(program.read_text().replace("from model import NTM", "from model import NTM; from plumbing import log; "
                                                   "log.open = lambda path, mode, **_: open('/dev/full', mode)"))
    status, _, err = ranks_of(2, program, *TRAIN, "--val_interval=50", f"--out_dir={tmp_path / 'run'}")
    assert status != 0 and "Traceback" not in err
    assert f"{tmp_path / 'run' / 'log.jsonl'}, is the disk full?" in err
    assert contents(tmp_path / "run" / "ckpt.pt")["iter"] == 2


@pytest.mark.parametrize("damage", [b"", b"{", bytes(100), b"\xff"])
def test_damaged_settings_of_a_folder_of_samples_are_named(copied, damage):
    command = ["sample.py", *SAMPLE, f"--out_dir={copied}", "--layout=flat", "--prompt=the digit one"]
    path = copied / "images" / ".settings.json"
    path.parent.mkdir()
    path.write_bytes(damage)
    run(*command)  # nothing is beside it
    whole = path.read_bytes()
    assert json.loads(whole)["prompt"] == "the digit one"
    path.write_bytes(damage)
    line = fails(*command)
    assert f"{path} is damaged" in line and "remove it" in line and "another folder" in line
    assert path.read_bytes() == damage
    path.unlink()
    run(*command)
    assert path.read_bytes() == whole


def test_a_damaged_denoiser_is_named_with_a_way_on(copied):
    (copied / "denoiser.pt").write_bytes(b"PK")
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}")
    assert "denoiser.pt" in line and "truncated" in line and "--denoise=score" in line
    run("sample.py", *SAMPLE, f"--out_dir={copied}", "--denoise=score")


# ---------------------------------------------------------------------------------------------------------------
# Checkpoints by time, and those that stay


def test_checkpoints_by_time(tmp_path, monkeypatch):
    """A clock on which an update takes ten minutes: every 15 minutes is every second update."""
    now, saved, forward, save = [0.0], [], NTM.forward, checkpoint.save

    def ten_minutes(*args):
        now[0] += 600
        return forward(*args)

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(NTM, "forward", ten_minutes)
    monkeypatch.setattr(checkpoint, "save", lambda path, **held: saved.append(held["iter"]) or save(path, **held))
    settings = [*TRAIN, "--val_interval=5", "--max_iters=12"]
    run("train.py", *settings, f"--out_dir={tmp_path / 'often'}")
    assert saved == [2, 4, 5, 7, 9, 10, 12]  # validations, of 5 and 10, save too, and the clock starts anew
    saved.clear()
    run("train.py", *settings, f"--out_dir={tmp_path / 'hourly'}", "--save_minutes=60")
    assert saved == [5, 10, 12]
    saved.clear()
    run("train.py", *settings, f"--out_dir={tmp_path / 'never'}", "--save_minutes=0")
    assert saved == [5, 10, 12]
    assert same_training(tmp_path / "often" / "ckpt.pt", tmp_path / "never" / "ckpt.pt")


def test_ranks_agree_when_a_checkpoint_is_due(tmp_path):
    """The first rank's clock decides: the others' runs a day ahead here."""
    program = script(tmp_path, "")
    program.write_text(program.read_text().replace("from model import NTM", """from model import NTM
import time
from plumbing import checkpoint
if os.environ["RANK"] == "1":
    clock, days = time.perf_counter, iter(range(10**9))
    time.perf_counter = lambda: clock() + 86400 * next(days)
save = checkpoint.save
checkpoint.save = lambda path, **held: (print("saved", held["iter"]), save(path, **held))
"""))
    for minutes, expected in ((15, [3, 6]), (1e-9, [1, 2, 3, 4, 5, 6])):
        out = on_ranks(2, program, *TRAIN, f"--save_minutes={minutes}", f"--out_dir={tmp_path / str(minutes)}")
        assert [int(line.split()[1]) for line in out.splitlines() if line.startswith("saved")] == expected


def kept(folder, stem="ckpt"):
    return {path.name: contents(path)["iter"] for path in folder.glob(f"{stem}*.pt")}


@pytest.mark.parametrize("links", [True, False])
def test_as_many_checkpoints_stay_as_are_asked_for(tmp_path, monkeypatch, links):
    if not links:  # a file system without
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError(errno.EPERM, "no links")))
    settings = [*TRAIN, "--val_interval=2", "--save_minutes=1e-9"]  # those by time are ckpt.pt alone
    run("train.py", *settings, f"--out_dir={tmp_path / 'one'}", "--max_iters=4")
    assert kept(tmp_path / "one") == {"ckpt.pt": 4}
    run("train.py", *settings, f"--out_dir={tmp_path}", "--keep=2", "--max_iters=4")
    assert kept(tmp_path) == {"ckpt.pt": 4, "ckpt_000002.pt": 2, "ckpt_000004.pt": 4}
    assert (tmp_path / "ckpt.pt").samefile(tmp_path / "ckpt_000004.pt") == links  # no room for a second copy
    interrupted_run(NTM, 3, "train.py", *settings, f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=9")
    assert kept(tmp_path) == {"ckpt.pt": 7, "ckpt_000004.pt": 4, "ckpt_000006.pt": 6}
    fourth = tmp_path / "another place"
    shutil.copy(tmp_path / "ckpt_000004.pt", fourth)
    run("train.py", f"--out_dir={tmp_path}", "--resume=yes")  # goes on keeping two
    assert kept(tmp_path) == {"ckpt.pt": 9, "ckpt_000008.pt": 8, "ckpt_000009.pt": 9}
    assert not list(tmp_path.glob("*.part"))

    # a run that goes back, by `ln -f`, leaves those of later iterations until it gets there
    (tmp_path / "ckpt.pt").unlink()
    (tmp_path / "ckpt.pt").hardlink_to(fourth) if links else shutil.copy(fourth, tmp_path / "ckpt.pt")
    run("train.py", f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=6", "--seed=1")
    assert kept(tmp_path) == {"ckpt.pt": 6, "ckpt_000006.pt": 6, "ckpt_000008.pt": 8, "ckpt_000009.pt": 9}
    run("train.py", f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=12", "--keep=3")
    assert kept(tmp_path) == {"ckpt.pt": 12, "ckpt_000009.pt": 9, "ckpt_000010.pt": 10, "ckpt_000012.pt": 12}


def test_denoisers_are_kept_too(copied):
    (copied / "denoiser.pt").unlink()
    run("distill.py", *DISTILL, f"--out_dir={copied}", "--keep=2")
    assert kept(copied, "denoiser") == {"denoiser.pt": 6, "denoiser_000003.pt": 3, "denoiser_000006.pt": 6}


def test_kept_checkpoints_are_not_mixed_with_those_of_another_run(tmp_path):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--keep=2")
    (tmp_path / "ckpt.pt").unlink()
    for resume in checkpoint.RESUME:
        line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", f"--resume={resume}")
        assert "ckpt_000006.pt beside it: copy that to ckpt.pt" in line and "another --out_dir" in line
    assert kept(tmp_path) == {"ckpt_000003.pt": 3, "ckpt_000006.pt": 6}


def test_a_checkpoint_that_cannot_be_kept_is_one_line(tmp_path):
    (tmp_path / "ckpt_000003.pt" / "in the way").mkdir(parents=True)
    (tmp_path / "ckpt_000003.pt").rename(tmp_path / "ckpt_000003.pt.part")
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--keep=2")
    assert f"cannot keep {tmp_path / 'ckpt_000003.pt'}" in line and "ckpt.pt holds iteration 3" in line


# ---------------------------------------------------------------------------------------------------------------
# Weights & Biases


def test_wandb_is_named_when_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'without'}", "--wandb_log=True")
    assert "pip install wandb" in line

    (tmp_path / "empty" / "wandb").mkdir(parents=True)  # what its logs leave behind can be imported, and is not it
    monkeypatch.delitem(sys.modules, "wandb")
    monkeypatch.syspath_prepend(tmp_path / "empty")
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'without'}", "--wandb_log=True")
    assert "pip install wandb" in line


@pytest.fixture
def wandb(monkeypatch):
    """A wandb that remembers what it is asked for: begun, what runs were begun with; told, what they logged."""
    class Run:
        def __init__(self, entity="me", project="ntm", id=None):
            self.entity, self.project, self.id = entity, project, id or f"run{len(Wandb.begun)}"

        def log(self, values, step):
            Wandb.told.append({**values, "iter": step})

    class Wandb:
        begun, told, broken, Image = [], [], "", staticmethod(lambda sheet: sheet.size)

        @staticmethod
        def init(config, resume, **place):
            if Wandb.broken:
                raise RuntimeError(Wandb.broken)
            assert resume == "allow"
            Wandb.begun.append({"max_iters": config["max_iters"], **place})
            return Run(**place)

    monkeypatch.setitem(sys.modules, "wandb", Wandb)
    return Wandb


@pytest.mark.parametrize("script", ["train.py", "distill.py"])
def test_wandb_is_told_everything_and_a_resumed_run_goes_on_there(tmp_path, wandb, script):
    """Every line of the log and every sheet; and after resuming in the same run, whatever the environment says."""
    settings, log, sheets = [*TRAIN, f"--out_dir={tmp_path}"], "log.jsonl", "samples/{:06d}.png"
    if script == "distill.py":
        run("train.py", *settings)
        settings, log, sheets = [*DISTILL, f"--out_dir={tmp_path}"], "denoiser_log.jsonl", "samples/denoiser_{:06d}.png"
    run(script, *settings, "--max_iters=3", "--wandb_log=True")
    run(script, f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=6")
    assert wandb.begun == [{"max_iters": 3}, {"max_iters": 6, "entity": "me", "project": "ntm", "id": "run1"}]
    assert [line for line in wandb.told if "samples" not in line] == read_log(tmp_path / log)
    shown = {line["iter"]: line["samples"] for line in wandb.told if "samples" in line}
    assert shown == {i: Image.open(tmp_path / sheets.format(i)).size for i in (3, 6)}
    steps = [line["iter"] for line in wandb.told]
    assert steps == sorted(steps)  # it drops what goes back

    (tmp_path / log).with_suffix(".wandb").write_text('{"id": ')
    *_, notes = run_with_notes(script, f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=7")
    assert wandb.begun[-1] == {"max_iters": 7} and "is damaged: Weights & Biases gets a new run" in "".join(notes)
    assert json.loads((tmp_path / log).with_suffix(".wandb").read_text())["id"] == "run3"


def test_a_new_run_does_not_go_on_in_an_old_one_of_wandb(tmp_path, wandb):
    settings = [*TRAIN, f"--out_dir={tmp_path}", "--max_iters=1", "--val_interval=1", "--wandb_log=True"]
    run("train.py", *settings)
    (tmp_path / "ckpt.pt").unlink()
    run("train.py", *settings)
    assert wandb.begun == [{"max_iters": 1}] * 2


def test_wandb_that_does_not_start_says_why(tmp_path, wandb):
    wandb.broken = "api_key not configured (no-tty)\nand a lot more"
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'run'}", "--wandb_log=True")
    assert "wandb does not start (api_key not configured (no-tty))" in line and "WANDB_MODE=offline" in line
    assert not (tmp_path / "run").exists()
