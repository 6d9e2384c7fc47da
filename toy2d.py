"""Why the method exists, in two dimensions: trains a Gaussian reverse step and NTM's on the same data and shows both.

An image of two pixels is a point in the plane, so all there is to know fits in one figure. Along four steps from noise
to data, p(x_s | x_t) has pieces, one for each place the point may have come from, and x_t does not tell which it was. A
diffusion model's step is a Gaussian, here an NTM without a transporter: it covers the pieces and what lies between
them, however long it trains. NTM's step is a flow and has pieces where the data have them.

    python toy2d.py --squares=4

Both models train for the same processor time, side by side, each on one core. Leaves the figure in out/toy2d.png.
"""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from configurator import configure
from flow import forward_kernel, forward_trajectory, gaussian_nll, reverse_posterior, time_grid
from model import NTM, NTMConfig
from plumbing.images import INK, PAPER, save_image
from plumbing.layouts import make_folder
from plumbing.optim import HIDDEN, make_optimizers, step, update_average
from plumbing.runtime import one_line_errors

squares = 2  # a side of the checkerboard, of which the data are the dark squares; 4: many more pieces, and harder
figure = "out/toy2d.png"
seed = 0
steps = 4  # T
shift = 2.0  # e^m of the time grid; at 1, even spacing, several levels have fine structure to model: 0.07 nats worse
t_min = 0.02  # the cleanest level
width = 32  # of the predictor, as depth
depth = 1
transporter_width = 16
transporter_blocks = 10  # each stretches one pixel as a function of the other, in turn
seconds = 150.0  # processor time that each model trains for
max_iters = 0  # updates of each model instead, for a result that does not depend on the clock
batch_size = 256
lr = 8e-3
weight_decay = 1e-4
warmup_iters = 100
ema = 0.998  # decay of the averaged weights, which everything below uses
panel = 180  # pixels, the side of a density in the figure
num_samples = 10_000  # of each model; its bound is measured on ten times as many fresh examples

NAMES = ["Gaussian", "NTM"]
ENTROPY = math.log(2)  # of the data, in nats: half of [-1, 1]^2 is dark
CAPTION = torch.ones(1, 1, dtype=torch.long)  # the null caption: there is nothing to say about a point
PLACES = (0, 0), (0.25, -0.25)  # two clean points x_0: the figure shows the steps from x_t = (1 - t) x_0


def sample_data(count, generator):
    """Points in [-1, 1]^2 as two tokens of one number, (count, 2, 1)."""
    column, half = (torch.randint(n, (count,), generator=generator) for n in (squares, squares // 2))
    corner = torch.stack([column, column % 2 + 2 * half], dim=1)
    return (2 * (corner + torch.rand(count, 2, generator=generator)) / squares - 1)[..., None]


def inside(x):
    """Whether each of the points (..., 2) lies on a dark square."""
    return (((x + 1) * squares / 2).floor().sum(dim=-1) % 2 == 0) & (x.abs() < 1).all(dim=-1)


def grid_inside(count):
    """Points (n, 2) of a count x count grid that lie on the support: they stand for the data in integrals."""
    axis = (2 * torch.arange(count) + 1) / count - 1
    points = torch.cartesian_prod(axis, axis)
    return points[inside(points)]


def proportion_inside(x):
    """The proportion of points (B, 2, 1) that lie on the data's support."""
    return inside(x[..., 0]).float().mean().item()


def posterior_weights(x_t, t, x0):
    """q(x_0 | x_t) as importance weights (..., n) of data x0 (n, 2), for x_t (..., 2): softmax of log q(x_t | x_0) from
    Eq. (1), -|x_t - (1 - t) x_0|^2 / 2t^2, multiplied out and without what is the same for every x_0."""
    logits = (1 - t) * x_t @ x0.T - 0.5 * (1 - t) ** 2 * (x0**2).sum(dim=1)
    return torch.softmax(logits / t**2, dim=-1)


def true_density(x_t, s, t, x0, axis):
    """q(x_s | x_t), the mean of Eq. (3) over q(x_0 | x_t), on axis x axis: (P, P), second pixel first. x_t (2,), x0
    (n, 2), axis (P,). Round Gaussians factor into the two pixels, so the whole mixture is one matrix product."""
    A, B, C = reverse_posterior(t, s)
    z = (axis[:, None, None] - (A * x_t + B * x0)) / C
    kernel = torch.exp(-0.5 * z**2) / (C * math.sqrt(2 * math.pi))  # (P, n, 2)
    return (kernel[..., 1] * posterior_weights(x_t, t, x0)) @ kernel[..., 0].T


def best_gaussian_bound(ts, x0, generator):
    """The bound, Eq. (14), in nats, of the best Gaussian steps there are, correlated ones too: with the true mean and
    covariance of the pixels given x_t, by points x0 (n, 2) for the data. No training of a Gaussian goes below it."""
    clean = sample_data(5 * num_samples, generator)
    x = forward_trajectory(clean, ts.expand(len(clean), -1), generator)[..., 0]
    best = math.log(2 * math.pi * math.e)  # the prior's entropy; each step adds a difference of two entropies
    for k, (s, t) in enumerate(zip(ts, ts[1:])):
        _, B, C = reverse_posterior(t, s)
        weights = posterior_weights(x[:, k + 1], t, x0)
        mean, products = weights @ x0, (weights @ (x0[:, :, None] * x0[:, None]).flatten(1)).view(-1, 2, 2)
        covariance = C**2 * torch.eye(2) + B**2 * (products - mean[:, :, None] * mean[:, None])
        best += (0.5 * covariance.logdet().mean() - 2 * forward_kernel(t, s)[1].log()).item()
    return best


def euler_estimate(x, times, x0):
    """What Euler steps of flow matching's ODE along `times` (K+1,), from x's level to 1, give for -log p(x) in nats,
    (count,): not a bound, even with the exact velocity, (x_t - E[x_0 | x_t]) / t, and divergence. x (count, 2)."""
    change = 0.0
    for t, later in zip(times, times[1:]):
        weights = posterior_weights(x, t, x0)
        mean = weights @ x0
        change += (later - t) * (2 - (1 - t) / t**2 * (weights @ x0**2 - mean**2).sum(dim=1)) / t
        x = x + (later - t) * (x - mean) / t
    return gaussian_nll(x[:, None, :, None])[:, 0] - change


def build(blocks):
    """An NTM of images of two pixels; with no blocks in the transporter, a diffusion model's Gaussian steps."""
    torch.manual_seed(seed)
    return NTM(NTMConfig(image_size=(1, 2), channels=1, patch_size=1, vocab_size=2, text_len=1, width=width,
                         depth=depth, heads=1, transporter_width=transporter_width, transporter_blocks=blocks,
                         transporter_layers=1, transporter_heads=1, steps=steps, shift=shift, max_t_min=t_min))


def train(name, model, ts):
    """Maximum likelihood for `seconds` of this thread's processor time. Returns the averaged model and its updates."""
    average, generator = copy.deepcopy(model).requires_grad_(False), torch.Generator().manual_seed(seed)
    # Muon for the modulation as well: left to AdamW, as train.py leaves it, the bound ended 0.15 nats higher
    hidden = *HIDDEN, "modulation.1.weight"
    optimizers = make_optimizers(model, "muon", weight_decay, torch.device("cpu"), hidden=hidden)
    text, T = CAPTION.expand(batch_size, 1), torch.full((batch_size,), steps)
    start, i, done = time.thread_time(), 0, 0
    with tqdm(total=100, desc=name, bar_format="{l_bar}{bar}| {elapsed}", position=NAMES.index(name)) as bar:
        while done < 1:
            # One step of each trajectory; the cube, because there is far more to learn in the last steps.
            k = (steps * torch.rand(batch_size, 1, generator=generator) ** 3).long()
            pair = ts[torch.cat([k, k + 1], dim=1)]
            x = forward_trajectory(sample_data(batch_size, generator), pair, generator)
            loss = model.transitions(x, pair, text, T)[0].mean()
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step(optimizers, lr * min(1, (i + 1) / max(1, warmup_iters)) * (1 + math.cos(math.pi * done)) / 2)
            update_average(average, model, ema, i)
            i += 1
            done = i / max_iters if max_iters > 0 else (time.thread_time() - start) / seconds
            bar.update(min(100 * done, 100) - bar.n)
    return average, i


def bound(model, ts, count, generator):
    """Upper bounds on -log p(x_{t_min}) in nats, (count,), of fresh examples, Eq. (14). x_{t_min} is the data scaled by
    1 - t_min plus noise of standard deviation t_min, so its entropy is not quite theirs."""
    ts = ts.expand(count, -1)
    x = forward_trajectory(sample_data(count, generator), ts, generator)
    return model.trajectory_bound(x, ts, CAPTION.expand(count, 1))[1]


def model_density(model, x_t, s, t, axis):
    """The model's exact p(x_s | x_t), Eq. (11), on axis x axis: (P, P), second pixel first. x_t (2,), axis (P,)."""
    x_s = torch.cartesian_prod(axis, axis).flip(1)[..., None]
    count = len(x_s)
    nll = model.step_nll(x_s, x_t[:, None].expand(count, -1, -1), s.expand(count), t.expand(count),
                         torch.full((count,), steps), CAPTION.expand(count, 1))
    return torch.exp(-nll).view(len(axis), -1)


GAP, GROUP_GAP, LABEL, TITLE, NOTE = 6, 16, 76, 32, 48  # pixels
MAGMA = [(0, 0, 4), (59, 15, 112), (140, 41, 129), (222, 73, 104), (254, 159, 109), (252, 253, 191)]


def colours(values):
    """(H, W) in [0, 1], clipped, to RGB of evenly rising lightness. The first row is at the bottom."""
    place = np.asarray(values).clip(0, 1)[::-1] * (len(MAGMA) - 1)
    channels = [np.interp(place, range(len(MAGMA)), channel) for channel in zip(*MAGMA)]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def make_figure(models, ts, clean, samples):
    """An RGB PIL.Image: a row for each step, p(x_s | x_t) for two x_t, the true one by data `clean` (n, 2) and those of
    the models; then `samples` of the data and of the models, each (points (count, 2, 1), a note underneath)."""
    cell, wide = panel + GAP, 2 * panel + GAP  # a panel of samples is two columns wide
    bottom = TITLE + steps * cell + TITLE
    sheet = Image.new("RGB", (LABEL + 6 * cell + GROUP_GAP, bottom + wide + NOTE), PAPER)
    pen = ImageDraw.Draw(sheet)

    def write(text, x, y, size=15):
        pen.text((x, y), text, fill=INK, font=ImageFont.load_default(size), anchor="mm", align="center")

    write("circle: x_t", LABEL / 2, TITLE / 2, 13)
    for row, k in enumerate(reversed(range(steps))):
        s, t, y = ts[k], ts[k + 1], TITLE + row * cell
        half = 1.1 * (1 + s.item())  # the panel shows [-half, half]^2
        axis = half * ((2 * torch.arange(panel) + 1) / panel - 1)  # the pixels' centres
        write(f"t = {t:.2f}\nto {s:.2f}", LABEL / 2, y + panel / 2)
        for group, place in enumerate(PLACES):
            x, x_t = LABEL + group * (3 * cell + GROUP_GAP), (1 - t) * torch.tensor(place)
            across, up = ((x_t / half + 1) / 2 * panel).tolist()
            densities = [true_density(x_t, s, t, clean, axis), *(model_density(m, x_t, s, t, axis) for m in models)]
            for density, title in zip(densities, ("true p(x_s | x_t)", "Gaussian step", "NTM step")):
                sheet.paste(colours(density / densities[0].max()), (x, y))  # one scale: the true density's
                pen.circle((x + across, y + panel - up), 4, outline=(90, 230, 255), width=2)
                if row == 0:
                    write(title, x + panel / 2, TITLE / 2)
                x += cell

    x, limits = LABEL, (-1.1 * (1 + t_min), 1.1 * (1 + t_min))
    for title, (points, note) in zip(("data", "samples, Gaussian steps", "samples, NTM"), samples):
        counts, _, _ = np.histogram2d(points[:, 1, 0], points[:, 0, 0], bins=wide, range=(limits, limits))
        sheet.paste(colours(counts), (x, bottom))
        write(title, x + wide / 2, bottom - TITLE / 2)
        write(note, x + wide / 2, bottom + wide + NOTE / 2)
        x += 2 * cell + GROUP_GAP // 2
    return sheet


@one_line_errors()
def main(config):
    """Returns the two averaged models and how many updates each took."""
    if squares % 2:
        raise ValueError(f"squares is {squares}, but must be even")
    for name, least in {"t_min": 1e-4, "num_samples": 2, "transporter_blocks": 1}.items():
        if config[name] < least:
            raise ValueError(f"{name} is {config[name]}, but must be at least {least}")
    if Path(figure).is_dir():
        raise ValueError(f"{figure} is a folder: name a file in it")
    make_folder(Path(figure).parent)  # better known now than after training
    torch.set_num_threads(1)  # of each model: tensors this small gain nothing from more
    ts = time_grid(steps, t_min, 2, shift)
    with ThreadPoolExecutor() as pool:  # torch lets go of Python's lock, so threads are enough for two cores
        models, updates = zip(*pool.map(train, NAMES, [build(0), build(transporter_blocks)], [ts, ts]))

    generator = torch.Generator().manual_seed(seed + 1)
    clean = sample_data(num_samples, generator)
    noisy = forward_trajectory(clean, ts[:1].expand(num_samples, 1), generator)[:, 0]
    best = best_gaussian_bound(ts, grid_inside(60), generator)
    print(f"Checkerboard: entropy {ENTROPY:.3f} nats, best bound of any Gaussian steps {best:.2f}. "
          f"On the support: {proportion_inside(clean):.1%}, {proportion_inside(noisy):.1%} at t = {t_min}")
    for K in (4, 8, 50):
        nats = euler_estimate(noisy[:1000, :, 0], torch.linspace(t_min, 1, K + 1), clean[..., 0])
        print(f"Flow matching's estimate in {K} Euler steps, with the exact velocity: {nats.mean():.3f} nats, no bound")
    samples = [(clean, f"entropy {ENTROPY:.3f} nats\n{proportion_inside(clean):.1%} on the support")]
    for name, model, count, aside in zip(NAMES, models, updates, (f" (no Gaussian below {best:.2f})", "")):
        nats = torch.cat([bound(model, ts, num_samples, generator) for _ in range(10)])
        x = model.invert(model.sample(CAPTION.expand(num_samples, 1), ts, generator=generator), ts)
        denoised = model.score_denoise(x, ts, CAPTION.expand(num_samples, 1))
        print(f"{name}: {count} updates, bound {nats.mean():.3f} +- {nats.std() / len(nats)**0.5:.3f} nats. On the "
              f"support: {proportion_inside(denoised):.1%} of samples, {proportion_inside(x[:, 0]):.1%} at t = {t_min}")
        note = f"bound {nats.mean():.3f} nats{aside}\n{proportion_inside(denoised):.1%} on the support"
        samples.append((denoised, note))
    save_image(make_figure(models, ts, grid_inside(400), samples), figure)
    print(f"wrote {figure}")
    return models, updates


if __name__ == "__main__":
    main(configure(globals()))
