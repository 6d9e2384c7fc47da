"""Show the idea in two dimensions: train Gaussian reverse steps and NTM's steps on the same data, and plot both.

An image of two pixels is a point in the plane, so one figure shows everything. With only four steps from noise to data,
p(x_s | x_t) has several pieces: x_t does not tell from which part of the data the point came. A diffusion model's step
is a Gaussian (here, an NTM without a transporter). Even after long training, a Gaussian also covers the space between
the pieces. NTM's step is a flow and has pieces where the data have them.

    python toy2d.py --squares=4
    python toy2d.py --max_iters=200 --num_samples=1000    # a first look

Both models train at once, each on one core, for equal processor time. Writes out/toy2d.png and out/toy2d_last.png.
"""

import copy
import math
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from configurator import configure
from flow import forward_kernel, forward_trajectory, reverse_posterior, time_grid
from model import NTM, NTMConfig
from plumbing.images import INK, PAPER, save_image
from plumbing.layouts import make_folder
from plumbing.optim import HIDDEN, make_optimizers, update_average, update_weights
from plumbing.runtime import one_line_errors
from predictor import standard_normal_nll

squares = 2  # squares on a side of the checkerboard; 4 has more pieces and is harder
figure = "out/toy2d.png"  # the file to write the figure to
seed = 0  # the seed of data, weights and samples
steps = 4  # T, the number of reverse steps
shift = 2.0  # e^m of the time grid; with 1, equal steps, the bound is 0.07 nats worse
t_min = 0.02  # the cleanest noise level
width = 32  # numbers per token in the predictor
depth = 1  # layers of the predictor
transporter_width = 16  # numbers per token in the transporter
transporter_blocks = 10  # blocks of the transporter; each maps one pixel as a function of the other, in turn
seconds = 150.0  # seconds of processor time for which each model trains
max_iters = 0  # updates of each model, for a result that does not depend on the clock; 0: train for `seconds`
batch_size = 256  # points per update
lr = 8e-3  # peak learning rate
weight_decay = 1e-4  # decoupled weight decay of all weights
warmup_iters = 100  # updates in which the learning rate rises from 0 to its peak
ema = 0.998  # decay of the averaged weights, which are the ones measured and shown
panel = 180  # side in pixels of a density in the figure
num_samples = 10_000  # samples of each model; its bound is measured on ten times as many fresh examples

NAMES = ["Gaussian", "NTM"]
ENTROPY = math.log(2)  # of the data, in nats: half of [-1, 1]^2 is dark
CAPTION = torch.ones(1, 1, dtype=torch.long)  # the null caption: points have no captions
PLACES = (0, 0), (0.25, -0.25)  # two clean points x_0: the figure shows the steps from x_t = (1 - t) x_0


def sample_data(count, generator):
    """Points in [-1, 1]^2 as two tokens of one number, (count, 2, 1)."""
    column = torch.randint(squares, (count,), generator=generator)
    half = torch.randint(squares // 2, (count,), generator=generator)
    row = column % 2 + 2 * half
    corner = torch.stack([column, row], dim=1)
    within = torch.rand(count, 2, generator=generator)
    return (2 * (corner + within) / squares - 1)[..., None]


def inside(x):
    """Whether each of the points (..., 2) lies on a dark square."""
    square = ((x + 1) * squares / 2).floor()
    dark = square.sum(dim=-1) % 2 == 0
    return dark & (x.abs() < 1).all(dim=-1)


def grid_inside(count):
    """The points (n, 2) of a count x count grid that lie on the support; integrals over the data are sums over them."""
    axis = (2 * torch.arange(count) + 1) / count - 1
    points = torch.cartesian_prod(axis, axis)
    return points[inside(points)]


def proportion_inside(x):
    """The proportion of points (B, 2, 1) that lie on the data's support."""
    return inside(x[..., 0]).float().mean().item()


def posterior_weights(x_t, t, x0):
    """q(x_0 | x_t) for x_t (..., 2) as weights (..., n) of data x0 (n, 2).

    The weights are the softmax of log q(x_t | x_0) from Eq. (1), which is -|x_t - (1 - t) x_0|^2 / 2t^2, multiplied out
    and without the terms that are equal for all x_0.
    """
    logits = (1 - t) * x_t @ x0.T - 0.5 * (1 - t) ** 2 * (x0**2).sum(dim=1)
    return torch.softmax(logits / t**2, dim=-1)


def true_density(x_t, s, t, x0, axis):
    """The true q(x_s | x_t) on the grid axis x axis, (P, P), second pixel first: the mean of Eq. (3) over q(x_0 | x_t).

    x_t (2,), x0 (n, 2), axis (P,). A round Gaussian is a product over the two pixels, so the whole mixture is one
    matrix product.
    """
    A, B, C = reverse_posterior(t, s)
    z = (axis[:, None, None] - (A * x_t + B * x0)) / C
    kernel = torch.exp(-0.5 * z**2) / (C * math.sqrt(2 * math.pi))
    across, up = kernel.unbind(dim=2)  # (P, n) each
    weights = posterior_weights(x_t, t, x0)
    return (up * weights) @ across.T


def best_gaussian_bound(ts, x0, generator):
    """The bound, Eq. (14), in nats, of the best possible Gaussian steps: no trained Gaussian has a lower one.

    These steps have the true mean and full covariance of the two pixels given x_t. x0 (n, 2): points that stand for the
    data.
    """
    clean = sample_data(5 * num_samples, generator)
    x = forward_trajectory(clean, ts.expand(len(clean), -1), generator)[..., 0]
    squares_of_x0 = (x0[:, :, None] * x0[:, None]).flatten(1)
    best = math.log(2 * math.pi * math.e)  # the prior's entropy; each step adds a difference of two entropies
    for k in range(len(ts) - 1):
        s, t = ts[k], ts[k + 1]
        _, B, C = reverse_posterior(t, s)
        weights = posterior_weights(x[:, k + 1], t, x0)
        mean = weights @ x0
        products = (weights @ squares_of_x0).view(-1, 2, 2)
        outer = mean[:, :, None] * mean[:, None]
        covariance = C**2 * torch.eye(2) + B**2 * (products - outer)
        _, beta = forward_kernel(t, s)
        best += (0.5 * covariance.logdet().mean() - 2 * beta.log()).item()
    return best


def euler_estimate(x, times, x0):
    """Flow matching's estimate of -log p(x) in nats, (count,), by Euler steps of its ODE. It is not a bound.

    x (count, 2) is at times[0]; times (K+1,) end at 1. The velocity, (x_t - E[x_0 | x_t]) / t, and its divergence are
    exact.
    """
    change = 0.0
    for t, later in zip(times, times[1:]):
        weights = posterior_weights(x, t, x0)
        mean = weights @ x0
        variance = (weights @ x0**2 - mean**2).sum(dim=1)
        divergence = 2 - (1 - t) / t**2 * variance  # of the velocity, times t
        change += (later - t) * divergence / t
        x = x + (later - t) * (x - mean) / t
    noise = x[:, None, :, None]
    return standard_normal_nll(noise)[:, 0] - change


def build(blocks):
    """An NTM of images of two pixels. blocks: of the transporter; 0 gives a diffusion model's Gaussian steps."""
    torch.manual_seed(seed)
    config = NTMConfig(
        image_size=(1, 2),
        channels=1,
        patch_size=1,
        vocab_size=2,
        text_len=1,
        width=width,
        depth=depth,
        heads=1,
        transporter_width=transporter_width,
        transporter_blocks=blocks,
        transporter_layers=1,
        transporter_heads=1,
        steps=steps,
        shift=shift,
    )
    return NTM(config)


def draw_steps(ts, generator):
    """Draw a batch of steps, one from each trajectory: x (B, 2, 2, 1) at times (B, 2)."""
    # the cube draws the last steps, which have far more to learn, most often
    k = (steps * torch.rand(batch_size, 1, generator=generator) ** 3).long()
    pair = ts[torch.cat([k, k + 1], dim=1)]
    x = forward_trajectory(sample_data(batch_size, generator), pair, generator)
    return x, pair


def train(name, model, ts, stop):
    """Train by maximum likelihood for max_iters updates or `seconds` of processor time, or until the Event `stop` is
    set; return the averaged model and the number of updates."""
    average = copy.deepcopy(model).requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    # Muon for the modulation as well: with AdamW, as in train.py, the bound ended 0.15 nats higher
    hidden = *HIDDEN, "modulation.1.weight"
    optimizers = make_optimizers(model, "muon", weight_decay, torch.device("cpu"), hidden=hidden)
    text = CAPTION.expand(batch_size, 1)
    T = torch.full((batch_size,), steps)
    start = time.thread_time()
    done = 0  # fraction of the training
    i = 0
    with tqdm(total=100, desc=name, bar_format="{l_bar}{bar}| {elapsed}", position=NAMES.index(name)) as bar:
        while done < 1 and not stop.is_set():
            x, pair = draw_steps(ts, generator)
            loss = model.transition_nll(x, pair, T, text).mean()
            model.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            warmup = min(1, (i + 1) / max(1, warmup_iters))
            update_weights(optimizers, lr * warmup * (1 + math.cos(math.pi * done)) / 2)
            update_average(average, model, ema, i)
            i += 1
            done = i / max_iters if max_iters > 0 else (time.thread_time() - start) / seconds
            bar.update(min(100 * done, 100) - bar.n)
    return average, i


def bound(model, ts, count, generator):
    """Upper bounds, Eq. (14), on -log p(x_{t_min}) in nats, (count,), of fresh examples.

    x_{t_min} is the data scaled by 1 - t_min plus noise of standard deviation t_min, so its entropy differs a little
    from that of the data.
    """
    ts = ts.expand(count, -1)
    x = forward_trajectory(sample_data(count, generator), ts, generator)
    _, nats = model.trajectory_bound(x, ts, CAPTION.expand(count, 1))
    return nats


def model_density(model, x_t, s, t, axis):
    """The model's exact p(x_s | x_t), Eq. (11), on the grid axis x axis, as true_density's. x_t (2,), axis (P,)."""
    x_s = torch.cartesian_prod(axis, axis).flip(1)[..., None]
    count = len(x_s)
    x_t = x_t[:, None].expand(count, -1, -1)
    T = torch.full((count,), steps)
    nll = model.step_nll(x_s, x_t, s.expand(count), t.expand(count), T, CAPTION.expand(count, 1))
    return torch.exp(-nll).view(len(axis), -1)


# ---------------------------------------------------------------------------------------------------------------
# The figure

GAP, GROUP_GAP, LABEL, TITLE, NOTE = 6, 16, 76, 32, 48  # pixels
MAGMA = [  # from black over red to pale yellow
    (0, 0, 4),
    (59, 15, 112),
    (140, 41, 129),
    (222, 73, 104),
    (254, 159, 109),
    (252, 253, 191),
]


def colours(values):
    """Values (H, W) in [0, 1], clipped, as an RGB image of evenly rising lightness; row 0 is at the bottom."""
    place = np.asarray(values).clip(0, 1)[::-1] * (len(MAGMA) - 1)
    channels = [np.interp(place, range(len(MAGMA)), channel) for channel in zip(*MAGMA)]
    pixels = np.stack(channels, axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def write(sheet, text, x, y, size=15):
    font = ImageFont.load_default(size)
    ImageDraw.Draw(sheet).text((x, y), text, fill=INK, font=font, anchor="mm", align="center")


def make_figure(models, ts, clean, samples):
    """The figure, an RGB PIL.Image: a row of densities for each step, and below them samples.

    A row shows p(x_s | x_t) for two x_t: the true one, by data `clean` (n, 2), and those of the models. samples: of the
    data and of each model, (points (count, 2, 1), the text underneath).
    """
    cell = panel + GAP
    below = TITLE + steps * cell + TITLE
    sheet = Image.new("RGB", (LABEL + 6 * cell + GROUP_GAP, below + 2 * panel + GAP + NOTE), PAPER)
    write(sheet, "circle: x_t", LABEL / 2, TITLE / 2, 13)
    lefts = LABEL, LABEL + 3 * cell + GROUP_GAP
    for left in lefts:
        for column, title in enumerate(("true p(x_s | x_t)", "Gaussian step", "NTM step")):
            write(sheet, title, left + column * cell + panel / 2, TITLE / 2)
    for row in range(steps):
        s, t = ts[steps - row - 1], ts[steps - row]
        top = TITLE + row * cell
        write(sheet, f"t = {t:.2f}\nto {s:.2f}", LABEL / 2, top + panel / 2)
        for left, place in zip(lefts, PLACES):
            draw_densities(sheet, left, top, models, s, t, place, clean)
    left = LABEL
    for title, (points, note) in zip(("data", "samples, Gaussian steps", "samples, NTM"), samples):
        draw_samples(sheet, left, below, title, points, note)
        left += 2 * cell + GROUP_GAP // 2
    return sheet


def last_step_of(sheet):
    """The part of make_figure's sheet that shows the difference: titles, last step and samples."""
    above = (steps - 1) * (panel + GAP)
    short = Image.new("RGB", (sheet.width, sheet.height - above), PAPER)
    short.paste(sheet.crop((0, above, sheet.width, sheet.height)))
    short.paste(sheet.crop((0, 0, sheet.width, TITLE)))
    return short


def draw_densities(sheet, left, top, models, s, t, place, clean):
    """Draw p(x_s | x_t) at x_t = (1 - t) place as a row of panels: the true one, then those of the models."""
    half = 1.1 * (1 + s.item())  # a panel shows [-half, half]^2
    axis = half * ((2 * torch.arange(panel) + 1) / panel - 1)  # the pixels' centres
    x_t = (1 - t) * torch.tensor(place)
    across, up = ((x_t / half + 1) / 2 * panel).tolist()
    true = true_density(x_t, s, t, clean, axis)
    densities = [true, *(model_density(model, x_t, s, t, axis) for model in models)]
    for density in densities:
        sheet.paste(colours(density / true.max()), (left, top))
        circle = left + across, top + panel - up
        ImageDraw.Draw(sheet).circle(circle, 4, outline=(90, 230, 255), width=2)
        left += panel + GAP


def draw_samples(sheet, left, top, title, points, note):
    """Draw the histogram of points (count, 2, 1), two panels wide, between a title and a note."""
    wide = 2 * panel + GAP
    half = 1.1 * (1 + t_min)
    x, y = points[..., 0].T
    counts, _, _ = np.histogram2d(y, x, bins=wide, range=[(-half, half)] * 2)
    sheet.paste(colours(counts), (left, top))
    write(sheet, title, left + wide / 2, top - TITLE / 2)
    write(sheet, note, left + wide / 2, top + wide + NOTE / 2)


# ---------------------------------------------------------------------------------------------------------------
# The script


def check(config):
    """Raise ValueError for settings that do not work."""
    if squares % 2:
        raise ValueError(f"squares is {squares}, but must be even")
    for name, least in {"t_min": 1e-4, "num_samples": 2, "transporter_blocks": 1}.items():
        if config[name] < least:
            raise ValueError(f"{name} is {config[name]}, but must be at least {least}")
    if Path(figure).is_dir():
        raise ValueError(f"{figure} is a folder: name a file in it")


def measure(name, model, updates, ts, generator):
    """Print a model's bound and how many of its samples are on the support.

    Returns these samples, denoised (num_samples, 2, 1), and the bound and the proportion as texts.
    """
    text = CAPTION.expand(num_samples, 1)
    nats = torch.cat([bound(model, ts, num_samples, generator) for _ in range(10)])
    u = model.sample(text, ts, generator=generator)
    x = model.invert(u, ts)
    denoised = model.score_denoise(x, ts, text)
    on_support = f"{proportion_inside(denoised):.1%}"
    error = nats.std() / len(nats) ** 0.5
    print(f"{name}: {updates} updates, bound {nats.mean():.3f} +- {error:.3f} nats. On the support: {on_support} of "
          f"samples, {proportion_inside(x[:, 0]):.1%} at t = {t_min}")
    return denoised, f"bound {nats.mean():.3f} nats", f"{on_support} on the support"


@one_line_errors()
def main(config):
    """Train both models and write the figure; return the averaged models and the number of updates of each."""
    check(config)
    make_folder(Path(figure).parent)  # fails now for a bad path, rather than after training
    torch.set_num_threads(1)  # for each model: more threads do not speed up tensors this small
    ts = time_grid(steps, t_min, 2, shift)
    untrained = [build(0), build(transporter_blocks)]
    with ThreadPoolExecutor() as pool:  # torch releases Python's lock, so two threads use two cores
        stop = Event()
        try:
            trained = pool.map(train, NAMES, untrained, [ts, ts], [stop, stop])
            models, updates = zip(*trained)
        finally:
            stop.set()  # after Ctrl-C, for which the pool would otherwise wait for both

    generator = torch.Generator().manual_seed(seed + 1)
    clean = sample_data(num_samples, generator)
    noisy = forward_trajectory(clean, ts[:1].expand(num_samples, 1), generator)[:, 0]
    best = best_gaussian_bound(ts, grid_inside(60), generator)
    on_support = f"{proportion_inside(clean):.1%}"
    print(f"Checkerboard: entropy {ENTROPY:.3f} nats, best bound of any Gaussian steps {best:.2f}. "
          f"On the support: {on_support}, {proportion_inside(noisy):.1%} at t = {t_min}")
    for K in (4, 8, 50):
        times = torch.linspace(t_min, 1, K + 1)
        nats = euler_estimate(noisy[:1000, :, 0], times, clean[..., 0])
        print(f"Flow matching's estimate in {K} Euler steps, with the exact velocity: {nats.mean():.3f} nats, no bound")
    samples = [(clean, f"entropy {ENTROPY:.3f} nats\n{on_support} on the support")]
    remarks = f" (no Gaussian below {best:.2f})", ""
    for name, model, count, remark in zip(NAMES, models, updates, remarks):
        denoised, bound_of_it, on_support = measure(name, model, count, ts, generator)
        samples.append((denoised, f"{bound_of_it}{remark}\n{on_support}"))
    sheet = make_figure(models, ts, grid_inside(400), samples)
    save_image(sheet, figure)
    last = Path(figure)
    last = last.with_name(f"{last.stem}_last{last.suffix}")
    save_image(last_step_of(sheet), last)
    print(f"wrote {figure}, and its last step alone, {last}")
    return models, updates


if __name__ == "__main__":
    main(configure(globals()))
