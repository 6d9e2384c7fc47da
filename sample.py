"""Draws pictures from prompts in a few steps, with their exact likelihood.

    python sample.py --prompt="a handwritten seven" --num_samples=16 --seed=1
    python sample.py --out_dir=out/shapes --prompts=prompts.txt --guidance=2 --denoise=score --show_trajectory=True

Leaves in out_dir/pictures: grid.png with the prompts under the pictures, the single pictures 0000.png, 0001.png, ...
and, with --show_trajectory=True, a strip of levels from noise to picture for each, 0000_trajectory.png, ... Where the
trajectory was carried back to x-space, for the strips or for --denoise=score|none, its -log p stands beside the prompt.
Of a model of latents the pictures are a first look only, and 0000.npy, ... are what its decoder takes.

A flow-matching checkpoint is sampled by Euler's method: it has no denoiser and no likelihood.
"""

from pathlib import Path

import numpy as np
import torch

import pictures
from configurator import configure
from data import dataset_class_captions, get_dataset
from loop import at_least_one, find_device, one_line_errors
from sampler import Sampler

out_dir = "out/digits"  # holds ckpt.pt and, for --denoise=learned, denoiser.pt
prompt = ""  # one caption; empty, and without `prompts`: captions of the data the model was trained on
prompts = ""  # a text file with one caption a line; an empty line asks for anything
num_samples = 16  # pictures of the one prompt or of each line of the file; without either, pictures in all
steps = 0  # T; 0: as trained, or 50 for flow matching
guidance = 1.0  # how much more than the caption asks for: 0 is the model itself
denoise = "learned"  # by the denoiser in one pass; "score": by the model's own score; "none": as sampled, at t_min
t_min = 0.02  # the noise level where sampling ends; the denoiser knows its own
seed = 0  # the same seed gives the same pictures, whatever the batch size
batch_size = 64
show_trajectory = False  # also a strip of every level for each picture
device = ""  # cuda, mps or cpu; empty: the best there is

config = configure(globals())


def read_prompts(settings):
    """The captions to draw, one for each picture."""
    if prompts:
        try:
            lines = Path(prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts file {prompts!r} cannot be read: {error}") from error
        if not lines:
            raise ValueError(f"{prompts} holds no prompts: write one a line")
        return [line for line in lines for _ in range(num_samples)]
    if prompt:
        return [prompt] * num_samples
    captions = dataset_class_captions(settings["dataset"])
    if captions is None:
        dataset = get_dataset(settings["dataset"], "val", settings["image_size"], settings["channels"],
                              data_dir=settings["data_dir"])
        captions = [dataset[i][1] for i in range(num_samples)]
    return [captions[i % len(captions)] for i in range(num_samples)]


with one_line_errors():
    at_least_one(config, "num_samples", "batch_size")
    if guidance < 0:
        raise ValueError(f"guidance is {guidance}, but must be at least 0")
    sampler = Sampler(out_dir, find_device(config["device"]), steps, denoise, t_min)
    model, grid = sampler.model, sampler.grid
    captions = read_prompts(sampler.settings)
    sampler.encode(captions)  # a caption that cannot be encoded is told before anything is drawn


def strip(x, image):
    """A trajectory (T+1, N, D), of many levels about eight, and its picture (C, H, W) side by side, noise first."""
    shown = slice(None, None, -(-len(grid) // 9))
    levels = torch.cat([model.unpatchify(x.flip(0)[shown]), image[None]])
    names = [f"t = {t:.2f}" for t in grid.flip(0)[shown].tolist()] + [f"denoise: {sampler.denoise}"]
    return pictures.grid(levels, names, columns=len(levels))


folder = Path(out_dir) / "pictures"
images, nlls = [], []
for start in range(0, len(captions), batch_size):
    rows = range(start, min(start + batch_size, len(captions)))
    batch, x, nll = sampler.draw(captions[rows.start:rows.stop], rows, guidance, seed, levels=show_trajectory)
    images.append(batch)
    nlls += [] if nll is None else nll.tolist()
    for j, i in enumerate(rows):
        pictures.save(pictures.picture(batch[j]), folder / f"{i:04d}.png")
        if sampler.settings["dataset"] == "latents":
            np.save(folder / f"{i:04d}.npy", (batch[j] / sampler.settings["latent_scale"]).half().cpu().numpy())
        if show_trajectory:
            pictures.save(strip(x[j], batch[j]), folder / f"{i:04d}_trajectory.png")
labels = [f"{caption}\n{nll:.1f} nats" for caption, nll in zip(captions, nlls)] or captions
pictures.save(pictures.grid(torch.cat(images), labels), folder / "grid.png")

for stage, seconds in sampler.seconds.items():
    print(f"{stage}: {len(captions) / seconds:.1f} images/s")
print(f"all together: {len(captions) / sum(sampler.seconds.values()):.1f} images/s on {sampler.device.type}")
if nlls:
    mean = sum(nlls) / len(nlls)
    numbers = len(grid) * model.config.num_tokens * model.config.token_dim
    print(f"trajectory NLL: {mean:.2f} nats, {mean / numbers:.4f} for each of its {numbers} numbers")
print(f"wrote {folder / 'grid.png'}")
