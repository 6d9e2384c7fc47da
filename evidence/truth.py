"""The true density of noisy images of the "shapes" data set, and the distance of a model's steps from the truth.

    python -m evidence.truth out/shapes_plain --examples=50

takes minutes. It prints by how many nats -log p(x_s | x_t, caption) of each step exceeds the true one, and writes
truth.json into the model's folder.

A scene is a function of uniform numbers, its draws (ours), and the caption determines a few of them. So the density of
an image at noise level t is an integral over the others,

    q(x_t | caption) = E N(x_t; (1-t) x_0, t^2 I),

and the density of a reverse step follows: q(x_s | x_t, caption) = q(x_t | x_s) q(x_s | caption) / q(x_t | caption).
Near the data few scenes explain x_t. Sequential Monte Carlo (Del Moral, Doucet & Jasra 2006) finds these gradually: it
starts from random scenes, raises the power of the likelihood from 0 to 1, and at every stage copies the likelier scenes
and then moves them. The estimate of the integral is unbiased and does not use the scene that x_t was made from.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal
from tqdm import tqdm

from data import get_tokenizer, open_dataset
from flow import forward_trajectory, reverse_posterior
from model import forward_log_prob
from networks import NTMS
from plumbing import checkpoint
from plumbing.console import module_parser, print_all_text
from plumbing.loader import validation_batches
from plumbing.rng import uniforms
from plumbing.runtime import find_device, one_line_errors
from plumbing.shapes import DRAWS, compose, render

OF_THE_CAPTION = [0, 2, 3, 4]  # the draws of kind, count and things
RELATION = 1  # the draw of the relation
KIND_OF_RELATIONS = 0.75  # captions with a relation are those whose kind's draw is at least this
CROWD = 10  # times as many scenes at the start, so that they include every arrangement that explains x_t
COLUMNS = "", ", nearest diagonal Gaussian", ", nearest full Gaussian"  # the figures of each step


def some_scenes(draws, z):
    """P scenes with the caption of `draws` (DRAWS,); normal z (P, DRAWS) decides what the caption leaves open."""
    u = torch.special.ndtr(torch.from_numpy(z)).numpy().clip(max=1 - 1e-12)
    fixed = list(OF_THE_CAPTION)
    if draws[0] >= KIND_OF_RELATIONS:
        fixed.append(RELATION)
    u[:, fixed] = draws[fixed]
    return compose(u)


def moments_of_noise(t):
    """The scale of x_0 in x_t, and the variance around it; dequantisation adds little, being far narrower than t."""
    return 1 - t, t**2 + (1 - t) ** 2 / (12 * 128**2)


def pixels(scene, image_size):
    """Images of scenes, (P, 3 size^2) float32: pixels at the centres of the bins that dequantisation fills."""
    values = render(scene, image_size).reshape(len(scene.kind), -1)
    return (values + np.float32(0.5)) / 128 - 1


def posterior(x, t, draws, rng, particles=1000, moves=5):
    """log q(x_t | caption) in nats of a noisy image x (3, size, size) float32, and scenes from q(x_0 | x_t, caption).

    draws: those of any scene with that caption, (DRAWS,). The scenes are images (P, 3 size^2) with weights (P,) whose
    sum is 1. particles: P. moves: Metropolis steps at each stage.
    """
    scale, variance = moments_of_noise(t)
    size = x.shape[-1]
    log_constant = 0.5 * x.size * math.log(2 * math.pi * variance)

    def log_likelihood(z):
        x0 = pixels(some_scenes(draws, z), size)
        squares = np.square(x.reshape(-1) - np.float32(scale) * x0).sum(axis=1)
        return -0.5 * squares.astype(np.float64) / variance - log_constant

    z = rng.standard_normal((CROWD * particles, DRAWS))
    fit = log_likelihood(z)
    power = 0.0
    log_q = 0.0
    enough = particles
    while True:
        rise = next_rise(fit, 1 - power, enough)
        weights = np.exp(rise * (fit - fit.max()))
        log_q += rise * fit.max()
        log_q += math.log(weights.mean())
        power += rise
        if power >= 1:
            break
        chosen = resample(weights, particles, rng)
        z = z[chosen]
        fit = fit[chosen]
        enough = particles / 2
        for _ in range(moves):
            move(z, fit, power, log_likelihood, rng)
    scenes = torch.from_numpy(pixels(some_scenes(draws, z), size)).double()
    return log_q, scenes, torch.from_numpy(weights / weights.sum())


def resample(weights, count, rng):
    """The numbers of `count` scenes, each as often as its weight says, up to rounding (systematic resampling)."""
    shares = np.cumsum(weights) / weights.sum()
    places = (np.arange(count) + rng.random()) / count
    return np.searchsorted(shares, places).clip(max=len(weights) - 1)


def move(z, fit, power, log_likelihood, rng):
    """Move scenes, z (P, DRAWS) and fit (P,), in place by a Metropolis step.

    The target is the normal distribution times the likelihood to the given power.
    """
    column = len(z), 1
    # moves some of the draws, by a random size; the proposal keeps the normal distribution
    moved = rng.random(z.shape) < rng.choice([0.15, 0.4, 1.0], column)
    size = 10 ** rng.uniform(-2, 0, column) * moved
    proposed = np.sqrt(1 - size**2) * z + size * rng.standard_normal(z.shape)
    proposed_fit = log_likelihood(proposed)
    accepted = np.log(rng.random(len(z))) < power * (proposed_fit - fit)
    z[accepted] = proposed[accepted]
    fit[accepted] = proposed_fit[accepted]


def next_rise(fit, most, enough):
    """The greatest rise of the power, up to `most`, whose weights exp(rise * fit) leave `enough` effective samples."""
    def suffices(rise):
        weights = np.exp(rise * (fit - fit.max()))
        return weights.sum() ** 2 / np.square(weights).sum() >= enough

    if suffices(most):
        return most
    low = 0.0
    high = most
    for _ in range(40):
        middle = (low + high) / 2
        if suffices(middle):
            low = middle
        else:
            high = middle
    return low


def log_gaussians(x_s, x_t, A, B, C, scenes, weights):
    """log-densities in nats of x_s, shaped like x_t, under the two Gaussians nearest to q(x_s | x_t, caption).

    This density is a mixture of N(A x_t + B x_0, C^2 I) over the scenes x_0 of posterior(). The first Gaussian has a
    diagonal covariance, the second the full one.
    """
    x_s = x_s.flatten().double()
    x_t = x_t.flatten().double()
    means = A * x_t + B * scenes
    mean = weights @ means
    away = means - mean
    covariance = away.T @ (away * weights[:, None]) + C**2 * torch.eye(len(x_s))
    independent = Normal(mean, covariance.diagonal().sqrt()).log_prob(x_s).sum()
    full = MultivariateNormal(mean, covariance).log_prob(x_s)
    return independent.item(), full.item()


def distances(network, tokenizer, ts, dataset, count, seed=0):
    """Distances in nats from the truth, (count, T-1, 3), of all steps but the last, cleanest first.

    For each of the first `count` held-out images: by how much -log p(x_s | x_t, caption) of an NTM, and of the two
    Gaussians of log_gaussians, exceeds the true one. ts (T+1,): the noise levels, T > 1. dataset: shapes in colour.
    """
    text_len = network.config.text_len
    rows = []
    bar = tqdm(total=min(count, len(dataset)), desc="truth", leave=False, unit="image")
    for images, text, _, generator in validation_batches(dataset, tokenizer, text_len, count, ts.device):
        x0 = network.patchify(images)
        grid = ts.expand(len(x0), -1)
        x = forward_trajectory(x0, grid, generator)
        nll = network.trajectory_nll(x, grid, text)[:, 1:-1].cpu()
        levels = x[:, 1:].cpu()
        for levels_of_one, nll_of_one in zip(levels, nll):
            true, nearest = true_steps(network, levels_of_one, ts[1:].cpu(), dataset, len(rows), seed)
            found = torch.cat([-nll_of_one[:, None], nearest], dim=1)
            rows.append(true[:, None] - found)
            bar.update()
    bar.close()
    return torch.stack(rows)


def true_steps(network, x, ts, dataset, number, seed):
    """log q(x_s | x_t, caption) of a trajectory's steps, (K-1,), and the two log_gaussians of each, (K-1, 2).

    x: the levels (K, N, D) of held-out image `number` at the times ts (K,).
    """
    draws = uniforms(dataset.seed, dataset.numbers([number]), DRAWS)[0]
    rng = np.random.default_rng([seed, number])
    images = network.unpatchify(x)
    found = [posterior(image.numpy(), t, draws, rng) for image, t in zip(images, ts.tolist())]
    true = []
    nearest = []
    for k in range(len(ts) - 1):
        s, t = ts[k], ts[k + 1]
        log_q_s, *_ = found[k]
        log_q_t, *scenes = found[k + 1]
        forward = forward_log_prob(x[None, k:k + 2], ts[None, k:k + 2]).item()
        true.append(log_q_s + forward - log_q_t)
        nearest.append(log_gaussians(images[k], images[k + 1], *reverse_posterior(t, s), *scenes))
    return torch.tensor(true, dtype=torch.float64), torch.tensor(nearest, dtype=torch.float64)


def summary(rows):
    """Means of the result of distances(): {"step 1": {"mean", "standard_error"}, "step 1, nearest ...": ...}."""
    results = {}
    for k, step in enumerate(rows.unbind(dim=1), start=1):
        for name, nats in zip(COLUMNS, step.unbind(dim=1)):
            results[f"step {k}{name}"] = {"mean": nats.mean().item()}
            if len(nats) > 1:
                results[f"step {k}{name}"]["standard_error"] = (nats.std() / math.sqrt(len(nats))).item()
    return results


def make_parser():
    parser = module_parser(
        "evidence.truth",
        "Measures how far the steps of a model of shapes are from the truth.",
        examples=["assets/shapes", "out/shapes_plain --examples=50"],
    )
    parser.add_argument("out_dir", help="the folder of an NTM's ckpt.pt; gets truth.json")
    parser.add_argument("--examples", type=int, default=50, help="held-out images; default %(default)s")
    parser.add_argument("--steps", type=int, default=0, help="T, the number of reverse steps; default: as trained")
    parser.add_argument("--t_min", type=float, default=0.02,
                        help="noise level where trajectories end; default %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="the seed of noise and scenes; default %(default)s")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; default: the best available")
    return parser


def parse(arguments):
    parser = make_parser()
    args = parser.parse_args(arguments)
    for name, least in ("examples", 1), ("steps", 0), ("seed", 0):
        if vars(args)[name] < least:
            parser.error(f"--{name} is {vars(args)[name]}, but must be at least {least}")
    return args


def check(path, settings, config, steps):
    """Raise ValueError for a model whose true steps are not known."""
    if settings["dataset"] != "shapes" or config.channels != 3:
        raise ValueError(f"{path} is of the data set {settings['dataset']}, channels {config.channels}: the truth is "
                         "known for shapes with 3 channels only, choose such a model")
    if steps < 2:
        raise ValueError(f"steps is {steps}, but the truth is known for all steps except the last: choose at least 2")
    first_noise = getattr(config, "first_noise", 1)
    if first_noise != 1:
        raise ValueError(f"{path} has first_noise {first_noise}: the truth of a coupled first step is not known, "
                         "choose a model with first_noise 1")


@one_line_errors()
def main(arguments=None):
    print_all_text()
    args = parse(arguments)
    folder = Path(args.out_dir)
    path = folder / "ckpt.pt"
    device = find_device(args.device)
    network, trained = checkpoint.load_network(path, NTMS, device)
    settings = trained["settings"]
    ts = network.config.time_grid(args.t_min, args.steps).to(device)
    check(path, settings, network.config, len(ts) - 1)
    tokenizer = get_tokenizer(settings["tokenizer"], trained.get("vocabulary"))
    dataset = open_dataset(settings, "val")
    results = summary(distances(network, tokenizer, ts, dataset, args.examples, args.seed))
    for name, nats in results.items():
        error = f" ± {nats['standard_error']:.2f}" if "standard_error" in nats else ""
        print(f"{name:32} {nats['mean']:8.2f}{error} nats above the truth")
    record = {"config": vars(args), "iteration": trained["iter"], "truth": results}
    (folder / "truth.json").write_text(json.dumps(record, indent=1, allow_nan=False), "utf-8")
    print(f"wrote {folder / 'truth.json'}")


if __name__ == "__main__":
    main()
