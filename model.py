"""Normalizing Trajectory Models: the exact likelihood, few-step sampling, score denoising and the learned denoiser.

Notable about the model:
- a reverse step p(x_s | x_t) is a normalizing flow of two couplings. The spatial coupling is the transporter (flow.py),
  which carries both levels into u-space. The coupling over the trajectory is affine, u_s = mu(u_t) + sigma(u_t) z, and
  the predictor (predictor.py) emits its mu and sigma. The change of variables makes the likelihood exact;
- the T levels of a trajectory are one batch: a step needs its own u_t and nothing else (the chain is Markov), so one
  pass gives every step's Gaussian, with no causal mask and no loop in training;
- what is learned is a density, so it has a score: score_denoise() cleans a sampled trajectory with it, and the
  Denoiser learns to do the same in one pass.

This file is the paper's method. What we add stands in beyond.py, correlated.py and pixels.py; the places where they
meet this file are marked (ours). Text id 0 is padding, 1 the null caption. Images are in [-1, 1]. Equation numbers are
those of docs/method.md.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from correlated import CorrelatedGaussian  # (ours)
from flow import (
    Transporter,
    forward_kernel,
    forward_trajectory,
    full_precision,
    reverse_posterior,
    time_at,
    trajectory_covariance,
    zeroed,
)
from predictor import (
    CaptionedTransformer,
    Gaussian,
    ImageModel,
    NTMConfig,  # noqa: F401: for whoever imports a model and wants both
    Predictor,
    null_caption,
    standard_normal_nll,
)


def forward_log_prob(x, ts):
    """log q(x_{t_1:T} | x_{t_0}) in nats, (B,), Eq. (13), which the bound of Eq. (14) needs.

    x: (B, T+1, N, D). ts: (B, T+1).
    """
    times = ts[:, :, None, None]
    alpha, beta = forward_kernel(times[:, 1:], times[:, :-1])
    cleaner, noisier = x[:, :-1], x[:, 1:]
    z = (noisier - alpha * cleaner) / beta
    log_beta = torch.log(beta).expand_as(z)
    nll = standard_normal_nll(z) + log_beta.sum(dim=(2, 3))
    return -nll.sum(dim=1)


def bits_per_dim(nats, dims):
    """Bits per dimension, Eq. (15), of an image with -log p = nats; 8-bit data, dequantised in bins 2^-7 wide."""
    return nats / dims / math.log(2) + 7


class NTM(ImageModel):
    """p(x_{t_0:T} | text): a trajectory from noise to image, each step a conditional normalizing flow."""

    predictor_class = Predictor  # (ours) sit.py and beyond.TarFlow have another

    def __init__(self, config):
        super().__init__(config)
        self.transporter = Transporter(
            config.num_tokens,
            config.token_dim,
            config.transporter_width,
            config.transporter_blocks,
            config.transporter_layers,
            config.transporter_heads,
        )
        self.predictor = self.predictor_class(config)

    # -----------------------------------------------------------------------------------------------------------
    # Training

    def forward(self, images, text, drawn=None):
        """Eq. (16), the training loss in nats per dimension, a scalar: the mean of -log p(x_s | x_t).

        images (B, channels, H, W), text (B, L). drawn: steps (B,), ts (B, K) and levels x (B, K, N, D), which replace
        the images; K is 2 (draw_pairs) or T+1 (draw_trajectories). None: draw whole trajectories of the images. Where
        settings of ours change the loss, losses.TrainingLoss computes it instead.
        """
        if drawn is None:
            steps, ts = self.draw_trajectories(len(images), device=images.device)
            x = self.noised(self.patchify(images), text, ts)  # text matters to beyond.CoupledNTM alone (ours)
        else:
            steps, ts, x = drawn
        nll = self.transition_nll(x, ts, steps, text, self.is_whole_trajectory(ts))
        return nll.mean() / x[0, 0].numel()

    def draw_trajectories(self, batch, max_t_min=0.05, generator=None, device=None):
        """Draw steps (B,), one T for all, and times ts (B, T+1) of whole trajectories, t_0 uniform up to max_t_min."""
        rng = dict(generator=generator, device=device)
        choices = self.config.steps
        T = choices[0]
        if len(choices) > 1:
            T = choices[torch.randint(len(choices), (1,), **rng).item()]  # .item() waits for the GPU
        t_min = max_t_min * (1 - torch.rand(batch, **rng))  # above 0: the posterior parametrisation needs this
        ts = self.config.time_grid(t_min, T)
        return self.step_count(ts), ts

    def draw_pairs(self, batch, max_t_min=0.05, generator=None, device=None):
        """Draw steps (B,), a T for each example, and ts (B, 2), the times of one step of each trajectory.

        The expected loss is that of whole trajectories. (ours) Consecutive examples take consecutive steps from a
        random first one, so that a batch covers all steps evenly.
        """
        rng = dict(generator=generator, device=device)
        choices = torch.tensor(self.config.steps).to(device, non_blocking=True)
        steps = choices[torch.randint(len(choices), (batch,), **rng)]
        t_min = max_t_min * (1 - torch.rand(batch, **rng))
        first = torch.randint(math.lcm(*self.config.steps), (1,), **rng)  # uniform modulo each T of config.steps
        k = (first + torch.arange(batch, device=device)) % steps
        shift = self.config.grid_shift
        s = torch.where(k == 0, t_min, time_at(k, steps, shift))
        t = time_at(k + 1, steps, shift)
        return steps, torch.stack([s, t], dim=1)

    # -----------------------------------------------------------------------------------------------------------
    # Likelihood

    def transport(self, x, ts, steps, ends_in_noise=False):
        """Carry all levels of x (B, K, N, D) to u-space, Eqs. (7) and (8); ts (B, K), steps (B,).

        Returns u like x, and the log-determinants (B, K). ends_in_noise: the last level has t = 1 in every example;
        f_T is the identity there, so the level needs no pass.
        """
        K = x.shape[1]
        mapped = K - 1 if ends_in_noise else K  # levels
        rows = x[:, :mapped].flatten(0, 1)
        times = ts[:, :mapped].flatten()
        u, logdet = self.transporter(rows, times, steps.repeat_interleave(mapped))
        u = u.unflatten(0, (-1, mapped))
        logdet = logdet.unflatten(0, (-1, mapped))
        if ends_in_noise:
            u = torch.cat([u, x[:, mapped:]], dim=1)
            logdet = F.pad(logdet, (0, 1))
        return u, logdet

    def is_whole_trajectory(self, ts):
        """Whether ts (B, K) are known to end at t = 1 in every example, as those of draw_trajectories do.

        K decides, because reading the values of ts would wait for a GPU. Pairs of a one-step model end at 1 as well.
        """
        return ts.shape[1] > 2 or self.config.steps == (1,)

    def predict(self, u, t, s, steps, text):
        """Eq. (10): the Gaussian p(u_s | u_t = u, text), its tensors (B, N, D); t, s, steps (B,), text (B, L)."""
        return self.gaussian(self.predictor(u, t, s, steps, text), u, t, s)

    def gaussian(self, outputs, u, t, s):
        """The Gaussian of a step from the predictor's outputs, each like u (B, N, D); t, s (B,)."""
        first, second, *directions = outputs
        if self.config.parametrization == "posterior":
            mean, log_std = self.from_velocity(u, t, s, velocity=first, rho=second)
        else:
            mean, log_std = first, second
        if directions:  # (ours) config.rank of them
            return CorrelatedGaussian(mean, log_std, torch.stack(directions, dim=1))
        return Gaussian(mean, log_std)

    def from_velocity(self, u, t, s, velocity, rho):
        """Mean and log standard deviation of the "posterior" parametrisation, Eq. (25), each like u (B, N, D).

        rho = 0 gives sigma = C, as if x_0 were known; rho = 1 gives sqrt(C^2 + B^2), as if x_0 had variance 1. In
        the grid of docs/method.md the two sigmas differ by 5% at the first step and 50-fold at the last. So the head
        emits rho, not log sigma: the range of rho is the same at all steps.
        """
        A, B, C = (a[:, None, None] for a in self.posterior(t, s))
        x0_hat = u - t[:, None, None] * velocity  # Eq. (23)
        mean = A * u + B * x0_hat
        delta = rho * 0.5 * torch.log1p((B / C) ** 2)
        return mean, C.log() + delta

    def predict_all(self, u, ts, steps, text):
        """Eq. (10): every step's Gaussian in one pass, a batch of (B, K-1); u (B, K, N, D), ts (B, K) ascending."""
        pairs = u.shape[1] - 1
        gaussian = self.predict(
            u[:, 1:].flatten(0, 1),
            ts[:, 1:].flatten(),
            ts[:, :-1].flatten(),
            steps.repeat_interleave(pairs),
            text.repeat_interleave(pairs, dim=0),
        )
        return gaussian.unflatten((-1, pairs))

    def transition_nll(self, x, ts, steps, text, ends_in_noise=False):
        """Eq. (11): -log p(x_{t_{k-1}} | x_{t_k}) in nats for all neighbouring levels, (B, K-1), in one pass.

        x (B, K, N, D), ts (B, K) ascending, steps (B,): T, which ts need not cover; text (B, L).
        """
        u, logdet = self.transport(x, ts, steps, ends_in_noise)
        gaussian = self.predict_all(u, ts, steps, text)
        # x_t is only conditioned on, so its log-determinant does not count; gradients flow through u_s and u_t
        return gaussian.nll(u[:, :-1]) - logdet[:, :-1]

    def step_nll(self, x_s, x_t, s, t, steps, text):
        """Eq. (11): exact -log p(x_s | x_t, text) in nats, (B,). x_s, x_t (B, N, D); s < t, steps (B,); text (B, L)."""
        x = torch.stack([x_s, x_t], dim=1)
        ts = torch.stack([s, t], dim=1)
        return self.transition_nll(x, ts, steps, text)[:, 0]

    def trajectory_nll(self, x, ts, text):
        """Eq. (12): exact -log p of each part of a trajectory in nats, (B, T+1); a row's sum is -log p of the whole.

        x (B, T+1, N, D), ts (B, T+1), text (B, L). Column k < T is the step that ends at t_k, column T the prior.
        """
        steps = self.step_count(ts)
        transitions = self.transition_nll(x, ts, steps, text, ends_in_noise=True)
        prior = standard_normal_nll(x[:, -1:])
        return torch.cat([transitions, prior], dim=1)

    def trajectory_bound(self, x, ts, text):
        """trajectory_nll (B, T+1), and from it Eq. (14)'s upper bound on -log p(x_{t_0} | text) in nats, (B,).

        x (B, T+1, N, D): a forward_trajectory. ts (B, T+1), text (B, L).
        """
        nll = self.trajectory_nll(x, ts, text)
        return nll, nll.sum(dim=1) + forward_log_prob(x, ts)

    def step_count(self, ts):
        """T of whole trajectories with times ts (B, T+1), a number for each, (B,)."""
        return torch.full((len(ts),), ts.shape[1] - 1, device=ts.device)

    # -----------------------------------------------------------------------------------------------------------
    # Sampling

    @torch.no_grad()
    def sample(self, text, ts, guidance=0.0, generator=None, randn=None):
        """Sample a trajectory in u-space, Eq. (19), from noise to the cleanest level, all tokens in parallel.

        text (B, L); ts (T+1,); guidance: w >= 0. Returns u (B, T+1, N, D), cleanest level first. u_0 is no image yet:
        invert() carries the levels to x-space and score_denoise() removes their noise, or a Denoiser does both.

        randn(*shape): draws noise (B, *shape); None: with `generator`. (ours) pipeline.py gives each image its own
        generator.
        """
        T = len(ts) - 1
        config = self.config
        randn = randn or noise_source(self, text, generator)
        z = randn(T + 1, config.num_tokens, config.token_dim)
        xi = randn(T, config.rank)  # (ours) noise along a CorrelatedGaussian's directions; empty for rank 0
        u = z[:, T]
        levels = [u]
        for k in reversed(range(T)):
            s, t = ts[k], ts[k + 1]
            gaussian = self.step(u, t, s, T, text, guidance)
            u = gaussian.sample(z[:, k], xi[:, k])
            levels.insert(0, u)
        return torch.stack(levels, dim=1)

    def step(self, u, t, s, T, text, guidance=0.0):
        """The Gaussian of u_s given u_t = u (B, N, D), guided by Eq. (20); t and s: scalar tensors of the grid."""
        batch = len(u)
        steps = torch.full((batch,), T, device=u.device)
        t, s = t.expand(batch), s.expand(batch)
        gaussian = self.predict(u, t, s, steps, text)
        if guidance:
            unconditional = self.predict(u, t, s, steps, null_caption(text))
            gaussian = gaussian.guided(unconditional, guidance)
        return gaussian

    def invert(self, u, ts, method="", tol=1e-5, steps=0):
        """Carry u (B, K, N, D) back to x-space, all levels as one batch; returns x like u.

        ts (K,) or (B, K). steps: T; 0: K-1, as of a whole trajectory. method, tol: Transporter.inverse's. Raises
        ValueError for a single level without steps, and for an unknown method.
        """
        batch, K = u.shape[:2]
        steps = steps or K - 1
        if not steps:
            raise ValueError("one level of a trajectory does not say how many steps there were: give steps")
        steps_each = torch.full((batch * K,), steps, device=u.device)
        times = ts.expand(batch, K).flatten()
        x = self.transporter.inverse(u.flatten(0, 1), times, steps_each, method, tol)
        return x.unflatten(0, (batch, K))

    # -----------------------------------------------------------------------------------------------------------
    # Score denoising

    @torch.enable_grad()
    def score_denoise(self, x, ts, text):
        """Eq. (21): E[x_0 | x_{t_0}, ..., x_{t_T}] under the model, (B, N, D), Tweedie's formula for the trajectory.

        x (B, T+1, N, D), ts (B, T+1) or (T+1,), text (B, L).
        """
        x = x.detach().requires_grad_()
        ts = ts.expand(x.shape[:2])
        nll = self.denoising_nll(x, ts, text)
        (gradient,) = torch.autograd.grad(nll.sum(), x)
        weights = trajectory_covariance(ts)[:, 0, :, None, None]
        noise = (weights * gradient).sum(dim=1)
        return (x[:, 0].detach() - noise) / (1 - ts[:, 0, None, None])

    # -----------------------------------------------------------------------------------------------------------
    # (ours) These methods are the paper's, but stand apart, so that beyond.CoupledNTM can override them. CoupledNTM
    # also overrides trajectory_bound, draw_pairs and score_denoise; pixels.PixelNTM overrides predict

    def posterior(self, t, s):
        """A, B, C of Eq. (4), each (B,)."""
        return reverse_posterior(t, s)

    def noised(self, x0, text, ts, noise=None):
        """Noise x0 (B, N, D) to the times ts (B, K), Eqs. (1) and (2). Returns (B, K, N, D); noise: like that, or None.

        text: unused here; a CoupledNTM's noise depends on it.
        """
        return forward_trajectory(x0, ts, noise=noise)

    def denoising_nll(self, x, ts, text):
        """-log p of all steps, (B, T), whose gradient score_denoise() uses; the prior's would have weight 0 there."""
        steps = self.step_count(ts)
        return self.transition_nll(x, ts, steps, text, ends_in_noise=True)


def noise_source(model, text, generator):
    """A function randn(*shape) that draws standard normal numbers (B, *shape) in the model's precision; text (B, L)."""
    kind = dict(dtype=next(model.parameters()).dtype, device=text.device)

    def randn(*shape):
        return torch.randn(len(text), *shape, generator=generator, **kind)

    return randn


class Denoiser(ImageModel):
    """g_phi: maps the cleanest level in u-space to the clean image, in one pass.

    distill.py trains a Denoiser by Eq. (27) to reproduce score_denoise.
    """

    def __init__(self, config):
        super().__init__(config)
        self.trunk = CaptionedTransformer(config, num_times=1)
        self.head = zeroed(nn.Linear(config.width, config.token_dim))

    def forward(self, u0, text):
        """The clean image x0 (B, N, D) for u0 (B, N, D) at t_min; text (B, L)."""
        no_time = u0.new_zeros(len(u0), 1)  # a denoiser serves one t_min; the paper's is told t
        return full_precision(self.head, self.trunk(u0, text, no_time))
