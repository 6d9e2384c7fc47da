"""(ours) What we add to the paper's method, explained in docs/beyond.md.

Each piece is a function of a model, or a model of its own. All but `residual` are off unless a setting asks for them:

    rank              correlated steps                    correlated.py
    level_weight      levels in balance                   level_weights
    closed_form       the expected loss                   expected_nll
    velocity_weight   an added flow-matching loss         velocity_error
    best_of           choosing by likelihood              guided_log_density
    restarts          steps repeated from added noise     sample_with_restarts
    temperature       less noise in the last step         cooled
    first_noise       a first step that keeps its noise   CoupledNTM
    filters           a step's flow over pixels           pixels.py
    logistics
    mirrored          a loss with little noise            mirror_image
    filter_leak       samples whose errors fade           pixels.py
    residual          a denoiser as good as its input     ResidualDenoiser
    objective         one deep flow, for comparison       TarFlow

Equations up to (27) are those of docs/method.md, later ones those of docs/beyond.md. x_1 is the level at t = 1.
"""

import itertools
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from flow import forward_chain, forward_trajectory, reverse_posterior
from model import NTM, Denoiser, forward_log_prob, noise_source
from pixels import PixelConfig, PixelNTM
from predictor import Gaussian, NTMConfig, null_caption

# ---------------------------------------------------------------------------------------------------------------
# Losses


def level_weights(config, power, ts, steps, max_t_min):
    """Weights of steps, (B, K-1), Eq. (30): s^p for a step that ends at s, over the grid's mean; ts (B, K), steps (B,).

    power: p. The weights leave each step's optimum where it is. Without weights the gradients of the last step are tens
    of times those of the first, and drown what the first step has to learn: what the image shows.
    """
    middle = max_t_min / 2 or 0.01  # of the range of t_0, or 0.01 if max_t_min is 0
    t_min = ts.new_full((), middle)  # new_tensor would wait for a GPU
    mean = torch.zeros_like(ts[:, 0])
    for T in config.steps:
        ends = config.time_grid(t_min, T)[:-1]
        mean = torch.where(steps == T, (ends**power).mean(), mean)
    s = ts[:, :-1].clamp(min=0 if max_t_min else middle)  # at s = 0 the last step would have no weight
    return s**power / mean[:, None]


def known_step(model, x, x0, ts):
    """Mean (B, K-1, N, D) and standard deviation (B, K-1) of each step's x_s, given x_t and the image, Eq. (3).

    A coupled x_1 depends on x_s, so its target is x_s itself, not its posterior mean.
    """
    t, s = ts[:, 1:], ts[:, :-1]
    A, B, std = reverse_posterior(t, s)
    A, B = A[..., None, None], B[..., None, None]
    mean = A * x[:, 1:] + B * x0[:, None]
    if isinstance(model, CoupledNTM):
        coupled = t == 1
        x_s = x[:, :-1]
        mean = torch.where(coupled[..., None, None], x_s, mean)
        std = torch.where(coupled, 0.0, std)
    return mean, std


def expected_nll(gaussian, mean, std):
    """Eq. (31): the expected -log p of a step without a transporter in nats, (B, K-1); mean and std: known_step's.

    Training on the expectation instead of the sampled loss takes most of the noise out of the gradients of the
    standard deviation and of the directions.
    """
    if not isinstance(gaussian, Gaussian):  # a CorrelatedGaussian
        return gaussian.expected_nll(mean, std)
    precision = torch.exp(-2 * gaussian.log_std)
    return gaussian.nll(mean) + 0.5 * std**2 * precision.sum(dim=(-2, -1))


def mirror_image(x, mean):
    """The mirror image 2 mean - x_s of each step's x_s, like known_step's mean (B, K-1, N, D); levels x (B, K, N, D).

    Given x_t and x_0 both are equally likely, so noise of odd order cancels in the mean of their -log p, Eq. (40).
    """
    return 2 * mean - x[:, :-1]


def velocity_error(gaussian, mean, ts):
    """Eq. (22) at the levels of a trajectory: the mean squared error of the velocity; mean: known_step's, ts (B, K).

    Added to -log p, this error keeps the means of noisy levels as good as flow matching's.
    """
    t, s = ts[:, 1:], ts[:, :-1]
    _, B, _ = reverse_posterior(t, s)
    scale = (B * t)[..., None, None]  # the error of a mean is B t times the error of its velocity
    error = (gaussian.mean - mean) / scale
    return error.square().mean()


# ---------------------------------------------------------------------------------------------------------------
# Ways to sample and to denoise


@torch.no_grad()
def guided_log_density(model, x0, text, ts, guidance, noise):
    """The score (B,) in nats, Eq. (32), by which candidates x0 (B, N, D) for captions text (B, L) are compared.

    The score is the unnormalised log-density of the guided model over the middle steps, a mean of M forward
    trajectories from x0. ts (T+1,), T > 1; noise (M, T+1, N, D), shared by all candidates.
    """
    batch = len(x0)
    T = len(ts) - 1
    steps = torch.full((batch,), T, device=x0.device)
    count = max(3, T)  # of levels
    times = ts[:count].expand(batch, -1)
    middle = times[:, 1:]

    def log_density(u, logdet, caption):
        gaussian = model.predict_all(u, middle, steps, caption)
        nll = gaussian.nll(u[:, :-1]) - logdet[:, :-1]
        return -nll.sum(dim=1)

    total = 0.0
    for noise_of_one in noise[:, :count]:
        shared = noise_of_one.expand(batch, -1, -1, -1)
        if T == 2:  # then x_1 is among the levels, and may be coupled
            x = model.noised(x0, text, times, shared)
        else:
            x = forward_trajectory(x0, times, noise=shared)
        u, logdet = model.transport(x[:, 1:], middle, steps)
        total = total + (1 + guidance) * log_density(u, logdet, text)
        if guidance:
            total = total - guidance * log_density(u, logdet, null_caption(text))
    return total / len(noise)


def cooled(randn, temperature):
    """A randn(*shape) for NTM.sample or sample_with_restarts that multiplies the last step's noise by `temperature`.

    Glow samples in this way (arXiv:1807.03039). Both functions draw z (B, T+1, N, D) and xi (B, T, R) first, and their
    last step takes column 0. Below 1, samples have less grain, and are no longer samples of the model's density.
    """
    draws = itertools.count()

    def randn_cooled(*shape):
        noise = randn(*shape)
        if next(draws) < 2:
            noise[:, 0] *= temperature
        return noise

    return randn_cooled


def restarted_steps(steps):
    """The steps that a restart repeats, each by the number of its cleaner level.

    All steps of the first half, which decide what is drawn, except the very first: that one starts from pure noise.
    """
    return range(steps // 2, steps - 1)


@torch.no_grad()
def sample_with_restarts(model, text, ts, restarts, guidance=0.0, generator=None, randn=None):
    """Sample a trajectory as NTM.sample does, but repeat each of restarted_steps `restarts` times, Eq. (34).

    A restart adds noise back to a level, which redraws the levels above, and repeats the step that led to that level.
    So x_1 ends as independent noise; a CoupledNTM's couple() makes x_1 follow from the image again.
    """
    config = model.config
    T = len(ts) - 1
    randn = randn or noise_source(model, text, generator)
    shape = config.num_tokens, config.token_dim
    z = randn(T + 1, *shape)
    xi = randn(T, config.rank)
    levels = z.clone()  # the noisiest is z's; the others are replaced below

    def take_step(k, z, xi):
        s, t = ts[k], ts[k + 1]
        gaussian = model.step(levels[:, k + 1], t, s, T, text, guidance)
        levels[:, k] = gaussian.sample(z, xi)

    for k in reversed(range(T)):
        take_step(k, z[:, k], xi[:, k])
        if k not in restarted_steps(T):
            continue
        for _ in range(restarts):
            noise = randn(T - k, *shape)
            levels[:, k + 1 :] = add_noise_again(model, levels[:, k], ts[k:], T, noise)
            take_step(k, randn(*shape), randn(config.rank))
    return levels


def add_noise_again(model, u, ts, T, noise):
    """The levels above u (B, N, D) by the forward chain, like noise (B, K-1, N, D); u is at ts[0] of ts (K,)."""
    ts = ts.expand(len(u), -1)
    steps = torch.full((len(u),), T, device=u.device)
    x = model.transporter.inverse(u, ts[:, 0], steps)
    x = forward_chain(x, ts, noise)[:, 1:]
    u, _ = model.transport(x, ts[:, 1:], steps, ends_in_noise=True)
    return u


@dataclass
class DenoiserConfig(NTMConfig):
    residual: float = 0.0  # factor on the network's output, which is added to u_0; 0: the output is x_0, as the paper's


class ResidualDenoiser(Denoiser):
    """A Denoiser that, if residual is above 0, emits what to add to u_0, in units of residual: about u_0's noise.

    At first such a denoiser leaves u_0 as it is. Without a transporter, u_0 is the image plus a little noise.
    """

    config_class = DenoiserConfig

    def forward(self, u0, text):
        """The clean image x0 (B, N, D) for u0 (B, N, D) at t_min; text (B, L)."""
        emitted = super().forward(u0, text)
        return u0 + self.config.residual * emitted if self.config.residual else emitted


# ---------------------------------------------------------------------------------------------------------------
# A first step that keeps its noise


@dataclass
class CoupledConfig(PixelConfig):
    """A PixelConfig with the share of x_1 that is fresh noise."""

    first_noise: float = 0.5  # Eq. (36)'s c; the rest of x_1 follows from the next cleaner level

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.first_noise <= 1:
            raise ValueError(f"first_noise is {self.first_noise}, but must be above 0 and at most 1")
        if self.parametrization != "posterior" or self.transporter_blocks or len(self.steps) > 1:
            raise ValueError(
                f"first_noise is {self.first_noise}, which needs a start from flow matching or an NTM that had one, "
                "transporter_blocks 0 and a single number of steps"
            )


class CoupledNTM(PixelNTM):
    """An NTM whose x_1 mixes fresh noise with the next cleaner level, which the model's own flow carries to noise.

    Pure noise says nothing of the image, so a Gaussian first step from it has to cover all images of a caption. The
    bound (14) allows an x_1 that depends on the image.
    """

    config_class = CoupledConfig

    def posterior(self, t, s):
        """A, B, C of Eq. (4), each (B,); from t = 1 they are for an x_1 that mixes x_s's noise with fresh noise."""
        A, B, C = super().posterior(t, s)
        fresh = self.config.first_noise
        known = math.sqrt(1 - fresh**2)
        A = torch.where(t == 1, known * s, A)
        C = torch.where(t == 1, fresh * s, C)
        return A, B, C

    @torch.no_grad()
    def noised(self, x0, text, ts, noise=None):
        """Noise x0 (B, N, D) to the times ts (B, K), Eqs. (1) and (2), with x_1 coupled, Eq. (36): (B, K, N, D)."""
        x = super().noised(x0, text, ts, noise)
        return self.couple(x, ts, text)

    @torch.no_grad()
    def noised_pairs(self, x0, text, ts, noise=None):
        """Do as noised for the times ts (B, 2) of draw_pairs, but couple only the rows that may start from noise."""
        x = super().noised(x0, text, ts, noise)
        steps = self.config.steps[0]
        at_most = math.ceil(len(ts) / (steps + 1))  # rows at t = 1; counting them would wait for a GPU
        rows = ts[:, -1].topk(at_most).indices
        x[rows] = self.couple(x[rows], ts[rows], text[rows])
        return x

    @torch.no_grad()
    def couple(self, x, ts, text):
        """The levels x (B, K, N, D), with x_1 replaced by one that depends on the next cleaner level, Eq. (36).

        ts (B, K), text (B, L). x: forward trajectories; a level at t = 1 serves as the fresh noise, others stay.
        """
        fresh = self.config.first_noise
        known = math.sqrt(1 - fresh**2)
        *cleaner, x_1 = x.unbind(dim=1)
        flowed = self.flowed_to_noise(cleaner[-1], ts[:, -2], text)
        coupled = known * flowed + fresh * x_1
        is_noise = ts[:, -1, None, None] == 1
        x_1 = torch.where(is_noise, coupled, x_1)
        return torch.stack([*cleaner, x_1], dim=1)

    def flowed_to_noise(self, x, s, text):
        """Carry x_s (B, N, D) to t = 1 by the velocities of the model's own estimates, Eq. (35); s (B,), text (B, L).

        The ODE of these velocities carries the marginals of Eq. (1). It is solved in two steps of the midpoint method.
        """
        h = (1 - s) / 2
        stride = h[:, None, None]

        for t in (s, s + h):
            midpoint = x + stride / 2 * self.velocity(x, t, s, text)
            x = x + stride * self.velocity(midpoint, t + h / 2, s, text)
        return x

    def velocity(self, x, t, s, text):
        """v of Eq. (35), like x (B, N, D), emitted for a step from t to s t, which draw_pairs trains; t, s (B,)."""
        steps = torch.full((len(x),), self.config.steps[0], device=x.device)
        v, *_ = self.predictor(x, t, t * s, steps, text)
        return v


    def trajectory_bound(self, x, ts, text):
        """trajectory_nll (B, T+1) and Eq. (14)'s bound (B,) of a forward trajectory x, whose x_1 is coupled here."""
        coupled = self.couple(x, ts, text)
        nll = self.trajectory_nll(coupled, ts, text)
        dims = x[0, 0].numel()
        # the x_1 of x is eps, the coupled one sqrt(1-c^2) Phi + c eps, and so its log q is log N(eps; 0, I) - ND log c
        log_q = forward_log_prob(x, ts) - dims * math.log(self.config.first_noise)
        return nll, nll.sum(dim=1) + log_q

    def draw_pairs(self, batch, max_t_min=0.05, generator=None, device=None):
        """Draw as NTM.draw_pairs does, but let one example in T + 1 learn a velocity of Eq. (35) instead.

        That example is a step from t to s t: s is the level next to noise, and t = s + (1 - s) j / 4, j from 0 to 3.
        """
        rng = dict(generator=generator, device=device)
        config = self.config
        T = config.steps[0]
        t_min = max_t_min * (1 - torch.rand(batch, **rng))
        grid = F.pad(config.time_grid(t_min, T), (0, 1))  # where a step T would be
        first = torch.randint(T + 1, (1,), **rng)
        k = (first + torch.arange(batch, device=device)) % (T + 1)
        k = k[:, None]
        ts = grid.gather(1, torch.cat([k, k + 1], dim=1))
        s = grid[:, T - 1 : T]
        quarter = torch.randint(4, (batch, 1), **rng) / 4
        t = torch.lerp(s, torch.ones_like(s), quarter)
        velocity_step = torch.cat([s * t, t], dim=1)
        ts = torch.where(k == T, velocity_step, ts)
        return torch.full((batch,), T, device=device), ts

    def score_denoise(self, x, ts, text):
        """NTM.score_denoise; a single step has no score left (denoising_nll), so it gives the estimate (23) of x_0."""
        if x.shape[1] > 2:
            return super().score_denoise(x, ts, text)
        s = ts.expand(x.shape[:2])[:, 0]
        with torch.no_grad():
            return x[:, 0] - s[:, None, None] * self.velocity(x[:, 0], s, s, text)

    def denoising_nll(self, x, ts, text):
        """NTM.denoising_nll without the first step, (B, T-1): its score and that of q(x_1 | x_s) all but cancel."""
        steps = self.step_count(ts)
        return self.transition_nll(x[:, :-1], ts[:, :-1], steps, text)


# ---------------------------------------------------------------------------------------------------------------
# For comparison


class StandardNormal(nn.Module):
    """A predictor that emits N(0, I) whatever u_t and y are, so that all is left to the transporter."""

    def __init__(self, config):
        super().__init__()

    def forward(self, u, t, s, steps, text):
        return torch.zeros_like(u), torch.zeros_like(u)


class TarFlow(NTM):
    """TarFlow (arXiv:2412.06329) as a special case: one step from noise, deep transporter blocks and no predictor.

    The bound (14) is -log p(x_{t_0}) itself, since x_1 says nothing of x_{t_0}.
    """

    predictor_class = StandardNormal

    def __init__(self, config):
        super().__init__(config)
        if config.steps != (1,):
            raise ValueError(f"steps is {config.steps}, but a TarFlow has one: its levels would be independent")
        if not config.transporter_blocks:
            raise ValueError("transporter_blocks is 0, which leaves a TarFlow nothing to train: choose at least 1")
        if config.rank or config.parametrization != "direct":
            raise ValueError(
                f"rank is {config.rank} and parametrization {config.parametrization!r}, "
                "but a TarFlow has no predictor that they could be of: leave them out"
            )
