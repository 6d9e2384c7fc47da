"""One run at a time in a folder, by a lock that the operating system releases when its process ends."""

import contextlib
import os
import socket
import sys
from pathlib import Path

from plumbing.runtime import check_compile, gathered, leave_ranks, note, one_line_errors, rank_and_world, start_ranks

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".lock"
AFTER_CTRL_C = 130  # the exit status that shells expect


def lock_file(file, wait=False):
    """Lock an open file until it is closed.

    Raises BlockingIOError or PermissionError where another process holds the lock, unless `wait` is True, and OSError
    where files cannot be locked: on Windows and on some network file systems.
    """
    if fcntl is None:
        raise OSError("this platform has no fcntl")
    # not flock: processes that load data would inherit the lock, and they may outlive the run
    fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


class Lock:
    """The lock of a folder, held until the context ends.

    Raises ValueError if another process holds it, or if the folder cannot be written to. Where files cannot be locked,
    as on some network file systems, a note says so.
    """

    def __init__(self, folder):
        self.path = Path(folder) / NAME
        self.made_folder = not self.path.parent.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.file = open(self.path, "a+", encoding="utf-8", errors="replace")
        except OSError as error:
            raise ValueError(f"out_dir {folder} cannot be written to ({error}): choose another --out_dir") from error
        try:
            lock_file(self.file)
        except (BlockingIOError, PermissionError):
            self.file.seek(0)
            holder = self.file.read(200).strip() or "another process"
            self.file.close()
            raise ValueError(f"another run is at work in out_dir {folder} ({holder}): wait for its end, or choose "
                             "another --out_dir") from None
        except OSError as error:
            note(f"out_dir {folder} cannot be locked ({error}): make sure that no other run writes there")
        with contextlib.suppress(OSError):  # on a full disk the lock works without a name in it
            self.file.truncate(0)
            self.file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.file.flush()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with contextlib.suppress(OSError):
            if os.listdir(self.path.parent) == [NAME]:  # the run has left nothing, for instance after a wrong setting
                self.path.unlink()
                if self.made_folder:
                    self.path.parent.rmdir()
        with contextlib.suppress(OSError):
            self.file.close()


def lock_folder(folder):
    """A context in which no other run of train.py or distill.py works in the folder.

    The first rank holds the lock; if it is refused, all ranks raise ValueError.
    """
    lock, refusal = contextlib.nullcontext(), ""
    if rank_and_world()[0] == 0:
        try:
            lock = Lock(folder)
        except ValueError as error:
            refusal = str(error)
    if refusal := gathered(refusal)[0]:
        raise ValueError(refusal)
    return lock


def run_alone(config, Run, loop):
    """Do what train.py and distill.py share: join the ranks, lock out_dir, set up Run(config, ranks), call loop(run).

    A mistake in the settings is reported in one line. After Ctrl-C, when loop has saved, the exit status is 130.
    """
    with one_line_errors():
        check_compile(config)
        ranks = start_ranks(config["device"])
        lock = lock_folder(config["out_dir"])
    with lock:
        with one_line_errors():
            run = Run(config, ranks)
        loop(run)
    # After Ctrl-C a calling script or make must not go on; after a job scheduler's signal the job's script must.
    status = AFTER_CTRL_C if run.progress.interrupted and run.batches.interrupt.by_keyboard else 0
    leave_ranks(status)
    if status:
        sys.exit(status)
