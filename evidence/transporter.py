"""The gain from a step's flow: the bound against training time, with and without each part of the flow.

    python train.py config/fashion_fm.py
    python -m evidence.transporter config/fashion.py --minutes=4
    python -m evidence.transporter config/shapes.py --init_from=CKPT --minutes=4 --only=gaussian,both

Trains the same model from the same start once for each variant, for equal processor time: two short runs decide the
number of iterations. Writes transporter.json and transporter.png into --out; another config that is run
into the same folder adds its panel. On a CPU only; set OMP_NUM_THREADS=1 for the time of a single core.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from plumbing.plots import plot
from plumbing.runtime import one_line_errors

# a transporter can have neither a coupled first step nor flow matching's loss, so no variant has them
COMMON = ["--first_noise=1", "--velocity_weight=0"]
FLOW = ["--closed_form=False", "--mirrored=True"]
NONE = ["--filters=0", "--logistics=0"]
BLOCK = [
    *FLOW,
    "--transporter_blocks=1",
    "--transporter_layers=2",
    "--transporter_width=128",
    "--transporter_heads=4",
]
VARIANTS = {
    "gaussian": [*NONE, "--closed_form=True", "--mirrored=False"],
    "pointwise": [*FLOW, "--filters=0", "--logistics=3"],
    "filter": [*FLOW, "--filters=16", "--logistics=0"],
    "both": [*FLOW, "--filters=16", "--logistics=3"],
    "autoregressive": [*NONE, *BLOCK],
    "all": ["--filters=16", "--logistics=3", *BLOCK],
}
VALIDATIONS = 6
TRIAL = 102  # iterations of a run that decides how many iterations take the time asked for


def train(config, out, settings):
    """Run train.py; return its log and the processor seconds that it took. Raises ValueError if it fails."""
    command = [sys.executable, "train.py", config, f"--out_dir={out}", *settings]
    before = os.times()
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"{' '.join(command[1:])} failed")
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    with open(f"{out}/log.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines], seconds


def curve_of(name, config, out, minutes, settings):
    """[(minutes of training, val_bound)] of a variant, trained for `minutes` of processor time.

    All runs here validate equally often, so the times of two runs differ only by the time of their updates.
    """

    def run(folder, iterations):
        limits = [f"--max_iters={iterations}", f"--val_interval={iterations // VALIDATIONS}"]
        variant = [*settings, *COMMON, *VARIANTS[name], "--save_minutes=0", *limits]
        return train(config, f"{out}/{folder}", variant)

    _, overhead = run(f"{name}_least", VALIDATIONS)
    _, trial = run(f"{name}_trial", TRIAL)
    guess = max(1e-3, (trial - overhead) / (TRIAL - VALIDATIONS))
    iterations = VALIDATIONS * max(2, round(60 * minutes / guess / VALIDATIONS))
    log, seconds = run(name, iterations)
    minutes_of_an_update = (seconds - overhead) / (iterations - VALIDATIONS) / 60
    return [(line["iter"] * minutes_of_an_update, line["val_bound"]) for line in log if "val_bound" in line]


def main():
    parser = argparse.ArgumentParser(
        prog="python -m evidence.transporter",
        usage="%(prog)s CONFIG.py [--minutes MINUTES] [--only VARIANTS] [--out FOLDER] [--NAME=VALUE of train.py ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", help="a configuration of train.py")
    parser.add_argument("--minutes", type=float, default=4.0, help="of processor time that each variant trains")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--out", default="out/transporter", help="folder of runs and results")
    args, settings = parser.parse_known_args()
    unknown = set(args.only.split(",")) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"variant {unknown.pop()!r} is unknown: choose among {', '.join(VARIANTS)}")
    title = Path(args.config).stem
    path = Path(args.out) / "transporter.json"
    (path.parent / title).mkdir(parents=True, exist_ok=True)
    panels = json.loads(path.read_text("utf-8")) if path.exists() else {}
    curves = panels.setdefault(title, {})
    for name in args.only.split(","):
        curves[name] = curve_of(name, args.config, path.parent / title, args.minutes, settings)
        print(name, *(f"{minutes:.1f}: {bound:.4f}" for minutes, bound in curves[name]), sep="  ")
        path.write_text(json.dumps(panels), "utf-8")
        titled = {f"val_bound, {panel}": curves_of_it for panel, curves_of_it in panels.items()}
        plot(titled, "minutes of processor time").save(path.with_suffix(".png"))


if __name__ == "__main__":
    with one_line_errors():
        main()
