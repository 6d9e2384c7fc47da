"""What a run reports and records: log.jsonl, log.png and the progress bar; and when a run has to give up."""

import contextlib
import json
import math
import os
import time
from collections import defaultdict

from tqdm import tqdm

from plumbing import checkpoint
from plumbing.images import save_image
from plumbing.pace import UNKNOWN, Pace
from plumbing.plots import plot
from plumbing.records import read_record
from plumbing.runtime import gathered, note

CURVES = {"loss": "loss", "val_loss": "loss", "val_mse": "loss", "val_bound": "nats per dimension", "val_psnr": "dB"}
PATIENCE = 10  # updates skipped in a row before a run gives up


class Log:
    """A run's log, the file `path` (log.jsonl or denoiser_log.jsonl), one JSON object a line.

    A resumed run drops the lines from after its checkpoint, and damaged ones with a note. With wandb_log, each line
    also goes to Weights & Biases, to the run that the .wandb file beside the log names. fault: why a line could not be
    written, or "".
    """

    def __init__(self, path, start, config):
        self.path, self.wandb, self.fault = path, None, ""
        if config["wandb_log"]:
            self.wandb = start_wandb(path.with_suffix(".wandb"), start, config)
        path.parent.mkdir(parents=True, exist_ok=True)
        self.lacks_validation = False
        if start and path.exists():
            self.go_back_to(start)
        else:
            path.write_text("", "utf-8")

    def go_back_to(self, start):
        """Drop the lines that a resumed run does not continue: those of iterations after `start`, and damaged ones."""
        text = self.path.read_text(encoding="utf-8", errors="replace")
        *lines, rest = text.split("\n")  # the rest is "", or the line that a killed run was writing
        records = [read_record(line) for line in lines]
        if damaged := records.count(None):
            first = lines[records.index(None)]
            note(f"{damaged} damaged lines of {self.path} are dropped, the first of them {first[:60]!r}")
        kept = [(line, record) for line, record in zip(lines, records) if record and record["iter"] <= start]
        if rest or len(kept) < len(lines):
            part = self.path.with_name(self.path.name + ".part")
            part.write_text("".join(line + "\n" for line, _ in kept), "utf-8")
            os.replace(part, self.path)
        # a run may have been killed between a checkpoint and its validation
        self.lacks_validation = bool(kept) and "loss" in kept[-1][1]

    def write(self, **values):
        """Add a line. If that fails, for instance on a full disk, `fault` says so and no more lines are written."""
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        if not self.fault:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(finite) + "\n")
            except OSError as error:
                self.fault = f"cannot write {self.path}, is the disk full? {error}"
        if self.wandb:
            self.wandb.log(finite, step=values["iter"])

    def plot(self):
        """Draw the log's curves against iterations into the .png of the same name."""
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        records, panels = [record for record in map(read_record, lines) if record], defaultdict(dict)
        for name, title in CURVES.items():
            if points := [(record["iter"], record[name]) for record in records if record.get(name) is not None]:
                panels[title][name] = points
        # a run's first losses are hundreds of times its last: the axis leaves them out
        save_image(plot(panels, "iteration", shown=0.95), self.path.with_suffix(".png"))


def start_wandb(path, start, config):
    """Start a run of Weights & Biases, or if `start` is not 0 continue the one that the file `path` names; return it.

    The file then names this run. Raises ValueError if wandb is not installed or does not start.
    """
    try:
        from wandb import init  # not `import wandb`, which takes the folder wandb/ of old logs
    except ImportError as error:
        raise ValueError("wandb_log needs wandb: `pip install wandb`, or leave wandb_log out") from error
    place = {}
    if start and path.exists():
        try:
            place = dict(json.loads(path.read_text("utf-8")))
        except (ValueError, TypeError):
            note(f"{path} is damaged: Weights & Biases gets a new run")
    try:
        run = init(config=dict(config), resume="allow", **place)
    except Exception as error:  # not logged in, no network, and whatever else its versions raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"wandb_log is True, but wandb does not start ({reason}): mend it, set WANDB_MODE=offline, or "
                         "leave it out") from error
    named = {name: getattr(run, name, None) for name in ("entity", "project", "id")}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({name: value for name, value in named.items() if value}) + "\n", "utf-8")
    return run


class Progress:
    """The bar and the log of a run from iteration `start` on, which only rank 0 has, and the run's counts.

    path: the checkpoint's. counts: the checkpoint's, from which those of a resumed run go on.
    """

    def __init__(self, path, log_name, config, start, counts, rank):
        self.path, self.config, self.start = path, config, start
        self.before = {"skipped": 0, "unusable": 0, "cut": 0, **counts}
        self.counts = dict(self.before)
        self.skipped_in_a_row = 0
        self.interrupted = False
        self.log = Log(path.with_name(log_name), start, config) if rank == 0 else None
        self.pace = Pace(config)

    def __enter__(self):
        self.since, self.logged, self.waited = time.perf_counter(), self.start, 0.0
        self.saved_at = self.since
        stop = self.config["max_iters"]
        total = None if stop == UNKNOWN else stop
        done = self.start >= stop
        if self.log and done:
            print(f"nothing to do: {self.path} holds iteration {self.start}, and max_iters is {stop}")
        silent = done or self.log is None
        self.bar = tqdm(total=total, initial=self.start, disable=silent, unit="it", dynamic_ncols=True)
        return self

    def __exit__(self, *error):
        self.bar.close()

    def iterations(self):
        """Yield the iterations from `start` to max_iters, which Pace may set on the way."""
        i = self.start
        while i < self.config["max_iters"]:
            yield i
            i += 1

    def validation_due(self, i):
        """Whether to validate after i iterations."""
        return i % self.config["val_interval"] == 0 or i == self.config["max_iters"]

    def validation_missing(self):
        """Whether a run was killed between its last checkpoint and the validation that was due."""
        due = self.start > 0 and self.validation_due(self.start)
        return due and gathered(self.log and self.log.lacks_validation)[0]

    def asks(self):
        """What only the first rank can tell, {name: bool}; by its sum over the ranks all act after the same iteration.

        "save_due": save_minutes have passed since the last checkpoint. "log_failed": the log cannot be written, so the
        run has to end.
        """
        if not self.log:
            return {"save_due": False, "log_failed": False}
        seconds = 60 * self.config["save_minutes"]
        due = seconds > 0 and time.perf_counter() - self.saved_at >= seconds
        return {"save_due": due, "log_failed": bool(self.log.fault)}

    def record(self, i, losses, lr, totals, finite, waited):
        """Count iteration i; log it at every log_interval and where the run ends or validates.

        losses: {name: number} to log. totals, over all ranks: "grad_norm"; whether an end was "asked" for; examples
        "unusable" and captions "cut" since the start. finite: True for an update, False for one that was skipped.
        waited: seconds that this rank has waited for data so far.
        """
        self.counts["skipped"] += not finite
        for name in ("unusable", "cut"):
            self.counts[name] = self.before[name] + int(totals[name])
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        self.last = losses["loss"], totals["grad_norm"], lr
        unusable, seen = self.counts["unusable"], i * self.config["batch_size"]
        self.spoilt = unusable >= 10 and unusable > self.config["bad_limit"] * seen
        self.bar.update()
        if self.pace.updated(i) and self.log:
            self.bar.total = self.config["max_iters"]
            self.bar.write(f"{self.bar.total} iterations fit into {self.pace.seconds / 60:.3g} minutes")
        ends = totals["asked"] or self.spoilt or self.skipped_in_a_row == PATIENCE or self.validation_due(i)
        if self.log and (ends or i % self.config["log_interval"] == 0):
            self.write(i, losses, lr, totals["grad_norm"], waited)

    def write(self, i, losses, lr, grad_norm, waited):
        """Write a line of the log, and show it on the bar, with the speed since the line before."""
        now = time.perf_counter()
        seconds = now - self.since
        rate = (i - self.logged) * self.config["batch_size"] / seconds
        wait = (waited - self.waited) / seconds
        self.since, self.logged, self.waited = now, i, waited
        shown = {name: count for name, count in self.counts.items() if count}
        self.bar.set_postfix(loss=f"{losses['loss']:.3f}", images_per_s=f"{rate:.0f}", data_wait=f"{wait:.0%}", **shown)
        speed = {"images_per_s": round(rate, 1), "data_wait": round(wait, 3)}
        self.log.write(iter=i, **losses, lr=lr, grad_norm=grad_norm, **speed, **self.counts)

    def save_due(self, i, totals):
        """Whether a checkpoint is due after i iterations; totals: those of record(), with asks() over all ranks."""
        if self.skipped_in_a_row == PATIENCE:  # the run ends, and the last checkpoint's weights may be better
            return False
        asked = totals["asked"] or totals["save_due"] or totals["log_failed"]
        return bool(self.validation_due(i) or asked or self.spoilt)

    def saved(self, i):
        """Note that the checkpoint now holds iteration i; after a validation, keep a copy if there are to be any."""
        self.saved_at = time.perf_counter()
        if self.log and self.validation_due(i) and self.config["keep"] > 1:
            checkpoint.keep(self.path, i, self.config["keep"])

    def stop_if_hopeless(self, i, totals, faults):
        """Raise SystemExit where too many updates or examples are unusable, or the log cannot be written.

        faults: what was wrong with examples of this rank.
        """
        if self.skipped_in_a_row == PATIENCE:
            loss, grad_norm, lr = self.last
            raise SystemExit(f"loss or gradient was not finite {PATIENCE} times in a row (loss {loss}, gradient norm "
                             f"{grad_norm}); stopped at iteration {i}, none of it in {self.path}: lower lr (now "
                             f"{lr:.1e}) or grad_clip, or lengthen warmup_iters")
        if self.spoilt:
            first = []
            for of_a_rank in gathered(faults[:10]):
                first += of_a_rank
            raise SystemExit(f"{self.counts['unusable']} of {i * self.config['batch_size']} examples are unusable, "
                             f"more than bad_limit {self.config['bad_limit']} allows; stopped at iteration {i}, which "
                             f"{self.path} holds. The first are: {'; '.join(first[:10])}")
        if totals["log_failed"]:
            self.stop_without_log(i)

    def stopped(self, i, totals):
        """Whether the run was asked to end after i iterations, before its last one. Raises as stop_without_log."""
        if i == self.config["max_iters"]:
            self.stop_without_log(i)
            return False
        self.interrupted = bool(totals["asked"])
        if self.interrupted and self.log:
            self.bar.write(f"interrupted: {self.path} holds iteration {i}; continue with --resume=yes")
        return self.interrupted

    def stop_without_log(self, i):
        """Raise SystemExit, on all ranks, if the log could not be written; iteration i has been saved before."""
        fault, *_ = gathered(self.log.fault if self.log else "")
        if fault:
            raise SystemExit(f"{fault}; {self.path} holds iteration {i}: make room, and continue with --resume=yes")

    def validated(self, i, values):
        """Record what a validation measured, {name: float}."""
        if self.log:
            self.log.write(iter=i, **values)
            with self.worth_a_warning(f"{self.log.path.with_suffix('.png')} is not drawn at iteration {i}"):
                self.log.plot()
            self.bar.write(f"iteration {i}: " + ", ".join(f"{name} {v:.4f}" for name, v in values.items()))
        self.since = time.perf_counter()  # the rate in the log leaves out validation

    def show(self, i, sheet, path):
        """Save a sheet of samples of iteration i, a PIL.Image, to `path`, and with wandb_log to Weights & Biases."""
        save_image(sheet, path)
        if self.log.wandb:
            from wandb import Image
            self.log.wandb.log({"samples": Image(sheet)}, step=i)

    def a_sheet(self, i):
        """A context for drawing a sheet of samples: an error in it, even for want of memory, does not end training."""
        return self.worth_a_warning(f"there is no sheet of samples of iteration {i}")

    @contextlib.contextmanager
    def worth_a_warning(self, what):
        """A context in which an error becomes a warning that says `what`, and why."""
        try:
            yield
        except Exception as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.bar.write(f"warning: {what}: {reason}")
