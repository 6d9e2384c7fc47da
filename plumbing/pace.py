"""How many updates fit into a run's time, estimated from the speed of its first updates."""

import time

from plumbing.runtime import from_first_rank

UNKNOWN = 10**9  # max_iters, until the speed is known
MEASURED = 0.02  # least share of the time over which the speed is measured
LATEST = 0.1  # share of the time after which the measurement ends in any case: updates may be slow


class Pace:
    """What sets a run's max_iters, and with it the schedule of its learning rate, if config has `minutes`.

    The minutes count from the construction of this object to the last update, compilation included. Once max_iters is
    known, config's minutes is set to 0: the checkpoint then stores max_iters, and a resumed run ends there too.
    """

    def __init__(self, config):
        self.config = config
        self.seconds = 60 * config["minutes"]
        self.start = time.perf_counter()
        self.times = []  # when each update ended
        if self.seconds:
            config["max_iters"] = UNKNOWN

    def updated(self, done):
        """Record an update, the `done`-th; called on all ranks. Returns whether this update has settled max_iters."""
        if not self.config["minutes"]:
            return False
        self.times.append(time.perf_counter())
        count = len(self.times)
        if count < 8 or count & (count - 1):  # only powers of two: asking the first rank takes time
            return False
        remaining = from_first_rank(self.remaining)
        if remaining is None:
            return False
        self.config["max_iters"] = done + remaining
        self.config["minutes"] = 0.0
        return True

    def remaining(self):
        """How many updates still fit, by the speed of the later half of those so far; None: keep measuring."""
        half = len(self.times) // 2
        measured = self.times[-1] - self.times[half - 1]
        elapsed = self.times[-1] - self.start
        if measured < MEASURED * self.seconds and elapsed < LATEST * self.seconds:
            return None
        self.update = measured / (len(self.times) - half)
        return max(1, int((self.seconds - elapsed) / self.update))
