"""From pictures to a judged model of 64x64 emoji in a given time, on one device: what speedrun.sh calls.

    bash speedrun.sh                              ten minutes, into out/speedrun
    MINUTES=60 bash speedrun.sh --width=512       an hour, with a wider network

pictures -> judge -> flow matching -> NTM -> denoiser -> sheet -> judged samples. Each stage takes its share of the time
that is left; a training's iterations follow from the speed of its own first updates. After each stage RESULTS (default
OUT/results) holds weights in float16, a sheet and report.md; each file is whole, whenever the run is killed.
The same command then continues after the last stage that has ended; remove the folder OUT to start anew.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

from evidence.report import report
from evidence.update import EMOJI64, OF_NTM, cost_of, matrix_product_rate
from plumbing import checkpoint
from plumbing.records import read_record
from plumbing.paths import at_home
from plumbing.runtime import find_device, one_line_errors

ROOT = Path(__file__).parent.parent
# Shares of the time. Flow matching gets most: with the same number of images, long flow matching and a short NTM stage
# kept the styles, the reverse lost them (docs/log.md, 2026-11-26). An update of the NTM costs about twice as much, and
# its last steps go on improving. The denoiser stops improving after a few hundred updates. Most of the judging is
# sampling by flow matching in fifty steps.
SHARES = {"fm": 0.54, "ntm": 0.24, "denoiser": 0.11, "sheet": 0.03, "judged": 0.08}
LONG = 20  # minutes from which the whole network is compiled
COMBINATIONS = 735  # the number of combinations that are held out
# passes of a network for each judged combination: flow matching in 4, 8 and 50 steps and the NTM in 4, with guidance
# two passes a step; and one of the denoiser
PASSES = 2 * (4 + 8 + 50) + 2 * 4 + 1
# {stage: (earlier stage, entry of its results, pattern of files)}: results that the stage replaces by better ones
SUPERSEDED = {"ntm": ("fm", "files", "fm.pt*"), "sheet": ("ntm", "sheet", "ntm.png")}
PART = 15_000_000  # bytes of a file of results at most, so that it can be mailed


class Size(NamedTuple):
    """What suits a device."""

    network: dict  # settings of train.py
    batch: int
    around: float  # seconds that a stage takes before training and after it: start, validation, samples
    validation: int
    samples: int  # on train.py's sheets
    judge: int  # iterations of a judge's training, if there is no judge yet
    log_interval: int
    slower: float  # how many times as long as in training a pass takes in sampling: in float32, not compiled


# On a GPU: a network that fits into 40 MB in float16 and takes 20 GFLOP an image, in batches of 512; docs/scaling.md
SIZES = {
    "cuda": Size(dict(width=384, depth=6, heads=6, patch_size=4), 512, 18.0, 400, 25, 3000, 50, 4.0),
    "cpu": Size(dict(width=48, depth=2, heads=2, patch_size=8), 16, 6.0, 24, 6, 20, 5, 1.0),
}


def share_of(stage, left):
    """The seconds that a stage may take, if `left` seconds are left for this stage and all that follow."""
    names = list(SHARES)
    following = names[names.index(stage) :]
    return left * SHARES[stage] / sum(SHARES[name] for name in following)


# ---------------------------------------------------------------------------------------------------------------
# Results


def write_whole(path, data):
    """Write bytes to a file by way of a temporary one, so that there is never half a file."""
    part = path.with_name(path.name + ".tmp")
    path.parent.mkdir(parents=True, exist_ok=True)
    part.write_bytes(data)
    os.replace(part, path)


def place(data, folder, name, size=PART):
    """Write bytes to folder/name, or if they are more than `size` to name.00, name.01, ...; return the names."""
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    names = [name] if len(parts) == 1 else [f"{name}.{i:02d}" for i in range(len(parts))]
    for own, part in zip(names, parts):
        write_whole(folder / own, part)
    for other in folder.glob(f"{name}*"):  # of an earlier run
        if other.name not in names:
            other.unlink()
    return names


class Speedrun:
    """A run: its folder, what is known of its stages, and its clock. args: main()'s."""

    def __init__(self, args):
        self.args = args
        self.folder = Path(args.out)
        self.results = Path(args.results or self.folder / "results")
        self.data = Path(args.data_dir)
        self.device = find_device(args.device)
        self.size = SIZES["cuda" if self.device.type == "cuda" else "cpu"]
        own = {name: getattr(args, name) for name in self.size.network if getattr(args, name)}
        self.network = self.size.network | own
        self.batch = args.batch_size or self.size.batch
        self.path = self.folder / "speedrun.json"
        self.state = {"minutes": args.minutes, "spent": 0.0, "stages": {}}
        if self.path.exists():
            self.state = json.loads(self.path.read_text("utf-8")) | {"minutes": args.minutes}
        self.started = time.perf_counter()
        self.spent = self.state["spent"]
        self.costs = {}

    def seconds(self):
        """Seconds since the first start, without those of stages that were interrupted."""
        return self.spent + time.perf_counter() - self.started

    def left(self):
        """Seconds until the time is over, at least 0."""
        return max(0.0, 60 * self.args.minutes - self.seconds())

    def call(self, *command, limit=None):
        """Run a script, and ask it to save and end after `limit` seconds; return how many seconds it took.

        Raises ValueError where it fails.
        """
        before = time.perf_counter()
        command = [str(word) for word in command]
        print("$ python", *command, flush=True)
        process = subprocess.Popen([sys.executable, *command], cwd=ROOT)
        try:
            process.wait(limit)
        except subprocess.TimeoutExpired:
            process.terminate()
            process.wait()
        finally:
            if process.poll() is None:  # Ctrl-C here
                process.terminate()
                process.wait()
        if process.returncode:
            raise ValueError(f"{command[0]} ended with status {process.returncode}, as it says above: mend that and "
                             f"run again; what has ended is in {self.results}")
        return time.perf_counter() - before

    # -----------------------------------------------------------------------------------------------------------
    # Before the clock matters

    def prepare(self):
        """Make shards and judge if there are none, and measure how fast the chip multiplies matrices."""
        if not (self.data / "train").is_dir():
            pictures = Path(self.args.pictures)
            if not pictures.exists() and not shutil.which("npm"):
                raise ValueError(f"there are neither shards in {self.data} nor pictures in {pictures}, nor npm to "
                                 f"fetch them: where npm is, run `python data.py emoji --pictures={pictures}`, and "
                                 "bring that file here")
            self.call("data.py", "emoji", f"--pictures={pictures}", f"--out={self.data}")
        if not Path(self.args.judge).exists():
            self.call("-m", "evidence.judge", f"--data_dir={self.data}", f"--out={self.args.judge}",
                      f"--iterations={self.size.judge}", f"--device={self.device}")
        if "card" not in self.state:
            self.measure_card()
        self.passes = self.passes_of_an_update()
        self.keep()

    def passes_of_an_update(self):
        """Into how many passes to divide a batch, so that what the NTM's backward pass keeps fits into memory."""
        if self.device.type != "cuda":
            return 1
        room = 0.6 * torch.cuda.get_device_properties(self.device).total_memory
        kept = self.cost_of("coupled", EMOJI64 | OF_NTM | self.network).kept
        divisors = [passes for passes in range(1, self.batch + 1) if self.batch % passes == 0]
        fitting = (passes for passes in divisors if kept * self.batch / passes <= room)
        return next(fitting, self.batch)

    def cost_of(self, kind, config):
        """The Cost of evidence.update, computed once for each kind of network, as it takes seconds."""
        if kind not in self.costs:
            self.costs[kind] = cost_of(kind, config)
        return self.costs[kind]

    def measure_card(self):
        """Record the device, torch's version, and FLOP/s of matrix products in float32 and bfloat16."""
        cuda = self.device.type == "cuda"
        name = torch.cuda.get_device_name() if cuda else f"{self.device.type}, {torch.get_num_threads()} threads"
        rates = {"float32": matrix_product_rate(self.device, torch.float32)}
        rates["bfloat16"] = matrix_product_rate(self.device, torch.bfloat16)
        self.state |= {"card": name, "torch": torch.__version__, "rates": rates}
        self.state["precision"] = "bfloat16" if cuda else "float32"  # of training, by train.py's default

    def keep(self):
        self.state["spent"] = self.seconds()
        write_whole(self.path, json.dumps(self.state, indent=1).encode())

    # -----------------------------------------------------------------------------------------------------------
    # Stages

    def train(self, stage, script, out, *settings):
        """Run train.py or distill.py for a stage, in the stage's share of the time."""
        batch, passes = self.batch, self.passes
        if stage == "denoiser":  # targets are costly, and more updates of smaller batches help more
            batch, passes = max(8, batch // 8), 1
        self.forget(stage, out)
        share = share_of(stage, self.left())
        minutes = max(share - self.size.around, 0.2 * share, 1.0) / 60  # above 0, which would be no limit
        self.call(script, *settings, f"--out_dir={out}", f"--device={self.device}", f"--minutes={minutes:.4f}",
                  f"--batch_size={batch}", f"--grad_accum={passes}", "--in_memory=True", f"--workers={self.workers()}",
                  f"--compile={self.compile()}", f"--val_interval={10**6}", f"--val_examples={self.size.validation}",
                  f"--num_samples={self.size.samples}", f"--log_interval={self.size.log_interval}",
                  limit=60 + 1.5 * share)

    def compile(self):
        """The setting `compile`: in a short run, layers compiled sooner are worth more than faster updates."""
        if self.device.type != "cuda":
            return False
        return "layers" if self.args.minutes < LONG else True

    def workers(self):
        return min(8, max(1, (os.cpu_count() or 3) - 2)) if self.device.type == "cuda" else 0

    def forget(self, stage, out):
        """Remove what an unfinished run of a stage has left in `out`."""
        if stage == "denoiser":
            for path in Path(out).glob("denoiser*"):
                path.unlink()
        else:
            shutil.rmtree(out, ignore_errors=True)

    def fm(self):
        out = self.folder / "fm"
        sizes = [f"--{name}={value}" for name, value in self.network.items()]
        self.train("fm", "train.py", out, "config/emoji64_fm.py", f"--data_dir={self.data}", *sizes)
        return self.trained(out / "ckpt.pt", out / "log.jsonl", "fm.pt") | {"sheet": self.sheet_of(out, "fm.png")}

    def ntm(self):
        out = self.folder / "ntm"
        self.train("ntm", "train.py", out, "config/emoji64.py", f"--data_dir={self.data}",
                   f"--init_from={self.folder / 'fm' / 'ckpt.pt'}")
        return self.trained(out / "ckpt.pt", out / "log.jsonl", "ckpt.pt") | {"sheet": self.sheet_of(out, "ntm.png")}

    def denoiser(self):
        out = self.folder / "ntm"
        self.train("denoiser", "distill.py", out, "--ema=0.99")
        return self.trained(out / "denoiser.pt", out / "denoiser_log.jsonl", "denoiser.pt")

    def trained(self, path, log, name):
        """Put the weights in float16 among the results; return what the log says of the run, and the files' names."""
        half = path.with_name("half.pt")
        checkpoint.slim(path, half)
        files = place(half.read_bytes(), self.results, name)
        half.unlink()
        records = [record for record in map(read_record, log.read_text("utf-8").splitlines()) if record]
        lines = [record for record in records if "images_per_s" in record]
        values = {key: value for record in records for key, value in record.items() if key.startswith("val_")}
        contents = checkpoint.load(path, *checkpoint.KINDS)
        images = contents["iter"] * contents["settings"]["batch_size"]
        found = {"iterations": contents["iter"], "images": images, "files": files}
        found["images_per_s"] = statistics.median(line["images_per_s"] for line in lines[1:] or lines)
        found["data_wait"] = statistics.median(line["data_wait"] for line in lines[1:] or lines)
        found["loss"] = lines[-1]["loss"]
        if contents["kind"] != "denoiser":
            cost = self.cost_of(contents["kind"], contents["model_config"])
            found |= {"flop": cost.flop, "weights": cost.weights}
        return found | values

    def sheet_of(self, out, name):
        """Put a run's last sheet of samples among the results; return its name, or None if there is no sheet."""
        sheets = sorted((out / "samples").glob("[0-9]*.png"))
        return place(sheets[-1].read_bytes(), self.results, name)[0] if sheets else None

    def sheet(self):
        folder = self.folder / "sheet"
        self.call("sample.py", f"--out_dir={self.folder / 'ntm'}", f"--prompts={ROOT / 'assets/emoji/prompts.txt'}",
                  "--num_samples=1", f"--folder={folder}", f"--device={self.device}")
        return {"sheet": place((folder / "sheet.png").read_bytes(), self.results, "sheet.png")[0]}

    def judged(self):
        """Judge samples of both models, the NTM's first, for as many unseen combinations as fit into the time."""
        update = 1 / self.state["stages"]["fm"]["images_per_s"]
        each = PASSES / 3 * self.size.slower * update
        count = min(COMBINATIONS, max(24, int(0.6 * self.left() / each)))
        found = {"count": count}
        for name, settings in ("ntm", ["--denoise=learned"]), ("fm", ["--steps=4,8,50"]):
            out = self.folder / name
            self.call("evaluate.py", f"--out_dir={out}", "--parts=samples", f"--data_dir={self.data / 'combinations'}",
                      f"--judge={self.args.judge}", f"--num_samples={count}", f"--device={self.device}", *settings)
            evaluated = json.loads((out / "evaluate.json").read_text("utf-8"))
            found[name] = evaluated["curves"]
        return found

    def go(self):
        """Run all stages that have not ended before, and write the report after each."""
        self.prepare()
        for stage in SHARES:
            if stage in self.state["stages"]:
                print(f"{stage} has ended before", flush=True)
                continue
            before = self.seconds()
            found = getattr(self, stage)()
            self.state["stages"][stage] = found | {"seconds": self.seconds() - before}
            other, what, pattern = SUPERSEDED.get(stage, (stage, "", ""))
            self.state["stages"][other].pop(what, None)
            write_whole(self.results / "report.md", report(self.state).encode())
            self.keep()
            if pattern:
                for path in self.results.glob(pattern):  # which no report names any more
                    path.unlink()
            print(f"{stage}: {self.seconds() - before:.0f} s; wrote {self.results / 'report.md'}", flush=True)


@one_line_errors()
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="bash speedrun.sh", allow_abbrev=False,
                                     description="64x64 emoji from pictures to a judged model in MINUTES.")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=at_home, default="out/speedrun")
    parser.add_argument("--results", type=at_home, default="", help="default OUT/results")
    parser.add_argument("--data_dir", type=at_home, default="out/data/emoji", help="shards of `python data.py emoji`")
    parser.add_argument("--pictures", type=at_home, default="out/emoji.zip", help="of which shards are made")
    parser.add_argument("--judge", type=at_home, default="out/emoji_judge.pt", help="trained if there is none")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; default: the best there is")
    for name in ("width", "depth", "heads", "patch_size", "batch_size"):
        parser.add_argument(f"--{name}", type=int, default=0, help="of the network; default: what suits the device")
    args = parser.parse_args(arguments)
    if not 0 < args.minutes < math.inf:
        raise ValueError(f"minutes is {args.minutes}, but must be above 0: set MINUTES=10")
    Speedrun(args).go()


if __name__ == "__main__":
    main()
