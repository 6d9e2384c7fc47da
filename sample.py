"""Draws pictures from prompts in a few steps, with their exact likelihood.

    python sample.py --prompt="a red circle above a blue square"     # by the model that comes with the repository
    python sample.py --out_dir=out/digits --num_samples=16 --seed=1
    python sample.py --out_dir=out/shapes --prompts=prompts.txt --guidance=2 --denoise=score --show_trajectory=True
    python sample.py --prompts=evaluation_metadata.jsonl --layout=geneval --num_samples=4

Leaves in out_dir/pictures: grid.png with the prompts under the pictures, the single pictures 0000.png, 0001.png, ...
and, with --show_trajectory=True, a strip of levels from noise to picture for each, 0000_trajectory.png, ... Where the
trajectory was carried back to x-space, for the strips or for --denoise=score|none, its -log p stands beside the prompt.
A model of latents leaves them as 0000.npy, ... and makes pictures with --decoder; without, the PNGs are a first look.

For judges of many pictures there are two other layouts, which an interrupted run continues: "flat", a folder of nothing
but PNGs (for FID); and "geneval", 00000/metadata.jsonl, 00000/samples/0000.png, ..., 00000/grid.png for each prompt.

A flow-matching checkpoint is sampled by Euler's method: it has no denoiser and no likelihood.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import pictures
from configurator import at_least_one, claim, configure, one_line_errors
from data import dataset_class_captions
from loop import open_dataset
from prepare import load_exported
from ranks import find_device
from sampler import Sampler

out_dir = ""  # holds ckpt.pt and, for --denoise=learned, denoiser.pt; empty: the model in assets/, pictures go to out/
prompt = ""  # one caption; empty, and without `prompts`: captions of the data the model was trained on
prompts = ""  # a text file with one caption a line, an empty line asking for anything; or .jsonl, whose "prompt"s count
num_samples = 16  # pictures of the one prompt or of each line of the file; without either, pictures in all
steps = 0  # T; 0: as trained, or 50 for flow matching
guidance = 1.0  # how much more than the caption asks for: 0 is the model itself
denoise = "learned"  # by the denoiser in one pass; "score": by the model's own score; "none": as sampled, at t_min
t_min = 0.02  # the noise level where sampling ends; the denoiser knows its own
seed = 0  # the same seed gives the same pictures, whatever the batch size
batch_size = 64
show_trajectory = False  # also a strip of every level for each picture
layout = "grid"  # "flat": single pictures and nothing else; "geneval": a folder for each prompt
folder = ""  # where the pictures go; empty: out_dir/pictures
decoder = ""  # of a model of latents: a program saved by torch.export, latents (B, C, h, w) to pictures in [-1, 1]
device = ""  # cuda, mps or cpu; empty: the best there is

config = configure(globals())

SHIPPED = Path(__file__).parent / "assets" / "shapes"


def read_prompts(settings):
    """The captions to draw, one for each picture, and what a .jsonl file says about each prompt, a dict a line."""
    if prompts:
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts file {prompts!r} cannot be read: {error}") from error
        if not lines:
            raise ValueError(f"{prompts} holds no prompts: write one a line")
        entries = [{"prompt": line} for line in lines]
        if prompts.endswith(".jsonl"):
            entries = [read_entry(i, line) for i, line in enumerate(lines, 1)]
    elif prompt:
        entries = [{"prompt": prompt}]
    else:
        captions = dataset_class_captions(settings["dataset"])
        if captions is None:
            dataset = open_dataset(settings, "val")
            captions = [dataset[i % len(dataset)][1] for i in range(num_samples)]
        return [captions[i % len(captions)] for i in range(num_samples)], []
    return [entry["prompt"] for entry in entries for _ in range(num_samples)], entries


def read_entry(number, line):
    """A line of a .jsonl file of prompts."""
    try:
        entry = json.loads(line)
        if isinstance(entry["prompt"], str):
            return entry
    except (ValueError, KeyError, TypeError):
        pass
    raise ValueError(f'{prompts}, line {number}: {line[:60]!r} is no JSON object with a "prompt"')


with one_line_errors():
    at_least_one(config, "num_samples", "batch_size")
    if guidance < 0:
        raise ValueError(f"guidance is {guidance}, but must be at least 0")
    if layout not in ("grid", "flat", "geneval"):
        raise ValueError(f"layout {layout!r} is unknown: choose 'grid', 'flat' or 'geneval'")
    sampler = Sampler(out_dir or SHIPPED, find_device(config["device"]), steps, denoise, t_min)
    model, grid = sampler.model, sampler.grid
    captions, entries = read_prompts(sampler.settings)
    if layout == "geneval" and not entries:
        raise ValueError("layout 'geneval' makes a folder for each prompt: name a file of them in --prompts")
    if layout != "grid" and show_trajectory:
        raise ValueError(f"layout {layout!r} has no place for strips: leave show_trajectory out")
    if decoder and not sampler.latents:
        raise ValueError(f"decoder is {decoder!r}, but the model in {out_dir or SHIPPED} draws pictures: leave it out")
    decode = load_exported(decoder, sampler.device) if decoder else None
    sampler.encode(captions)  # a caption that cannot be encoded is told before anything is drawn
    folder = Path(folder or Path(out_dir or "out") / "pictures")
    if layout != "grid":
        ours = {name: value for name, value in config.items() if name not in ("device", "batch_size")}
        ours |= {"iteration": sampler.iteration, "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest()}
        claim(folder / ".settings.json", ours,
              f"{folder} holds pictures of other settings: choose another --folder, or remove it")


def path_of(i):
    """Where picture i goes."""
    if layout == "geneval":
        return folder / f"{i // num_samples:05d}" / "samples" / f"{i % num_samples:04d}.png"
    return folder / f"{i:04d}.png"


@torch.inference_mode()
def decoded(images):
    """What to look at: the pictures that the decoder makes of normalised latents; without one, what was drawn."""
    with one_line_errors():
        return decode(sampler.plain_latents(images)).clamp(-1, 1) if decode else images


def strip(x, image):
    """A trajectory (T+1, N, D), of many levels about eight, and its picture (C, H, W) side by side, noise first."""
    shown = slice(None, None, -(-len(grid) // 9))
    levels = torch.cat([decoded(model.unpatchify(x.flip(0)[shown])), image[None]])
    names = [f"t = {t:.2f}" for t in grid.flip(0)[shown].tolist()] + [f"denoise: {sampler.denoise}"]
    return pictures.grid(levels, names, columns=len(levels))


images, nlls = [], []
wanted = [i for i in range(len(captions)) if layout == "grid" or not path_of(i).exists()]
for start in range(0, len(wanted), batch_size):
    numbers = wanted[start:start + batch_size]
    batch, x, nll = sampler.draw([captions[i] for i in numbers], numbers, guidance, seed, levels=show_trajectory)
    nlls += [] if nll is None else nll.tolist()
    latents = sampler.plain_latents(batch).half().cpu().numpy() if sampler.latents else None
    batch = decoded(batch)
    if layout == "grid":
        images.append(batch)
    for j, i in enumerate(numbers):
        if sampler.latents:
            path_of(i).parent.mkdir(parents=True, exist_ok=True)
            np.save(path_of(i).with_suffix(".npy"), latents[j])
        pictures.save(pictures.picture(batch[j]), path_of(i))  # the last: a run that continues looks for it
        if show_trajectory:
            pictures.save(strip(x[j], batch[j]), path_of(i).with_name(f"{i:04d}_trajectory.png"))

if layout == "grid":
    labels = [f"{caption}\n{nll:.1f} nats" for caption, nll in zip(captions, nlls)] or captions
    pictures.save(pictures.grid(torch.cat(images), labels), folder / "grid.png")
if layout == "geneval":
    for number, entry in enumerate(entries):
        home = folder / f"{number:05d}"
        (home / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
        samples = [np.asarray(Image.open(home / "samples" / f"{k:04d}.png")) for k in range(num_samples)]
        tensors = torch.as_tensor(np.stack(samples)).permute(0, 3, 1, 2).float() / 127.5 - 1
        pictures.save(pictures.grid(tensors, scale=1), home / "grid.png")

for stage, seconds in sampler.seconds.items():
    print(f"{stage}: {len(wanted) / seconds:.1f} images/s")
if wanted:
    print(f"all together: {len(wanted) / sum(sampler.seconds.values()):.1f} images/s on {sampler.device.type}")
if nlls:
    mean = sum(nlls) / len(nlls)
    numbers = len(grid) * model.config.num_tokens * model.config.token_dim
    print(f"trajectory NLL: {mean:.2f} nats, {mean / numbers:.4f} for each of its {numbers} numbers")
print(f"wrote {folder / 'grid.png'}" if layout == "grid" else
      f"wrote {len(wanted)} of {len(captions)} pictures into {folder}")
