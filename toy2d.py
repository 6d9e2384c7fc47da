"""Why the method exists, in two dimensions: trains a Gaussian reverse step and NTM's on the same data, and draws both.

A picture of two pixels is a point in the plane, so everything there is to know can be drawn. Along four steps from
noise to data, p(x_s | x_t) has pieces, as many as there are places the point may have come from, and knowing x_t does
not tell which. A diffusion model's step is a Gaussian, here by leaving out the transporter: it covers the pieces and
what lies between them, however long it trains. NTM's step is a flow, and has pieces where the data have them.

    python toy2d.py --dataset=moons

Both models train for the same processor time, side by side, each on one core. Leaves the picture in out/toy2d.png.
"""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import pictures
from configurator import at_least_one, configure, one_line_errors
from flow import forward_kernel, forward_log_prob, forward_trajectory, reverse_posterior, time_grid
from loop import HAS_MUON, update_average
from model import NTM, NULL, NTMConfig

dataset = "checkerboard"  # or "moons", "gaussians"
picture = "out/toy2d.png"
seed = 0

# ---- trajectory
steps = 4  # T
shift = 2.0  # e^m of the time grid; at 1, even spacing, several levels have fine structure to model: 0.07 nats worse
t_min = 0.02  # the cleanest level

# ---- model
width = 32  # of the predictor, as depth
depth = 1
transporter_width = 16
transporter_blocks = 10  # each stretches one pixel as a function of the other, in turn

# ---- optimisation
seconds = 150.0  # processor time that each model trains for
max_iters = 0  # updates of each model instead, for a result that does not depend on the clock
batch_size = 256
lr = 8e-3
weight_decay = 1e-4
warmup_iters = 100
ema = 0.998  # decay of the averaged weights, which everything below uses

# ---- evaluation
panel = 180  # pixels, the side of a density in the picture
num_samples = 10_000  # of each model; its bound is measured on ten times as many fresh examples

config = configure(globals())
torch.set_num_threads(1)  # of each model: tensors this small gain nothing from more


# ---------------------------------------------------------------------------------------------------------------
# The data: points in [-1, 1]^2 as two tokens of one number, (B, 2, 1)


class DataSet(NamedTuple):
    draw: callable  # (count, generator) to points (count, 2)
    inside: callable  # points (..., 2) to whether each is on the support
    entropy: float  # nats
    places: tuple  # two clean points x_0; the picture shows the steps from x_t = (1 - t) x_0


def uniform(low, high, *shape, generator):
    return low + (high - low) * torch.rand(shape, generator=generator)


def draw_checkerboard(count, generator):
    column, half = torch.randint(4, (2, count), generator=generator)
    corner = torch.stack([column, column % 2 + half // 2 * 2], dim=1)
    return (corner + torch.rand(count, 2, generator=generator)) / 2 - 1


def on_checkerboard(x):
    return ((2 * x).floor().sum(dim=-1) % 2 == 0) & (x.abs() < 1).all(dim=-1)


INNER, OUTER, MOON = 0.52, 0.68, torch.tensor([0.3, 0.15])  # radii, and the centre of the moon that opens upwards


def draw_moons(count, generator):
    radius = uniform(INNER**2, OUTER**2, count, generator=generator).sqrt()
    angle = uniform(0, math.pi, count, generator=generator)
    side = 1 - 2 * torch.randint(2, (count, 1), generator=generator)  # one moon is the other, turned by pi
    return side * (radius[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) - MOON)


def on_moons(x):
    def on_moon(x):
        radius = (x + MOON).norm(dim=-1)
        return (radius > INNER) & (radius < OUTER) & (x[..., 1] > -MOON[1])
    return on_moon(x) | on_moon(-x)


SPREAD = 0.07
CENTRES = 0.7 * torch.tensor([[math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)] for k in range(8)])


def draw_gaussians(count, generator):
    noise = SPREAD * torch.randn(count, 2, generator=generator)
    return CENTRES[torch.randint(8, (count,), generator=generator)] + noise


def on_gaussians(x):
    return (x[..., None, :] - CENTRES).norm(dim=-1).amin(dim=-1) < 3 * SPREAD  # 98.9% of the data


DATA_SETS = {
    "checkerboard": DataSet(draw_checkerboard, on_checkerboard, math.log(2), ((0, 0), (0.25, -0.25))),
    "moons": DataSet(draw_moons, on_moons, math.log(math.pi * (OUTER**2 - INNER**2)), ((0, 0), (0.3, 0.0))),
    # eight that hardly overlap: each one's own entropy, and log 8 for which it is
    "gaussians": DataSet(draw_gaussians, on_gaussians, math.log(8 * 2 * math.pi * math.e * SPREAD**2),
                         ((0, 0), (0.5, 0.2))),
}


def draw_data(count, generator):
    return DATA_SETS[dataset].draw(count, generator)[..., None]


def share_inside(x):
    """Share of points (B, 2, 1) that lie on the data's support."""
    return DATA_SETS[dataset].inside(x[..., 0]).float().mean().item()


# ---------------------------------------------------------------------------------------------------------------
# The truth: what a reverse step should be


def posterior_weights(x_t, t, x0):
    """q(x_0 | x_t) as importance weights of real data, by the known forward kernel: x_t (..., 2), x0 (n, 2).

    log q(x_t | x_0) = -|x_t - (1 - t) x_0|^2 / 2t^2, multiplied out, without what is the same for every x_0.
    """
    logits = (1 - t) * x_t @ x0.T - 0.5 * (1 - t) ** 2 * (x0**2).sum(dim=1)
    return torch.softmax(logits / t**2, dim=-1)


def true_density(x_t, s, t, x0, axis):
    """p(x_s | x_t) = sum_i w_i N(x_s; A x_t + B x_0i, C^2 I) on the grid axis x axis, (P, P), second pixel first.

    x_t (2,), x0 (n, 2), axis (P,). Round Gaussians factor into the two pixels, so the whole mixture on the whole grid
    is one matrix product, and n can be large enough for the smallest C to leave no grain.
    """
    A, B, C = reverse_posterior(t, s)
    z = (axis[:, None, None] - (A * x_t + B * x0)) / C
    kernel = torch.exp(-0.5 * z**2) / (C * math.sqrt(2 * math.pi))  # (P, n, 2)
    return (kernel[..., 1] * posterior_weights(x_t, t, x0)) @ kernel[..., 0].T


def best_gaussian_bound(generator):
    """The bound that bound() estimates, in nats, of the best Gaussian steps there are: those with the true mean and
    variance of each pixel given x_t. Without a transporter no training goes below it."""
    x0, clean = draw_data(num_samples, generator)[..., 0], draw_data(num_samples // 2, generator)
    x = forward_trajectory(clean, grid.expand(len(clean), -1), generator)[..., 0]
    best = math.log(2 * math.pi * math.e)  # the prior's entropy; each step adds a difference of two entropies
    for k in range(steps):
        s, t = grid[k], grid[k + 1]
        _, B, C = reverse_posterior(t, s)
        weights = posterior_weights(x[:, k + 1], t, x0)
        variance = C**2 + B**2 * (weights @ x0**2 - (weights @ x0) ** 2)
        best += (0.5 * variance.log().sum(dim=1).mean() - 2 * forward_kernel(t, s)[1].log()).item()
    return best


# ---------------------------------------------------------------------------------------------------------------
# The two models

NAMES = "Gaussian", "NTM"


def caption(count):
    """There is nothing to say about a point: the null caption, (count, 1)."""
    return torch.full((count, 1), NULL)


def build(blocks):
    """NTM for pictures of two pixels; with no blocks in the transporter, a diffusion model's Gaussian steps."""
    torch.manual_seed(seed)
    return NTM(NTMConfig(image_size=(1, 2), channels=1, patch_size=1, vocab_size=2, text_len=1, width=width,
                         depth=depth, heads=1, transporter_width=transporter_width, transporter_blocks=blocks,
                         transporter_layers=1, transporter_heads=1, steps=steps, shift=shift, max_t_min=t_min))


def make_optimizers(model):
    """Muon for all matrices of the layers where torch has it, scaled so that one learning rate serves both, and AdamW
    for the rest. (loop.py leaves the modulation to AdamW, which at this learning rate ended 0.15 nats higher.)"""
    muon = {id(p): p for name, p in model.named_parameters() if HAS_MUON and ".layers." in name and p.ndim == 2}
    adamw = torch.optim.AdamW([p for p in model.parameters() if id(p) not in muon], betas=(0.9, 0.95),
                              weight_decay=weight_decay, fused=True)
    return [adamw] + [torch.optim.Muon(muon.values(), weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
                      for _ in range(bool(muon))]


def train(name, model):
    """Maximum likelihood for `seconds` of this thread's processor time. Returns the averaged model and its updates."""
    average, generator = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    optimizers = make_optimizers(model)
    text, T = caption(batch_size), torch.full((batch_size,), steps)
    bar = tqdm(total=100, desc=name, bar_format="{l_bar}{bar}| {elapsed}", position=NAMES.index(name))
    start, i, done = time.thread_time(), 0, 0
    while done < 1:
        for optimizer in optimizers:
            optimizer.param_groups[0]["lr"] = lr * min(1, (i + 1) / warmup_iters) * (1 + math.cos(math.pi * done)) / 2
        # One step of a trajectory per example; the cube, because there is far more to learn in the last steps.
        k = (steps * torch.rand(batch_size, 1, generator=generator) ** 3).long()
        ts = grid[torch.cat([k, k + 1], dim=1)]
        x = forward_trajectory(draw_data(batch_size, generator), ts, generator)
        loss = model.transitions(x, ts, text, T)[0].mean()
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        update_average(average, model, ema, i)
        i += 1
        done = i / max_iters if max_iters > 0 else (time.thread_time() - start) / seconds
        bar.update(min(100 * done, 100) - bar.n)
    bar.close()
    return average, i


@torch.no_grad()
def bound(model, count, generator):
    """Upper bounds on -log p(x_{t_min}) in nats, (count,), of fresh examples: -log p of a trajectory + log q.

    x_{t_min} is the data scaled by 1 - t_min, with noise of size t_min: its entropy is not quite the data's.
    """
    ts = grid.expand(count, -1)
    x = forward_trajectory(draw_data(count, generator), ts, generator)
    return model.trajectory_nll(x, ts, caption(count)).sum(dim=1) + forward_log_prob(x, ts)


# ---------------------------------------------------------------------------------------------------------------
# The picture

GAP, GROUP_GAP, LABEL, TITLE, NOTE = 6, 16, 76, 32, 48  # pixels
HEAT = np.array([(0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)])  # magma
MARK = (90, 230, 255)


def colours(values):
    """(H, W) in [0, 1], more is cut, to RGB: lightness rises evenly, as the eye sees it. First row at the bottom."""
    place = np.asarray(values).clip(0, 1)[::-1] * (len(HEAT) - 1)
    channels = [np.interp(place, range(len(HEAT)), HEAT[:, c]) for c in range(3)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def grid_density(model, x_t, s, t, axis):
    """The model's exact p(x_s | x_t) on the grid axis x axis, (P, P), second pixel first. x_t (2,), axis (P,)."""
    second, first = torch.meshgrid(axis, axis, indexing="ij")
    x_s = torch.stack([first, second], dim=-1).reshape(-1, 2, 1)
    count = len(x_s)
    nll = model.step_nll(x_s, x_t[:, None].expand(count, -1, -1), s.expand(count), t.expand(count),
                         torch.full((count,), steps), caption(count))
    return torch.exp(-nll).view(len(axis), -1)


def window(s):
    """Half the width of a panel that shows x_s."""
    return 1.1 * (1 - s) + 2.2 * s


def draw_picture(models, clean, samples, notes):
    """The sheet: a row for each step, p(x_s | x_t) for two x_t, the true one and the models'; then a row of samples.

    models: Gaussian and NTM. clean: data (n, 2). samples: the data's and the models', (count, 2) each. notes: a text
    to put under each of them. Returns an RGB PIL.Image.
    """
    cell, wide = panel + GAP, 2 * panel + GAP  # a panel of samples is two columns wide
    bottom = TITLE + steps * cell + TITLE
    sheet = Image.new("RGB", (LABEL + 6 * cell + GROUP_GAP, bottom + wide + NOTE), pictures.PAPER)
    pen = ImageDraw.Draw(sheet)

    def write(text, x, y, size=15):
        font = ImageFont.load_default(size)
        pen.multiline_text((x, y), text, fill=pictures.INK, font=font, anchor="mm", align="center")

    write("circle: x_t", LABEL / 2, TITLE / 2, 13)
    for row, k in enumerate(reversed(range(steps))):
        s, t, half, y = grid[k], grid[k + 1], window(grid[k].item()), TITLE + row * cell
        axis = half * ((2 * torch.arange(panel) + 1) / panel - 1)  # the pixels' centres
        write(f"t = {t:.2f}\nto {s:.2f}", LABEL / 2, y + panel / 2)
        for group, place in enumerate(DATA_SETS[dataset].places):
            x_t = (1 - t) * torch.tensor(place)
            densities = [true_density(x_t, s, t, clean, axis), *(grid_density(m, x_t, s, t, axis) for m in models)]
            for column, density in enumerate(densities):
                x = LABEL + (3 * group + column) * cell + group * GROUP_GAP
                sheet.paste(colours(density / densities[0].max()), (x, y))  # one scale: the true density's
                if row == 0:
                    write(("true p(x_s | x_t)", "Gaussian step", "NTM step")[column], x + panel / 2, TITLE / 2)
                across, up = ((x_t / half + 1) / 2 * panel).tolist()
                pen.circle((x + across, y + panel - up), 4, outline=MARK, width=2)

    for i, (name, x_0, note) in enumerate(zip(("data", "samples, Gaussian steps", "samples, NTM"), samples, notes)):
        x, half = LABEL + i * (2 * cell + GROUP_GAP // 2), window(t_min)
        counts, _, _ = np.histogram2d(x_0[:, 1], x_0[:, 0], bins=wide, range=[(-half, half)] * 2)
        sheet.paste(colours(counts), (x, bottom))
        write(name, x + wide / 2, bottom - TITLE / 2)
        write(note, x + wide / 2, bottom + wide + NOTE / 2)
    return sheet


# ---------------------------------------------------------------------------------------------------------------
# The experiment

with one_line_errors():
    if dataset not in DATA_SETS:
        raise ValueError(f"dataset {dataset!r} is unknown: choose {', '.join(map(repr, DATA_SETS))}")
    for name in ("t_min", "seconds"):
        if config[name] <= 0:
            raise ValueError(f"{name} is {config[name]}, but must be above 0")
    at_least_one(config, "steps", "transporter_blocks", "batch_size", "panel")
    if num_samples < 2:
        raise ValueError(f"num_samples is {num_samples}, but must be at least 2")
    Path(picture).parent.mkdir(parents=True, exist_ok=True)  # a folder that cannot be is better known now than later
    grid = time_grid(steps, t_min, 2, shift)
    models = [build(0), build(transporter_blocks)]

with ThreadPoolExecutor() as pool:  # torch lets go of Python's lock, so threads are enough for two cores
    models, updates = zip(*pool.map(train, NAMES, models))

generator = torch.Generator().manual_seed(seed + 1)
clean = draw_data(num_samples, generator)
noisy = forward_trajectory(clean, grid[:1].expand(num_samples, 1), generator)[:, 0]
entropy, best = DATA_SETS[dataset].entropy, best_gaussian_bound(generator)
print(f"{dataset}: entropy {entropy:.3f} nats, best bound of any Gaussian steps {best:.2f}. "
      f"On the support: {share_inside(clean):.1%}, {share_inside(noisy):.1%} at t = {t_min}")
samples, notes = [clean], [f"entropy {entropy:.3f} nats\n{share_inside(clean):.1%} on the support"]
for name, model, count, aside in zip(NAMES, models, updates, (f" (no Gaussian below {best:.2f})", "")):
    nats = torch.cat([bound(model, num_samples, generator) for _ in range(10)])
    x = model.invert(model.sample(caption(num_samples), grid, generator=generator), grid)
    x_0 = model.score_denoise(x, grid, caption(num_samples))
    print(f"{name}: {count} updates, bound {nats.mean():.3f} +- {nats.std() / len(nats)**0.5:.3f} nats. "
          f"On the support: {share_inside(x_0):.1%} of samples, {share_inside(x[:, 0]):.1%} at t = {t_min}")
    samples.append(x_0)
    notes.append(f"bound {nats.mean():.3f} nats{aside}\n{share_inside(x_0):.1%} on the support")
with torch.no_grad(), one_line_errors():
    sheet = draw_picture(models, draw_data(20 * num_samples, generator)[..., 0], [x[..., 0] for x in samples], notes)
    pictures.save(sheet, picture)
print(f"wrote {picture}")
