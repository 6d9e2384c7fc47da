"""(ours) A step's flow over pixels: a pointwise map, then a causal filter, before the Gaussian. Beyond the paper.

Given x_t, K sigma h((x_s - mu) / sigma) is Gaussian with mean zero. mu, sigma, h and K all depend on x_t:

- h (Mixture) is monotone, with a shape of its own at every number: a mixture of logistics, so that a pixel may be
  "white, or else red". It is Flow++'s map (arXiv:1902.00275), conditioned on x_t instead of on earlier numbers;
- K (Filter) adds to every number a weighted sum of the numbers before it in raster order, and each number has its own
  weights. It is a linear form of TarFlow's block, over pixels instead of tokens; its log-determinant is 0.

As mu, sigma, h and K depend on x_t alone, a step's density takes a single pass of the network, and most of the noise
of x_s cancels in training on mirrored pairs (losses.py). docs/beyond.md has the mathematics. Images are
(B, channels, H, W).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from correlated import CorrelatedGaussian
from model import NTM
from plumbing.runtime import exact_products
from predictor import Gaussian, NTMConfig, without_autocast

LOGISTIC = math.sqrt(3) / math.pi  # the scale of a logistic distribution of variance 1


# ---------------------------------------------------------------------------------------------------------------
# The pointwise map


class Mixture(NamedTuple):
    """h(z) = c logit F(z), Eq. (37): F is the distribution function of a mixture of K logistics, c a logistic's scale.

    A single logistic of variance 1 gives h(z) = z. The three tensors are (..., K, N, D), in units of sigma.
    """

    log_weight: torch.Tensor
    centre: torch.Tensor
    log_scale: torch.Tensor

    def map(self, z):
        """h(z) and the logarithm of its slope, each like z (..., N, D)."""
        distance = z.unsqueeze(-3) - self.centre
        standardized = distance * torch.exp(-self.log_scale) / LOGISTIC  # z in units of each logistic
        below = F.logsigmoid(standardized)
        above = below - standardized  # logsigmoid(-standardized)
        log_F = torch.logsumexp(self.log_weight + below, dim=-3)
        log_rest = torch.logsumexp(self.log_weight + above, dim=-3)  # log(1 - F), without its cancellation
        log_density = torch.logsumexp(self.log_weight + below + above - self.log_scale, dim=-3)
        return LOGISTIC * (log_F - log_rest), log_density - log_F - log_rest

    def invert(self, y, rounds=16):
        """Solve y = h(z) for z, all numbers at once: half of the rounds bisect an interval, the others use Newton's.

        A Newton step that would leave the interval is replaced by bisection. Above the median the method inverts 1 - F
        instead of F, because the smaller of the two keeps its digits.
        """
        ends = self.centre + torch.exp(self.log_scale) * y.unsqueeze(-3)  # the solutions for each logistic alone
        low, high = ends.amin(dim=-3), ends.amax(dim=-3)
        side = torch.where(y > 0, -1.0, 1.0)
        wanted = F.logsigmoid(-y.abs() / LOGISTIC)
        weight = torch.exp(self.log_weight)
        slope = side.unsqueeze(-3) * torch.exp(-self.log_scale) / LOGISTIC
        offset = -self.centre * slope
        z = (low + high) / 2
        tiny = torch.finfo(y.dtype).tiny
        for i in range(rounds):
            each = torch.sigmoid(torch.addcmul(offset, z.unsqueeze(-3), slope))
            weighted = weight * each
            found = weighted.sum(dim=-3)
            error = wanted - torch.log(found.clamp(min=tiny))
            too_low = error * side > 0
            low = torch.where(too_low, z, low)
            high = torch.where(too_low, high, z)
            middle = (low + high) / 2
            if i < rounds // 2:
                z = middle
                continue
            density = (weighted * (1 - each) * slope).sum(dim=-3)
            newton = z + error * found / density.abs().clamp(min=tiny) * side
            inside = (newton >= low) & (newton <= high)
            z = torch.where(inside, newton, middle)
        return z


def make_mixture(outputs, log_std, C):
    """The Mixture that 3 K outputs of the network stand for, each (B, N, D): log-weights, centres, log-scales.

    No logistic is narrower than C (B,), the standard deviation of x_s given x_t and x_0; where sigma = exp(log_std),
    (B, N, D), is smaller than C, none is narrower than sigma.
    """
    outputs = torch.stack(outputs, dim=-3)
    log_weight, centre, log_scale = outputs.chunk(3, dim=-3)
    floor = C[:, None, None] ** 2 * torch.exp(-2 * log_std)
    floor = floor.clamp(max=1).unsqueeze(-3)
    square = torch.exp(2 * log_scale.clamp(-5, 5))
    square = floor + (1 - floor) * square
    log_weight = F.log_softmax(log_weight, dim=-3)
    return Mixture(log_weight, centre, 0.5 * square.log())


def start_of_mixture(logistics):
    """3 K biases at which h is almost the identity: one logistic of variance 1, the others at weight e^-4."""
    log_weight = torch.full((logistics,), -4.0)
    log_weight[0] = 0.0
    others = torch.arange(logistics - 1)
    scales = (others // 2 + 1) * (others % 2 * 2.0 - 1)  # -1, 1, -2, 2, ...: two that start alike would stay alike
    log_scale = F.pad(scales, (1, 0))
    return torch.cat([log_weight, torch.zeros(logistics), log_scale])


# ---------------------------------------------------------------------------------------------------------------
# The causal filter


def causal_mask(channels, window):
    """A mask (channel out, channel in, row, column): 1 for the coefficients of earlier numbers, else 0.

    Earlier are the rows above, the pixels to the left, and at the pixel itself the channels before.
    """
    centre = window // 2
    mask = torch.zeros(channels, channels, window, window)
    mask[:, :, :centre] = 1
    mask[:, :, centre, :centre] = 1
    mask[:, :, centre, centre] = torch.ones(channels, channels).tril(-1)
    return mask


class Filter(NamedTuple):
    """K of Eq. (38): every number plus a weighted sum of M convolutions of the numbers before it.

    Each number has its own weights (B, M, channels, H, W); all share the causal kernels (M, channels, channels, k, k).
    """

    weights: torch.Tensor
    kernels: torch.Tensor

    def apply(self, images):
        """K applied to images (B, channels, H, W)."""
        count, channels, _, window, _ = self.kernels.shape
        told = F.conv2d(images, self.kernels.flatten(0, 1), padding=window // 2)
        told = told.unflatten(1, (count, channels))
        return images + (self.weights * told).sum(dim=1)

    def invert(self, images):
        """Solve images = K x for x, row by row: subtract what the rows above contribute, then solve a triangle.

        Rows are written in place, so the solution has no gradient; sampling needs none.
        """
        batch, channels, height, width = images.shape
        count, window = self.kernels.shape[0], self.kernels.shape[-1]
        radius = window // 2
        numbers = width * channels  # of a row, in raster order
        above = self.kernels[:, :, :, :radius].flatten(0, 1)
        left = self.kernels[:, :, :, radius, : radius + 1].flip(-1)
        # beside[k]: the factor by which channel d of the pixel k places to the left enters channel c
        beside = torch.einsum("bmchw,mcdk->kbdchw", self.weights, left)
        x = F.pad(torch.zeros_like(images), (radius, radius, radius, 0))
        for row in range(height):
            told = F.conv2d(x[:, :, row : row + radius], above)
            told = told.view(batch, count, channels, width)
            rest = images[:, :, row] - (self.weights[:, :, :, row] * told).sum(dim=1)
            triangle = images.new_zeros(batch, width, channels, width, channels)  # (pixel, d) enters (pixel, c)
            for back in range(min(radius + 1, width)):
                diagonal = triangle.diagonal(back, dim1=1, dim2=3)  # (B, d, c, width - back)
                diagonal.copy_(beside[back, :, :, :, row, back:])
            solved = torch.linalg.solve_triangular(
                triangle.view(batch, numbers, numbers).mT,  # with ones on its diagonal, which are not stored
                rest.mT.reshape(batch, numbers, 1),
                upper=False,
                unitriangular=True,
            )
            x[:, :, row + radius, radius : radius + width] = solved.view(batch, width, channels).mT
        return x[:, :, radius:, radius : radius + width]


# ---------------------------------------------------------------------------------------------------------------
# The distribution of a step


class StepFlow(NamedTuple):
    """p(x_s | x_t) of Eq. (39): K sigma h((x_s - mean) / sigma) is Gaussian with mean zero.

    A StepFlow has a Gaussian's methods. mean, log_std (..., N, D) and directions (..., R, N, D) or None are as in a
    Gaussian, but if the mixture leans to one side, mean and sigma are only location and scale. mixture: h, or None.
    weights (..., M, N, D): of the filter K, or None. model: the PixelNTM, which holds the filter's kernels.
    """

    mean: torch.Tensor
    log_std: torch.Tensor
    directions: torch.Tensor | None
    mixture: Mixture | None
    weights: torch.Tensor | None
    model: nn.Module

    def unflatten(self, sizes):
        """This distribution with its first dimension split into `sizes`."""

        def split(part):
            return None if part is None else part.unflatten(0, sizes)

        return StepFlow(
            split(self.mean),
            split(self.log_std),
            split(self.directions),
            self.mixture and Mixture(*map(split, self.mixture)),
            split(self.weights),
            self.model,
        )

    def gaussian(self, mean):
        """The Gaussian with this mean, and with the step's sigma and directions."""
        if self.directions is None:
            return Gaussian(mean, self.log_std)
        return CorrelatedGaussian(mean, self.log_std, self.directions)

    def filtered(self, tokens, inverse=False):
        """K applied to tokens (..., N, D), or the inverse of K, with the share filter_leak of its sums left out."""
        if self.weights is None:
            return tokens
        count, *token = self.weights.shape[-3:]
        images = self.model.unpatchify(tokens.reshape(-1, *token))
        weights = self.model.unpatchify(self.weights.reshape(-1, *token))
        kernels = self.model.kernels()
        if inverse:
            kernels = (1 - self.model.config.filter_leak) * kernels
        K = Filter(weights.unflatten(0, (-1, count)), kernels)
        images = K.invert(images) if inverse else K.apply(images)
        return self.model.patchify(images).view(tokens.shape)

    @without_autocast
    def nll(self, x):
        """Eq. (39): -log p(x) in nats, (...); x like mean."""
        residual, log_slope = x - self.mean, None
        if self.mixture:
            z, log_slope = self.mixture.map(residual * torch.exp(-self.log_std))
            residual = z * torch.exp(self.log_std)
        drawn = self.filtered(residual)
        nll = self.gaussian(torch.zeros_like(drawn)).nll(drawn)
        if log_slope is None:
            return nll
        return nll - log_slope.sum(dim=(-2, -1))

    @without_autocast
    def sample(self, z, xi=None):
        """x_s for standard normal z (..., N, D) and, along directions, xi (..., R); None: draws xi."""
        drawn = self.gaussian(torch.zeros_like(self.mean)).sample(z, xi)
        with exact_products(drawn.device):  # errors of an inverse add up along the image
            residual = self.filtered(drawn, inverse=True)
        if self.mixture:
            z = self.mixture.invert(residual * torch.exp(-self.log_std))
            residual = z * torch.exp(self.log_std)
        return self.mean + residual

    def guided(self, unconditional, guidance):
        """Guide mean and standard deviation by Eq. (20), as without a flow; map and filter stay the caption's."""
        gaussian, other = self.gaussian(self.mean), unconditional.gaussian(unconditional.mean)
        guided = gaussian.guided(other, guidance)
        return self._replace(mean=guided.mean, log_std=guided.log_std)


@dataclass
class PixelConfig(NTMConfig):
    """An NTMConfig with the flow of a step over pixels."""

    filters: int = 0  # kernels of the causal filter, M; 0: no filter
    filter_window: int = 5  # side of their window, odd
    filter_leak: float = 0.0  # share of the filter's sums that sampling leaves out; 0: sampling is exact
    logistics: int = 0  # logistics in the pointwise map's mixture, K; 0: no map

    may_be_zero = NTMConfig.may_be_zero | {"filters", "logistics"}

    def __post_init__(self):
        super().__post_init__()
        if self.filter_window % 2 == 0 or self.filter_window < 3:
            raise ValueError(f"filter_window is {self.filter_window}, but must be odd and at least 3, such as 5")
        if not 0 <= self.filter_leak <= 1:
            raise ValueError(f"filter_leak is {self.filter_leak}, but must be from 0 to 1, such as 0.06")

    @property
    def flow_outputs(self):
        outputs = {"mixture": 3 * self.logistics, "filter": self.filters}
        return {purpose: count for purpose, count in outputs.items() if count}


class PixelNTM(NTM):
    """An NTM whose steps have a flow over pixels.

    With a transporter the flow acts on u_s. The density is still exact, but the flow is of less use: the numbers of u_s
    are no pixels, and their noise does not have standard deviation C.
    """

    config_class = PixelConfig

    def __init__(self, config):
        super().__init__(config)
        if config.filters:
            mask = causal_mask(config.channels, config.filter_window)
            self.register_buffer("causal", mask, persistent=False)
            # not zero: weights start at zero, and with zero kernels neither would ever get a gradient
            kernels = torch.randn(config.filters, *mask.shape)
            self.filter_kernels = nn.Parameter(0.05 * kernels)
        if config.logistics:
            start = start_of_mixture(config.logistics)
            head = self.predictor.flow_heads["mixture"]
            head.bias.data.copy_(start.repeat_interleave(config.token_dim))

    def kernels(self):
        """The filter's kernels (M, channels, channels, k, k)."""
        return self.filter_kernels * self.causal

    def predict(self, u, t, s, steps, text):
        """The StepFlow of p(u_s | u_t = u, text), or NTM.predict's Gaussian where config has neither map nor filter."""
        config = self.config
        outputs = self.predictor(u, t, s, steps, text)
        of_gaussian = len(outputs) - sum(config.flow_outputs.values())
        gaussian = self.gaussian(outputs[:of_gaussian], u, t, s)
        if not config.flow_outputs:
            return gaussian
        of_filter = len(outputs) - config.filters
        mixture, weights = None, None
        if config.logistics:
            _, _, C = self.posterior(t, s)
            mixture = make_mixture(outputs[of_gaussian:of_filter], gaussian.log_std, C)
        if config.filters:
            weights = torch.stack(outputs[of_filter:], dim=1)
        directions = gaussian.directions if config.rank else None
        return StepFlow(gaussian.mean, gaussian.log_std, directions, mixture, weights, self)
