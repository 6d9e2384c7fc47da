"""The shape of a network (NTMConfig), images as tokens, the Gaussian of a step, and the predictor f_P.

The predictor is a deep Transformer without a causal mask: text and image tokens share full attention, with adaptive
norms for (t, s, T), normalised queries and keys, and rotary positions. One row of a batch is one level of one
trajectory: a step sees no other level. Equation numbers are those of docs/method.md.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from torch import nn

from flow import Layer, TimeEmbedding, full_precision, grid_shift, normalized, time_grid, zeroed

PARAMETRIZATIONS = "direct", "posterior"


@dataclass
class NTMConfig:
    """The shape of a network and of its trajectories; training settings are train.py's."""

    image_size: int | tuple = 8  # side, or (height, width)
    channels: int = 1
    patch_size: int = 2  # the transporter relates tokens, not the numbers within one: keep patches small
    vocab_size: int = 514  # 256 bytes, 256 merges, padding and the null caption
    text_len: int = 8
    width: int = 128  # width, depth, heads: of the predictor, or of the denoiser
    depth: int = 4
    heads: int = 4
    transporter_width: int = 64  # paper: as wide as the predictor, 2 blocks of 4 layers
    transporter_blocks: int = 3  # 0: the plain Gaussian step of a diffusion model
    transporter_layers: int = 2
    transporter_heads: int = 2
    parametrization: str = "direct"  # or "posterior": the head emits a velocity, to start from flow matching
    rank: int = 0  # (ours) directions along which a step's Gaussian is correlated; 0: none, as in the paper
    steps: int | tuple = 4  # T; with several, each example of training has one of them
    shift: float | None = None  # e^m of the time grid; None: from the number of tokens

    # without an annotation this is a constant of the class, not a field
    may_be_zero = frozenset({"transporter_blocks", "rank"})

    def __post_init__(self):
        if isinstance(self.image_size, int):
            self.image_size = self.image_size, self.image_size
        self.image_size = tuple(self.image_size)
        if isinstance(self.steps, int):
            self.steps = (self.steps,)
        self.steps = tuple(self.steps)
        if self.shift is not None and self.shift <= 0:
            raise ValueError(f"shift is {self.shift}, but must be above 0, or None for the formula")
        for name, value in vars(self).items():
            least = 0 if name in self.may_be_zero else 1
            numbers = value if isinstance(value, tuple) else (value,)
            for number in numbers:
                if type(number) is int and number < least:
                    raise ValueError(f"{name} is {number}, but must be at least {least}")
        height, width = self.image_size
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image_size {height}x{width} is not divisible by patch_size {self.patch_size}")
        if self.parametrization not in PARAMETRIZATIONS:
            raise ValueError(f"parametrization {self.parametrization!r} is unknown: choose 'direct' or 'posterior'")

    @property
    def flow_outputs(self):
        """(ours) How many numbers the predictor emits for each purpose, per number of a token: {purpose: count}."""
        return {}  # pixels.PixelConfig has some

    @property
    def patches(self):
        """Rows and columns of patches, a token each."""
        height, width = self.image_size
        return height // self.patch_size, width // self.patch_size

    @property
    def num_tokens(self):
        return math.prod(self.patches)

    @property
    def token_dim(self):
        return self.channels * self.patch_size**2

    @property
    def grid_shift(self):
        """e^m of Eq. (6)."""
        return grid_shift(self.num_tokens) if self.shift is None else self.shift

    def time_grid(self, t_min, steps=0):
        """The noise levels (T+1,) of a trajectory from t_min up to 1, Eq. (6). steps: T; 0: the first of config.steps.

        t_min: a float, or a tensor (B,) for a grid per example, (B, T+1). Raises ValueError for a float outside
        [0, t_1), and for 0.0 in the posterior parametrisation; the values of a tensor are not checked.
        """
        if self.parametrization == "posterior" and not torch.is_tensor(t_min) and t_min == 0:
            raise ValueError(
                "t_min is 0, where the posterior's last step has no variance (C = 0) and so no density: "
                "choose t_min > 0, such as 0.02"
            )
        return time_grid(steps or self.steps[0], t_min, self.num_tokens, self.shift)


class ImageModel(nn.Module):
    """Base class of NTM, FlowMatching and Denoiser: holds the config, and turns images into tokens and back."""

    config_class = NTMConfig

    def __init__(self, config):
        super().__init__()
        self.config = config

    def patchify(self, images):
        """Cut images (B, channels, H, W) into tokens (B, N, D), row by row."""
        p = self.config.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, tokens):
        """Join tokens (B, N, D) to images (B, channels, H, W)."""
        p = self.config.patch_size
        rows, columns = self.config.patches
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)


# ---------------------------------------------------------------------------------------------------------------
# The Gaussian of a step


def without_autocast(method):
    """Wrap a method to run without autocast, because autocast would round variances and log-determinants."""

    @functools.wraps(method)
    def in_full(self, *args):
        with torch.autocast(self.mean.device.type, enabled=False):
            return method(self, *args)

    return in_full


def standard_normal_nll(z):
    """-log N(z; 0, I) in nats, over the tokens and their numbers: (..., N, D) to (...)."""
    nll = 0.5 * z**2 + 0.5 * math.log(2 * math.pi)
    return nll.sum(dim=(-2, -1))


class Gaussian(NamedTuple):
    """N(mean, diag exp(2 log_std)) over N tokens of D numbers, each (..., N, D); leading dimensions are a batch.

    correlated.CorrelatedGaussian (ours) has the same methods.
    """

    mean: torch.Tensor
    log_std: torch.Tensor

    def unflatten(self, sizes):
        """This Gaussian with its first dimension split into `sizes`."""
        return Gaussian(*(part.unflatten(0, sizes) for part in self))

    @without_autocast
    def nll(self, u):
        """-log N(u) in nats, (...), the first three terms of Eq. (11); u like mean."""
        z = (u - self.mean) * torch.exp(-self.log_std)
        return standard_normal_nll(z) + self.log_std.sum(dim=(-2, -1))

    @without_autocast
    def sample(self, z, xi=None):
        """mean + sigma z for standard normal z (..., N, D), Eq. (19).

        xi is unused: only a CorrelatedGaussian has directions.
        """
        return self.mean + torch.exp(self.log_std) * z

    def guided(self, unconditional, guidance):
        """Eq. (20): the Gaussian proportional to p^(1+w) / p_u^w for guidance w."""
        log_ratio = 2 * (self.log_std - unconditional.log_std)
        return sharpened(self, unconditional.mean, log_ratio, guidance)


def sharpened(gaussian, unconditional_mean, log_ratio, guidance):
    """The guided Gaussian of Eq. (20), number by number; log_ratio: log(sigma^2 / sigma_u^2).

    Where the caption makes a number *less* certain (sigma > sigma_u), the ratio is clamped to 1, so that the result is
    a density for every w: the mean is still extrapolated, and the standard deviation stays sigma.
    """
    log_ratio = log_ratio.clamp(max=0)
    d = 1 - guidance * torch.expm1(log_ratio)  # 1 + w - w r, without its cancellation for large w
    difference = gaussian.mean - unconditional_mean
    # ((1 + w) mu - w r mu_u) / d, rearranged
    mean = gaussian.mean + guidance * torch.exp(log_ratio) * difference / d
    return gaussian._replace(mean=mean, log_std=gaussian.log_std - 0.5 * torch.log(d))


# ---------------------------------------------------------------------------------------------------------------
# The network


def rotations(text_len, rows, columns, pairs):
    """cos and sin of the angle by which each pair of numbers of a query or key is turned, (2, L+N, pairs).

    Rotary positions (arXiv:2104.09864). Each pair of channels encodes one of row, column, caption position, in turn,
    in wavelengths from 6 to at most 628 places. Caption positions start at 1: 0 means "is an image token".
    Caption tokens stand at row 0, column 0: attention to them tells an image token its absolute place.
    """
    place = torch.zeros(text_len + rows * columns, 3)
    place[text_len:, :2] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    place[:text_len, 2] = torch.arange(1, text_len + 1)
    pair = torch.arange(pairs)
    frequencies = 100.0 ** (-(pair // 3) / (pairs / 3))
    angles = place[:, pair % 3] * frequencies
    return torch.stack([angles.cos(), angles.sin()])


def null_caption(text):
    """The caption that says nothing, shaped like text (B, L): one null token, then padding."""
    null = torch.zeros_like(text)
    null[:, 0] = 1
    return null


class CaptionedTransformer(nn.Module):
    """Full attention over [caption tokens; image tokens], conditioned on times: the trunk of predictor and denoiser."""

    def __init__(self, config, num_times):
        super().__init__()
        width, heads = config.width, config.heads
        if width % (2 * heads):
            raise ValueError(f"width {width} is not divisible by twice {heads} heads")
        self.embed = nn.Embedding(config.vocab_size, width)  # of variance 1: a patch must not drown a word
        self.proj_in = nn.Linear(config.token_dim, width)
        self.time = TimeEmbedding(num_times, width)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(config.depth))
        rotation = rotations(config.text_len, *config.patches, width // heads // 2)
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, tokens, text, times):
        """tokens (B, N, D), text (B, L), times (B, num_times) to hidden states of the image tokens (B, N, width)."""
        condition = self.time(times)
        words = self.embed(text)
        image = self.proj_in(tokens).to(words.dtype)
        h = torch.cat([words, image], dim=1)
        for layer in self.layers:
            h = layer(h, condition, rotation=self.rotation)
        return normalized(h[:, text.shape[1] :])


def gaussian_head(width, num_zero_outputs, rank, token_dim):
    """A linear layer that emits, for each number of a token, num_zero_outputs outputs and `rank` directions (ours).

    The outputs start at zero: two for a Predictor, rho alone for sit.py. The directions start at about 0.01, because at
    zero they would get no gradient.
    """
    head = zeroed(nn.Linear(width, (num_zero_outputs + rank) * token_dim))
    directions = head.weight[num_zero_outputs * token_dim :]
    nn.init.normal_(directions, std=0.01 / width**0.5)
    return head


def flow_heads(config):
    """(ours) A linear layer for each of config.flow_outputs, zero at first."""
    counts = config.flow_outputs
    return nn.ModuleDict({
        purpose: zeroed(nn.Linear(config.width, counts[purpose] * config.token_dim)) for purpose in counts
    })


def emitted(predictor, h):
    """The outputs of a predictor's heads for hidden states h (B, N, width): a tuple of (B, N, D), in full precision."""
    heads = [predictor.head, *predictor.flow_heads.values()]
    outputs = torch.cat([full_precision(head, h) for head in heads], dim=-1)
    return outputs.split(predictor.token_dim, dim=-1)


class Predictor(nn.Module):
    """f_P of Eq. (10): the network of the Gaussian p(u_s | u_t, y).

    A row is one level of one trajectory. There is no mask: tokens attend to the caption's padding as well.
    """

    def __init__(self, config):
        super().__init__()
        self.trunk = CaptionedTransformer(config, num_times=3)
        self.head = gaussian_head(config.width, 2, config.rank, config.token_dim)
        self.flow_heads = flow_heads(config)  # (ours)
        self.token_dim = config.token_dim

    def forward(self, u, t, s, steps, text):
        """Mean and log_std ("direct") or velocity and rho ("posterior"), then R directions and flow_outputs (ours).

        Each is like u (B, N, D), in full precision. t, s, steps (B,), text (B, L).
        """
        times = torch.stack([t, s, 1 / steps], dim=1)
        h = self.trunk(u, text, times)
        return emitted(self, h)
