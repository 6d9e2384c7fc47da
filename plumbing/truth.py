"""The true density of noisy images of the "shapes" data set: it makes the distance of a model from the truth a number.

A scene is a function of uniform numbers, its draws, of which the caption determines a few. So the density of an image
at noise level t is an integral over the others,

    q(x_t | caption) = E N(x_t; (1-t) x_0, t^2 I),

and that of a reverse step follows: q(x_s | x_t, caption) = q(x_t | x_s) q(x_s | caption) / q(x_t | caption). Near the
data few scenes explain x_t. Sequential Monte Carlo (Del Moral, Doucet & Jasra 2006) finds them by degrees: from scenes
as they are drawn the power of the likelihood rises from 0 to 1, and at every stage the likelier ones are copied, then
moved. The estimate of the integral is unbiased, and knows nothing of the scene that x_t was made from.
"""

import math

import numpy as np
import torch
from torch.distributions import MultivariateNormal, Normal

from plumbing.shapes import DRAWS, compose, render

OF_THE_CAPTION, RELATION, KIND_OF_RELATIONS = [0, 2, 3, 4], 1, 0.75  # draws: kind, count, objects; relation
CROWD = 10  # times as many scenes at first, so that every arrangement that explains x_t is among them


def some_scenes(draws, z):
    """P scenes with the caption of `draws` (DRAWS,); normal z (P, DRAWS) decides what the caption leaves open."""
    u = torch.special.ndtr(torch.from_numpy(z)).numpy().clip(max=1 - 1e-12)
    fixed = OF_THE_CAPTION + ([RELATION] if draws[0] >= KIND_OF_RELATIONS else [])
    u[:, fixed] = draws[fixed]
    return compose(u)


def moments_of_noise(t):
    """The scale of x_0 in x_t, and the variance around it; dequantisation, far narrower than t, adds little."""
    return 1 - t, t**2 + (1 - t) ** 2 / (12 * 128**2)


def pixels(scene, image_size):
    """(P, 3 size^2) float32: the centres of the bins that dequantisation fills."""
    return (render(scene, image_size).reshape(len(scene.kind), -1) + np.float32(0.5)) / 128 - 1


def posterior(x, t, draws, rng, particles=1000, moves=5):
    """Of a noisy image x (3, size, size) float32, log q(x_t | caption) in nats and scenes of q(x_0 | x_t, caption):
    images (P, 3 size^2) and weights (P,), which sum to 1. draws: of any scene of that caption."""
    scale, variance = moments_of_noise(t)

    def log_likelihood(z):
        squares = np.square(x.reshape(-1) - np.float32(scale) * pixels(some_scenes(draws, z), x.shape[-1])).sum(axis=1)
        return -0.5 * squares.astype(np.float64) / variance - 0.5 * x.size * math.log(2 * math.pi * variance)

    z = rng.standard_normal((CROWD * particles, DRAWS))
    fit, power, log_q, enough = log_likelihood(z), 0.0, 0.0, particles
    while True:
        rise = next_rise(fit, 1 - power, enough)
        weights = np.exp(rise * (fit - fit.max()))
        log_q, power = log_q + rise * fit.max() + math.log(weights.mean()), power + rise
        if power >= 1:
            scenes = torch.from_numpy(pixels(some_scenes(draws, z), x.shape[-1])).double()
            return log_q, scenes, torch.from_numpy(weights / weights.sum())
        shares = np.cumsum(weights) / weights.sum()
        chosen = np.searchsorted(shares, (np.arange(particles) + rng.random()) / particles).clip(max=len(z) - 1)
        z, fit, enough = z[chosen], fit[chosen], particles / 2
        for _ in range(moves):
            # Metropolis steps that leave the normal distribution as it is, of some draws and of any size
            moved = rng.random(z.shape) < rng.choice([0.15, 0.4, 1.0], (particles, 1))
            size = 10 ** rng.uniform(-2, 0, (particles, 1)) * moved
            proposed = np.sqrt(1 - size**2) * z + size * rng.standard_normal(z.shape)
            proposed_fit = log_likelihood(proposed)
            accepted = np.log(rng.random(particles)) < power * (proposed_fit - fit)
            z[accepted], fit[accepted] = proposed[accepted], proposed_fit[accepted]


def next_rise(fit, most, enough):
    """The greatest rise of the power, up to `most`, whose weights exp(rise * fit) leave so many effective samples."""
    def suffices(rise):
        weights = np.exp(rise * (fit - fit.max()))
        return weights.sum() ** 2 / np.square(weights).sum() >= enough

    if suffices(most):
        return most
    low, high = 0.0, most
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if suffices(middle) else (low, middle)
    return low


def log_gaussians(x_s, x_t, A, B, C, scenes, weights):
    """log-density in nats of x_s, shaped like x_t, under the two Gaussians nearest to p(x_s | x_t, caption), a mixture
    of N(A x_t + B x_0, C^2 I) over posterior's scenes x_0: with independent numbers, and with the full covariance."""
    x_s, x_t = x_s.flatten().double(), x_t.flatten().double()
    scenes = A * x_t + B * scenes
    mean = weights @ scenes
    covariance = (scenes - mean).T @ ((scenes - mean) * weights[:, None]) + C**2 * torch.eye(len(x_s))
    independent = Normal(mean, covariance.diagonal().sqrt()).log_prob(x_s).sum()
    return independent.item(), MultivariateNormal(mean, covariance).log_prob(x_s).item()
