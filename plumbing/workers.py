"""Processes that load data, and the orderly end of a run if one of them dies or hangs."""

import atexit
import contextlib
import errno
import functools
import multiprocessing
import os
import re
import shutil
import signal
import time
from multiprocessing.connection import wait
from multiprocessing.queues import Queue

from torch.utils.data import DataLoader

from plumbing.runtime import CAN_FORK, ENDING, note

LONGEST_WAIT = 480  # seconds for a batch; less than the ten minutes after which other ranks give up on this rank
SHARED_MEMORY = "/dev/shm"


class ReadAhead:
    """The batches of a data set, loaded ahead by `workers` processes, or with 0 on demand by this process.

    An iterator, and a context at whose end the processes end. batches: lists of numbers. asked: a function that says
    whether a signal asks for an end; if so, a missing batch is not waited for. settings: of torch's DataLoader. Raises
    OSError or ValueError with one line for faults of the data or of a process that loads them.
    """

    def __init__(self, dataset, batches, workers, asked=lambda: False, **settings):
        if workers and not CAN_FORK:
            note(f"workers is {workers}, but this platform cannot fork processes: the training process loads the data")
            workers = 0
        self.workers, self.asked, self.in_order = workers, asked, True
        others = multiprocessing.active_children()
        # Fork: a fresh interpreter would run the script again. A timeout of 1 s, so that signals are seen.
        loader = DataLoader(dataset, batch_sampler=batches, num_workers=workers, timeout=1 if workers else 0,
                            worker_init_fn=start_loading, multiprocessing_context="fork" if workers else None,
                            **settings)
        try:
            if workers:
                multiprocessing.get_context("fork").Lock()  # fails where the loader would, but with one line
            self.loaded = iter(loader)
        except OSError as error:
            end(process for process in multiprocessing.active_children() if process not in others)
            raise OSError(f"{workers} processes that load data cannot be started ({error}): set fewer workers, or 0, "
                          f"and see that {SHARED_MEMORY} is there and has room") from error
        self.processes = [process for process in multiprocessing.active_children() if process not in others]
        self.last_resort = functools.partial(end, self.processes)
        atexit.register(self.last_resort)  # Python would wait for the processes, which ignore SIGTERM
        if workers:
            # torch's own handler may raise in the middle of an update
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if not self.in_order:
            end(self.processes)  # first, since a process that hangs would delay the end of the others
        self.loaded = None  # the last reference: torch now tells the processes to end
        end(self.processes)
        atexit.unregister(self.last_resort)

    def __iter__(self):
        return self

    def __next__(self):
        began = time.monotonic()
        try:
            while True:
                self.check_processes()
                with contextlib.suppress(NotYet):
                    return self.next_in_a_second()
                self.check_wait(time.monotonic() - began)
        except (ValueError, OSError):
            self.in_order = False
            raise

    def next_in_a_second(self):
        """The next batch. Raises NotYet if it takes longer than a second, or ValueError or OSError with one line."""
        try:
            return next(self.loaded)
        except (ValueError, OSError, EOFError, MemoryError, RuntimeError) as error:
            text = str(error).strip()
            if isinstance(error, RuntimeError) and text.startswith("DataLoader timed out"):
                raise NotYet from None
            of_a_process = "Original Traceback" in text
            if isinstance(error, RuntimeError) and (of_a_process or not self.workers):
                raise  # a mistake in the program
            if not of_a_process:
                # a process that dies may leave half a message, and take long to die on a busy machine
                self.check_processes(patience=10 if self.processes else 0)
            line = text.splitlines()[-1].partition(": ")[2] if of_a_process else text.partition("\n")[0]
            if isinstance(error, MemoryError):
                line = f"memory ran out while data were loaded: {self.fewer()}"
            raise (ValueError if isinstance(error, ValueError) else OSError)(line) from None

    def check_processes(self, patience=0):
        """Raise ChildProcessError, with a remedy, if a loading process has died or dies in `patience` seconds."""
        ended = wait([process.sentinel for process in self.processes], patience)
        for process in self.processes:
            if process.sentinel in ended:
                process.join(1)  # its pipe closes a moment before the system counts it as dead
            if not process.is_alive():
                raise ChildProcessError(f"a process that loads data has died: {self.reason(process.exitcode)}")

    def reason(self, status):
        """Why a process died, by its exit status, and the remedy."""
        if status == errno.EMFILE:
            return f"too many files are open: raise the limit with `ulimit -n 65536`, or {self.fewer()}"
        if status in (errno.ENOSPC, errno.ENOMEM, -signal.SIGBUS):
            room = ""
            with contextlib.suppress(OSError):
                room = f" ({shutil.disk_usage(SHARED_MEMORY).total / 2**20:.0f} MB)"
            return (f"{SHARED_MEMORY}{room} has no room for the batches: give the container more, as with `docker run "
                    f"--shm-size=8g`, or {self.fewer()}")
        if status == -signal.SIGKILL:
            return f"it was killed, as the system does when memory runs out: {self.fewer()}"
        return f"its exit status is {status}: {self.fewer()}, which loads in the training process"

    def fewer(self):
        """The remedy for want of memory, in words."""
        return f"set fewer workers than {self.workers}, or 0" if self.workers else "set a smaller batch_size"

    def check_wait(self, seconds):
        """Raise InterruptedError if an end is asked for, and TimeoutError after LONGEST_WAIT seconds."""
        if self.asked():
            raise InterruptedError("interrupted while waiting for data")
        if seconds > LONGEST_WAIT:
            raise TimeoutError(f"no batch came for {seconds:.0f} s, so the processes that load data hang: check "
                               "whether the data's disk responds, and resume with --workers=0 to see where")


class NotYet(Exception):
    """A batch takes longer than a second."""


def start_loading(number):
    """Prepare a process that loads data: it ignores signals, and dies if it cannot hand on a batch.

    If it lived on, the training process would wait for that batch.
    """
    leave_signals_to_the_trainer()
    Queue._on_queue_feeder_error = staticmethod(die)  # a hook, in this process's own copy of the class


def leave_signals_to_the_trainer():
    """Ignore signals from a terminal or scheduler: these processes must outlive the update that a signal interrupts."""
    for number in ENDING:
        signal.signal(number, signal.SIG_IGN)


def die(error, batch):
    """End the process with the system's error number as its status; torch's messages end with that number."""
    number = re.search(r"\((\d+)\)$", str(error))
    os._exit(int(number[1]) if number else getattr(error, "errno", None) or 1)


def end(processes):
    """Kill processes that load: they may hang in a read, and they ignore SIGTERM."""
    for process in processes:
        process.kill()
        process.join(5)
