"""The report of speedrun.sh, with the results of its stages so far."""

TITLES = {"fm": "flow matching", "ntm": "NTM", "denoiser": "denoiser"}
LABELS = {"style": "style", "group": "group", "concept": "emoji"}  # {label of the judge: heading}


def table(rows):
    """A Markdown table of rows of strings, the first of them the headings."""
    heading, *others = rows
    lines = [heading, ["---"] * len(heading), *others]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def number(value, digits=3):
    """A number as text, with `digits` significant digits or all digits before the point, or a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def report(state):
    """The text of report.md; state: the contents of speedrun.json."""
    stages = state["stages"]
    minutes = sum(stage["seconds"] for stage in stages.values()) / 60
    missing = [] if "judged" in stages else ["The samples are not judged yet: the run continues, or was interrupted.\n"]
    parts = [
        "# 64×64 emoji by speedrun.sh\n",
        f"{state['card']}, torch {state['torch']}, {minutes:.1f} of {state['minutes']:g} minutes.\n",
        *missing,
        training(state),
    ]
    if "judged" in stages:
        parts.append(judged(stages["judged"]))
    parts.append(files(stages))
    return "\n".join(parts)


def training(state):
    """The table of what was trained, how fast, and at which share of the chip's speed."""
    rates = state["rates"]
    rate = rates[state["precision"]]
    rows = [["", "images", "iterations", "seconds", "images/s", "waiting for data", "million weights",
             "GFLOP an image", "TFLOP/s", "of the chip", "loss", "val_loss", "val_bound", "PSNR, dB"]]
    for name, title in TITLES.items():
        if name not in state["stages"]:
            continue
        stage = state["stages"][name]
        flop = stage.get("flop")
        speed = stage["images_per_s"]
        done = flop and flop * speed
        share = done and f"{done / rate:.0%}"
        rows.append([title, f"{stage['images']:,}", f"{stage['iterations']:,}", f"{stage['seconds']:.0f}",
                     number(speed), f"{stage['data_wait']:.0%}", number(flop and stage["weights"] / 1e6),
                     number(flop and flop / 1e9), number(done and done / 1e12), share or "–", number(stage["loss"]),
                     number(stage.get("val_loss")), number(stage.get("val_bound"), 4), number(stage.get("val_psnr"))])
    coarse, fine = (number(rates[precision] / 1e12) for precision in ("bfloat16", "float32"))
    note = (f"The chip: {coarse} TFLOP/s in bfloat16 and {fine} in float32, by a large matrix product in the same run. "
            f"\"Of the chip\" is the share of its speed in {state['precision']}, in which the model was trained. Only "
            "operations of matrix products count. Seconds include first updates, compilation and validation.\n")
    return table(rows) + "\n" + note


def judged(found):
    """The table of the judge's scores of samples for unseen combinations."""
    rows = [["", *LABELS.values(), "Fréchet", "images/s"]]
    real = found["ntm"][0]
    shares = [number(share(real, f"{label}, of real images")) for label in LABELS]
    rows.append(["real images", *shares, number(real.get("frechet_distance, of real images")), "–"])
    for name in "fm", "ntm":
        for curve in found[name]:
            steps = curve["passes"] - (name == "ntm")
            title = f"{TITLES[name]}, {steps} steps" + ", learned denoiser" * (name == "ntm")
            shares = [number(share(curve, label)) for label in LABELS]
            rows.append([title, *shares, number(curve["frechet_distance"]), number(curve["images_per_s"])])
    n = found["count"]
    note = (f"{n} unseen combinations of emoji and style, guidance 1, one seed; a share p has the standard error "
            f"√(p (1 − p) / {n}), at most {0.5 / n**0.5:.3f}. For real images, the Fréchet distance is that of "
            "other real images. Distances fall with the number of images.\n")
    return table(rows) + "\n" + note


def share(curve, label):
    """The proportion of samples that the judge finds right; None where it knows no class of the captions."""
    return curve[label]["mean"] if label in curve else None


def files(stages):
    """The part that lists the files beside the report and how to use them."""
    lines = []
    for stage in stages.values():
        if stage.get("sheet"):
            lines.append(f"![samples]({stage['sheet']})\n")
    names = [name for stage in stages.values() for name in stage.get("files", ())]
    joined = sorted({name.rpartition(".")[0] for name in names if not name.endswith(".pt")})
    lines.append("Averaged weights in float16: " + ", ".join(f"`{name}`" for name in names) + ".\n")
    for name in joined:
        lines.append(f"Join the parts: `cat {name}.?? > {name}`\n")
    if "ckpt.pt" in [*joined, *names]:
        lines.append("Sample, in the repository: `python sample.py --out_dir=THIS_FOLDER --num_samples=40`\n")
    return "\n".join(lines)
