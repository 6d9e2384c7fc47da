"""Draws pictures from prompts in a few steps, with their exact likelihood.

    python sample.py --prompt="a handwritten seven" --num_samples=16 --seed=1
    python sample.py --out_dir=out/shapes --prompts=prompts.txt --guidance=2 --denoise=score --show_trajectory=True

Leaves in out_dir/pictures: grid.png with the prompts under the pictures, the single pictures 0000.png, 0001.png, ...
and, with --show_trajectory=True, a strip of levels from noise to picture for each, 0000_trajectory.png, ... Where the
trajectory was carried back to x-space, for the strips or for --denoise=score|none, its -log p stands beside the prompt.
Of a model of latents the pictures are a first look only, and 0000.npy, ... are what its decoder takes.

A flow-matching checkpoint is sampled by Euler's method: it has no denoiser and no likelihood.
"""

import time
from pathlib import Path

import numpy as np
import torch

import checkpoint
import pictures
from configurator import configure
from data import dataset_class_captions, get_dataset, get_tokenizer
from fm import EULER_STEPS
from loop import at_least_one, find_device, one_line_errors

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


class Clock:
    """Seconds of each stage, the accelerator waited for."""

    def __init__(self):
        self.seconds = {}

    def __call__(self, stage, function, *args, **kwargs):
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start
        return result


with one_line_errors():
    device = find_device(config["device"])
    path = Path(out_dir) / "ckpt.pt"
    trained = checkpoint.load(path, "ntm", "fm", device=device)
    is_ntm = trained["kind"] == "ntm"
    model = checkpoint.network_of(trained, path, device)
    if denoise not in ("learned", "score", "none"):
        raise ValueError(f"denoise {denoise!r} is unknown: choose 'learned', 'score' or 'none'")
    at_least_one(config, "num_samples", "batch_size", *(["steps"] if steps else []))
    if guidance < 0:
        raise ValueError(f"guidance is {guidance}, but must be at least 0")
    if is_ntm and denoise == "learned":
        path = Path(out_dir) / "denoiser.pt"
        if not path.exists():
            raise ValueError(f"there is no {path}: make it with distill.py, or choose --denoise=score")
        distilled = checkpoint.load(path, "denoiser", device=device)
        denoiser = checkpoint.network_of(distilled, path, device)
        for name in ("image_size", "channels", "patch_size", "vocab_size", "text_len"):
            theirs, ours = getattr(denoiser.config, name), getattr(model.config, name)
            if theirs != ours:
                raise ValueError(f"{path} is of another model: its {name} is {theirs}, the model's {ours}; "
                                 "distil it anew, or choose --denoise=score")
        t_min = distilled["settings"]["t_min"]
    captions = read_prompts(trained["settings"])
    tokenizer = get_tokenizer(trained["settings"]["tokenizer"])
    grid = model.config.time_grid(t_min, steps) if is_ntm else torch.linspace(0, 1, (steps or EULER_STEPS) + 1)
    texts = tokenizer.encode(captions, model.config.text_len).to(device)
ts = grid.to(device)
stages = len(grid) if is_ntm else 1  # that draw noise
shape = stages, model.config.num_tokens, model.config.token_dim


@torch.no_grad()
def draw(rows, clock):
    """The pictures of some rows: images (b, C, H, W); trajectories (b, T+1, N, D) and their NLL in nats, or None."""
    text = texts[rows.start:rows.stop]
    # each picture has a generator of its own, on the CPU, so that neither its neighbours nor the device change it
    generators = [torch.Generator().manual_seed(seed * 1_000_003 + i) for i in rows]
    noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
    noise, stage = noise.to(device), f"sampling in {len(grid) - 1} steps"
    if not is_ntm:
        x = clock(stage, model.sample, text, len(grid) - 1, guidance, noise=noise[:, 0])
        return model.unpatchify(x[:, 0]), x, None
    u = clock(stage, model.sample, text, ts, guidance, noise=noise)
    x = nll = None
    if denoise != "learned" or show_trajectory:
        x = clock("inversion", model.invert, u, ts)
        nll = model.trajectory_nll(x, ts.expand(len(x), -1), text).sum(dim=1)
    if denoise == "learned":
        tokens = clock("learned denoising", denoiser, u[:, 0], text)
    else:
        tokens = clock("score denoising", model.score_denoise, x, ts, text) if denoise == "score" else x[:, 0]
    return model.unpatchify(tokens), x, nll


def strip(x, image):
    """A trajectory (T+1, N, D), of many levels about eight, and its picture (C, H, W) side by side, noise first."""
    shown = slice(None, None, -(-len(grid) // 9))
    levels = torch.cat([model.unpatchify(x.flip(0)[shown]), image[None]])
    names = [f"t = {t:.2f}" for t in grid.flip(0)[shown].tolist()] + [f"denoise: {denoise}" if is_ntm else "picture"]
    return pictures.grid(levels, names, columns=len(levels))


folder = Path(out_dir) / "pictures"
clock, images, nlls = Clock(), [], []
for start in range(0, len(captions), batch_size):
    rows = range(start, min(start + batch_size, len(captions)))
    batch, x, nll = draw(rows, clock)
    images.append(batch)
    nlls += [] if nll is None else nll.tolist()
    for j, i in enumerate(rows):
        pictures.save(pictures.picture(batch[j]), folder / f"{i:04d}.png")
        if trained["settings"]["dataset"] == "latents":
            np.save(folder / f"{i:04d}.npy", (batch[j] / trained["settings"]["latent_scale"]).half().cpu().numpy())
        if show_trajectory:
            pictures.save(strip(x[j], batch[j]), folder / f"{i:04d}_trajectory.png")
labels = [f"{caption}\n{nll:.1f} nats" for caption, nll in zip(captions, nlls)] or captions
pictures.save(pictures.grid(torch.cat(images), labels), folder / "grid.png")

for stage, seconds in clock.seconds.items():
    print(f"{stage}: {len(captions) / seconds:.1f} images/s")
print(f"all together: {len(captions) / sum(clock.seconds.values()):.1f} images/s on {device.type}")
if nlls:
    mean = sum(nlls) / len(nlls)
    numbers = shape[0] * shape[1] * shape[2]
    print(f"trajectory NLL: {mean:.2f} nats, {mean / numbers:.4f} for each of its {numbers} numbers")
print(f"wrote {folder / 'grid.png'}")
