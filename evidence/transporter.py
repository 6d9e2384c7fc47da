"""The gain from a step's flow: the bound against training time, with and without each part of the flow.

    python train.py config/fashion_fm.py
    python -m evidence.transporter config/fashion.py --minutes=4
    python -m evidence.transporter config/shapes.py --init_from=CKPT --minutes=4 --only=gaussian,both

Trains the same model from the same start once for each variant, for equal time: a few trial updates decide the number
of iterations. Writes transporter.json and transporter.png into --out. Run it on an idle machine.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from plumbing.plots import plot
from plumbing.runtime import one_line_errors

FLOW = ["--closed_form=False", "--mirrored=True"]
NONE = ["--filters=0", "--logistics=0"]
VARIANTS = {
    "gaussian": [*NONE, "--closed_form=True", "--mirrored=False"],
    "pointwise": [*FLOW, "--filters=0", "--logistics=3"],
    "filter": [*FLOW, "--filters=16", "--logistics=0"],
    "both": [*FLOW, "--filters=16", "--logistics=3"],
    "autoregressive": [
        *NONE,
        "--closed_form=False",
        "--mirrored=False",
        "--transporter_blocks=1",
        "--transporter_layers=2",
        "--transporter_width=128",
        "--transporter_heads=4",
    ],
}
TRIAL = 20  # iterations that measure the speed


def read_log(out):
    """The lines of out/log.jsonl."""
    with open(out / "log.jsonl", encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def train(config, out, settings):
    """Run train.py and return its log. Raises ValueError if it fails."""
    command = [sys.executable, "train.py", config, f"--out_dir={out}", *settings]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise ValueError(f"{' '.join(command[1:])} failed")
    return read_log(out)


def minutes_at(log, batch_size):
    """{iteration: minutes of training before it}, without the time of validations."""
    minutes, passed, before = {0: 0.0}, 0.0, 0
    for line in log:
        if "images_per_s" not in line:
            continue
        images = (line["iter"] - before) * batch_size
        passed += images / line["images_per_s"] / 60
        before = line["iter"]
        minutes[before] = passed
    return minutes


def curve_of(name, config, out, minutes, settings):
    """[(minutes, val_bound)] of a variant, trained for so many minutes."""
    batch_size = 32
    settings = [*settings, *VARIANTS[name], f"--batch_size={batch_size}", "--save_minutes=0"]
    trial = [f"--max_iters={TRIAL}", f"--val_interval={TRIAL}", "--log_interval=5", "--val_examples=1"]
    log = train(config, out / f"{name}_trial", [*settings, *trial])
    speed = log[-2]["images_per_s"]
    iterations = max(6, int(minutes * 60 * speed / batch_size))
    every = iterations // 6  # the last validation comes at the end of the schedule
    whole = [f"--max_iters={6 * every}", f"--val_interval={every}", f"--log_interval={every}"]
    log = train(config, out / name, [*settings, *whole])
    passed = minutes_at(log, batch_size)
    return [(passed[line["iter"]], line["val_bound"]) for line in log if "val_bound" in line]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a configuration of train.py")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training for each variant")
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants, separated by commas")
    parser.add_argument("--out", default="out/transporter", help="folder of runs and results")
    args, settings = parser.parse_known_args()
    unknown = set(args.only.split(",")) - VARIANTS.keys()
    if unknown:
        raise ValueError(f"variant {unknown.pop()!r} is unknown: choose among {', '.join(VARIANTS)}")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    curves = {}
    for name in args.only.split(","):
        curves[name] = curve_of(name, args.config, out, args.minutes, settings)
        print(name, *(f"{minutes:.1f}: {bound:.4f}" for minutes, bound in curves[name]), sep="  ")
        (out / "transporter.json").write_text(json.dumps(curves), "utf-8")
        plot({f"val_bound, {args.config}": curves}, "minutes").save(out / "transporter.png")


if __name__ == "__main__":
    with one_line_errors():
        main()
