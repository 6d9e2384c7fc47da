"""(ours) A step's flow over pixels: a pointwise map, then a causal filter, before the Gaussian. Beyond the paper.

Given x_t, a step draws the residual K g(x_s) - K g(mu) from the Gaussian of the predictor:

- g is one monotone map for all numbers of a channel, which knows the values that clean pixels take (PointwiseMap);
- K subtracts from every pixel what the pixels before it in raster order tell: TarFlow's autoregressive block at its
  simplest, linear, over pixels instead of tokens, of log-determinant 0 (CausalFilter).

Both depend on the step's end s and on T alone, and are the identity at initialisation. Unlike an autoregressive
transporter they keep the expected loss in closed form. docs/beyond.md has the mathematics. Images are
(B, channels, H, W).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from correlated import CorrelatedGaussian
from flow import TimeEmbedding, full_precision, zeroed
from model import NTM
from predictor import Gaussian, NTMConfig, without_autocast

# Gauss-Hermite with 3 nodes: E f(m + std z) is the weighted sum of f(m + std node), exact for degree 5
NODES = -math.sqrt(3), 0.0, math.sqrt(3)
NODE_WEIGHTS = 1 / 6, 2 / 3, 1 / 6


# ---------------------------------------------------------------------------------------------------------------
# The pointwise map


class PointwiseMap(nn.Module):
    """g_s(x) = (1 - a) x + a kappa logit F_s(x), Eq. (37): F_s is the distribution function of a mixture of logistics.

    The mixture is that of the values that clean numbers take, c_k of scale tau_k, blurred by the noise of level s. Each
    channel has its own; the share a is of the level, and 0 at first. Flow++'s map (arXiv:1902.00275), unconditioned.
    """

    def __init__(self, channels, logistics, width):
        super().__init__()
        centres = torch.linspace(-1, 1, logistics)
        self.centre = nn.Parameter(centres.repeat(channels, 1))
        self.log_weight = nn.Parameter(torch.zeros(channels, logistics))
        self.log_scale = nn.Parameter(torch.full((channels, logistics), -math.log(logistics)))
        self.log_kappa = nn.Parameter(torch.full((channels, 1, 1), math.log(0.5)))
        self.share = zeroed(nn.Linear(width, channels))

    def at(self, s, condition):
        """The map of the level s (B,), a function of images: its values and the logarithm of its slope."""
        share = full_precision(self.share, condition)
        clamped = share.clamp(0, 0.999)
        share = share + (clamped - share).detach()  # its gradient is not 0 where it is clamped, as at first
        share = share[:, :, None, None]
        s = s[:, None, None]
        signal = 1 - s
        centre = signal * self.centre
        noise = 0.3 * s**2  # a logistic of scale sqrt(0.3) s has variance s^2, almost
        squared_scale = noise + signal**2 * torch.exp(2 * self.log_scale)
        scale = squared_scale.sqrt()[:, :, None, None]
        centre = centre[:, :, None, None]  # beside images with the components last
        log_weight = F.log_softmax(self.log_weight, dim=-1)[:, None, None]

        def pointwise(x):
            z = (x[..., None] - centre) / scale
            below = F.logsigmoid(z)
            above = F.logsigmoid(-z)
            log_F = torch.logsumexp(log_weight + below, dim=-1)
            log_rest = torch.logsumexp(log_weight + above, dim=-1)  # log(1 - F), without its cancellation
            log_densities = log_weight + below + above - scale.log()
            log_density = torch.logsumexp(log_densities, dim=-1)
            logit = log_F - log_rest
            logit_slope = torch.exp(log_density - log_F - log_rest)
            kappa = self.log_kappa.exp()
            y = (1 - share) * x + share * kappa * logit
            slope = 1 - share + share * kappa * logit_slope
            return y, slope.log()

        return pointwise


def invert_pointwise(pointwise, y, halvings=60):
    """x of y = pointwise(x), by bisection, all numbers at once."""
    low, high = y - 1, y + 1
    while (pointwise(low)[0] > y).any():
        low = low - (high - low)
    while (pointwise(high)[0] < y).any():
        high = high + (high - low)
    for _ in range(halvings):
        middle = (low + high) / 2
        too_low = pointwise(middle)[0] < y
        low = torch.where(too_low, middle, low)
        high = torch.where(too_low, high, middle)
    return (low + high) / 2


# ---------------------------------------------------------------------------------------------------------------
# The causal filter


def causal_mask(channels, window):
    """1 where a coefficient (channel out, channel in, row, column) is of a number before.

    Before are the rows above, the pixels to the left, and at the pixel itself the channels before.
    """
    centre = window // 2
    mask = torch.zeros(channels, channels, window, window)
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    mask[:, :, centre, centre] = torch.ones(channels, channels).tril(-1)
    return mask


class CausalFilter(nn.Module):
    """The kernels K of Eq. (38), (B, channels, channels, window, window), for conditionings (B, width).

    1 at the number itself, learned where numbers come before, else 0.
    """

    def __init__(self, channels, window, width):
        super().__init__()
        mask = causal_mask(channels, window)
        self.register_buffer("mask", mask, persistent=False)
        identity = torch.zeros_like(mask)
        identity[:, :, window // 2, window // 2] = torch.eye(channels)
        self.register_buffer("identity", identity, persistent=False)
        self.head = zeroed(nn.Linear(width, mask.numel()))

    def forward(self, condition):
        coefficients = full_precision(self.head, condition)
        return self.identity + self.mask * coefficients.view(-1, *self.mask.shape)


def filtered(images, kernel):
    """K images: images (B, ..., channels, H, W), each example by its own kernel (B, channels, channels, k, k)."""
    batch, channels = kernel.shape[:2]
    size = images.shape[-2:]
    rows = images.reshape(batch, -1, channels, *size).transpose(0, 1)
    out = F.conv2d(
        rows.flatten(1, 2),
        kernel.flatten(0, 1),
        padding=kernel.shape[-1] // 2,
        groups=batch,
    )
    return out.unflatten(1, (batch, channels)).transpose(0, 1).reshape(images.shape)


def filtered_transposed(images, kernel):
    """The same by the transposed matrix."""
    return filtered(images, kernel.transpose(1, 2).flip((3, 4)))


def row_matrix(kernel, width):
    """What K does within one row of `width` pixels, (B, width * channels, width * channels), unit lower triangular."""
    batch, channels = kernel.shape[:2]
    radius = kernel.shape[-1] // 2
    numbers = width * channels
    single = torch.eye(numbers, dtype=kernel.dtype, device=kernel.device)
    rows = single.view(numbers, width, channels).transpose(1, 2)  # each with one number that is not 0
    images = rows[None, :, :, None].expand(batch, -1, -1, -1, -1)
    within = kernel[:, :, :, radius : radius + 1]
    out = F.conv2d(
        images.transpose(0, 1).flatten(1, 2),
        within.flatten(0, 1),
        padding=(0, radius),
        groups=batch,
    )
    out = out.view(numbers, batch, channels, width)
    return out.permute(1, 3, 2, 0).reshape(batch, numbers, numbers)


def unfiltered(images, kernel):
    """x of images = K x, (B, channels, H, W): row after row, the rows above subtracted and a triangle solved."""
    batch, channels, height, width = images.shape
    radius = kernel.shape[-1] // 2
    triangle = row_matrix(kernel, width)
    above = kernel[:, :, :, :radius].flatten(0, 1)
    x = F.pad(torch.zeros_like(images), (radius, radius, radius, 0))
    for row in range(height):
        rows_above = x[:, :, row : row + radius].reshape(1, batch * channels, radius, -1)
        from_above = F.conv2d(rows_above, above, groups=batch).view(batch, channels, width)
        rest = images[:, :, row] - from_above
        rest = rest.transpose(1, 2).reshape(batch, -1, 1)
        solved = torch.linalg.solve_triangular(triangle, rest, upper=False, unitriangular=True)
        solved = solved.view(batch, width, channels)
        x[:, :, row + radius, radius : radius + width] = solved.transpose(1, 2)
    return x[:, :, radius:, radius : radius + width]


# ---------------------------------------------------------------------------------------------------------------
# The distribution of a step


class StepFlow(NamedTuple):
    """p(x_s | x_t) of Eq. (39): K g(x_s) - K g(mean) is Gaussian, with mean zero. It has the methods of a Gaussian.

    mean, log_std (..., N, D) and directions (..., R, N, D) or None are the predictor's; mean is in x-space. kernel: of
    the filter, (M, channels, channels, k, k) for the M steps of the leading dimensions, or None. pointwise: the map of
    M images, or None. model: the ImageModel that makes images of these tokens.
    """

    mean: torch.Tensor
    log_std: torch.Tensor
    directions: torch.Tensor | None
    kernel: torch.Tensor | None
    pointwise: Callable | None
    model: nn.Module

    def unflatten(self, sizes):
        """The same with its first dimension split in two."""
        parts = [self.mean, self.log_std, self.directions]
        parts = [part if part is None else part.unflatten(0, sizes) for part in parts]
        return self._replace(mean=parts[0], log_std=parts[1], directions=parts[2])

    def gaussian(self, mean=None):
        """The Gaussian of the residual K g(x_s) - K g(self.mean), by default of mean zero."""
        mean = torch.zeros_like(self.mean) if mean is None else mean
        if self.directions is None:
            return Gaussian(mean, self.log_std)
        return CorrelatedGaussian(mean, self.log_std, self.directions)

    def images_of(self, x):
        """Tokens (..., N, D) as M images."""
        return self.model.unpatchify(x.reshape(-1, *x.shape[-2:]))

    def tokens_of(self, images):
        """M images as tokens (..., N, D)."""
        return self.model.patchify(images).view(self.mean.shape)

    def mapped(self, images):
        """g of M images, and the logarithm of its slope."""
        if self.pointwise is None:
            return images, torch.zeros_like(images)
        return self.pointwise(images)

    def filtered(self, images):
        """K of M images."""
        return images if self.kernel is None else filtered(images, self.kernel)

    def total(self, images):
        """The sum over each of M images, (...)."""
        return images.flatten(1).sum(dim=1).view(self.mean.shape[:-2])

    @without_autocast
    def nll(self, x):
        """Eq. (39): -log p(x) in nats, (...); x like mean."""
        centre, _ = self.mapped(self.images_of(self.mean))
        y, log_slope = self.mapped(self.images_of(x))
        residual = self.filtered(y - centre)
        return self.gaussian().nll(self.tokens_of(residual)) - self.total(log_slope)

    @without_autocast
    def expected_nll(self, mean, std):
        """Eq. (40): the mean of nll(x) over x ~ N(mean, std^2), in nats, (...); mean (..., N, D), std (...).

        Exact without a pointwise map; with one, its mean, variance and log-slope are by quadrature.
        """
        centre, _ = self.mapped(self.images_of(self.mean))
        known = self.images_of(mean)
        std = std.reshape(-1, 1, 1, 1)
        if self.pointwise is None:
            average, log_slope = known, torch.zeros_like(known)
            variance = (std**2).expand_as(known)
        else:
            average, variance, log_slope = self.moments(known, std)
        gaussian = self.gaussian()
        residual = self.tokens_of(self.filtered(average - centre))
        nll = gaussian.nll(residual) - self.total(log_slope)
        return nll + 0.5 * self.trace(gaussian, variance)

    def moments(self, known, std):
        """Mean and variance of g, and mean logarithm of its slope, for numbers N(known, std^2)."""
        average, square, log_slope = 0.0, 0.0, 0.0
        for node, weight in zip(NODES, NODE_WEIGHTS):
            y, slope = self.pointwise(known + std * node)
            average = average + weight * y
            square = square + weight * y**2
            log_slope = log_slope + weight * slope
        variance = (square - average**2).clamp(min=0)
        return average, variance, log_slope

    def trace(self, gaussian, variance):
        """tr(Sigma^-1 K diag(variance) K^T), (...), for M images of variances; gaussian has the covariance Sigma."""
        spread = variance
        if self.kernel is not None:
            spread = filtered(variance, self.kernel**2)
        precision = torch.exp(-2 * self.log_std)
        diagonal = (precision * self.tokens_of(spread)).sum(dim=(-2, -1))
        if self.directions is None:
            return diagonal
        V, L_inv = gaussian.factors()
        rows = (L_inv @ V).view_as(self.directions)
        rows = rows * torch.exp(-self.log_std).unsqueeze(-3)
        images = self.images_of(rows).unflatten(0, (len(variance), -1))
        if self.kernel is not None:
            images = filtered_transposed(images, self.kernel)
        explained = images.square().sum(dim=1) * variance
        return diagonal - self.total(explained)

    @without_autocast
    def sample(self, z, xi=None):
        """x_s for standard normal z (..., N, D) and, along directions, xi (..., R); None: draws xi."""
        return self.undone(self.gaussian().sample(z, xi))

    def undone(self, residual):
        """x of a residual K g(x) - K g(mean), tokens (..., N, D)."""
        y = self.images_of(residual)
        if self.kernel is not None:
            y = unfiltered(y, self.kernel)
        centre, _ = self.mapped(self.images_of(self.mean))
        y = centre + y
        if self.pointwise is not None:
            y = invert_pointwise(self.pointwise, y)
        return self.tokens_of(y)

    def guided(self, unconditional, guidance):
        """Eq. (20) between two steps of the same map and filter, which depend on s and T alone."""
        centre, _ = self.mapped(self.images_of(self.mean))
        other, _ = self.mapped(self.images_of(unconditional.mean))
        difference = self.tokens_of(self.filtered(other - centre))
        theirs = unconditional.gaussian(difference)
        guided = self.gaussian().guided(theirs, guidance)
        return self._replace(mean=self.undone(guided.mean), log_std=guided.log_std)


@dataclass
class PixelConfig(NTMConfig):
    """An NTMConfig with the flow of a step over pixels."""

    filter_window: int = 0  # side of the causal filter's window, odd; 0: no filter
    logistics: int = 0  # of the pointwise map's mixture; 0: no map

    may_be_zero = NTMConfig.may_be_zero | {"filter_window", "logistics"}

    def __post_init__(self):
        super().__post_init__()
        if self.filter_window and self.filter_window % 2 == 0:
            raise ValueError(f"filter_window is {self.filter_window}, but must be odd, such as 5, or 0 for none")


class PixelNTM(NTM):
    """An NTM whose steps have a flow over pixels.

    With a transporter the flow acts on u_s, whose numbers are no longer pixels: exact, but of less use.
    """

    config_class = PixelConfig
    condition_width = 64  # of the embedding of s and T

    def __init__(self, config):
        super().__init__(config)
        self.pixels = nn.ModuleDict()
        if config.filter_window or config.logistics:
            self.pixels["time"] = TimeEmbedding(2, self.condition_width)
        if config.filter_window:
            self.pixels["filter"] = CausalFilter(config.channels, config.filter_window, self.condition_width)
        if config.logistics:
            self.pixels["pointwise"] = PointwiseMap(config.channels, config.logistics, self.condition_width)

    def predict(self, u, t, s, steps, text):
        """The StepFlow of p(u_s | u_t = u, text), or NTM.predict's Gaussian where config has neither map nor filter."""
        gaussian = super().predict(u, t, s, steps, text)
        if not self.pixels:
            return gaussian
        condition = self.pixels["time"](torch.stack([s, 1 / steps], dim=1))
        kernel, pointwise = None, None
        if "filter" in self.pixels:
            kernel = self.pixels["filter"](condition)
        if "pointwise" in self.pixels:
            pointwise = self.pixels["pointwise"].at(s, condition)
        directions = gaussian.directions if self.config.rank else None
        return StepFlow(gaussian.mean, gaussian.log_std, directions, kernel, pointwise, self)
