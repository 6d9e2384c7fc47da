"""The predictor f_P: a deep Transformer without a causal mask, and the Gaussian that it puts on a reverse step.

A diagonal Gaussian, the paper's, draws every number of u_s on its own: it cannot move an object, or brighten an image,
as a whole. With R directions S the covariance is sigma (1 + S^T S) sigma, and everything below stays exact and cheap:
it takes the inverse and the determinant of an R x R matrix.

Text and image tokens share one full-attention Transformer, with adaptive norms for (t, s, T), normalised queries and
keys, and rotary positions. "Eq. (3)" is equation (3) of docs/method.md.
"""

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from flow import Layer, TimeEmbedding, full_precision, time_grid, zeroed


@dataclass
class NTMConfig:
    image_size: int | tuple = 8  # side, or (height, width)
    channels: int = 1
    patch_size: int = 2  # the fewer numbers in a token, the more the transporter can do between them
    vocab_size: int = 514
    text_len: int = 8
    width: int = 128  # of the predictor
    depth: int = 4  # 0: no predictor, a standard normal in u-space
    heads: int = 4
    transporter_width: int = 64
    transporter_blocks: int = 3
    transporter_layers: int = 2
    transporter_heads: int = 2
    parametrization: str = "direct"  # or "posterior": the head emits a velocity, to start from flow matching
    rank: int = 0  # directions along which a step's Gaussian is correlated; 0, the paper's: none
    predictor: str = "captions"  # the network below; or "sit": a published one, of classes
    steps: int | tuple = 4  # T; with several, each example of training has one of them
    shift: float | None = None  # e^m of the time grid; None: from the number of tokens
    max_t_min: float = 0.05  # training has t_0 uniform below this
    pairs: bool = False  # train on one random step of a trajectory per example instead of all T
    level_weight: float = 0.0  # p: a step that ends at s counts s^p in the loss; 0, the paper's: all count the same
    first_noise: float = 1.0  # c: how much of x_1 is fresh noise; the rest follows from the next cleaner level
    closed_form: bool = False  # train on the expected loss, which takes a model without a transporter
    velocity_weight: float = 0.0  # of flow matching's loss beside it, which keeps the means as good as flow matching's

    def __post_init__(self):
        size = self.image_size
        height, width = self.image_size = (size, size) if isinstance(size, int) else tuple(size)
        self.steps = tuple(self.steps) if isinstance(self.steps, (tuple, list)) else (self.steps,)
        for name, value in {**vars(self), "steps": min(self.steps)}.items():
            least = 0 if name in ("depth", "transporter_blocks", "rank") else 1
            if type(value) is int and value < least:
                raise ValueError(f"{name} is {value}, but must be at least {least}")
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"image_size {height}x{width} is not divisible by patch_size {self.patch_size}")
        for name, known in {"parametrization": ("direct", "posterior"), "predictor": ("captions", "sit")}.items():
            if (value := getattr(self, name)) not in known:
                raise ValueError(f"{name} {value!r} is unknown: choose {' or '.join(map(repr, known))}")
        if self.closed_form and self.transporter_blocks:
            raise ValueError(f"closed_form is True, which needs transporter_blocks 0, not {self.transporter_blocks}")
        if self.velocity_weight and not self.closed_form:
            raise ValueError(f"velocity_weight is {self.velocity_weight}, which needs closed_form True")
        if not self.depth and (self.rank or self.parametrization == "posterior"):
            raise ValueError(f"depth is 0, but a rank, {self.rank}, or a start from flow matching needs a predictor")
        if self.first_noise < 1 and (self.parametrization != "posterior" or self.transporter_blocks
                                     or not self.pairs or len(self.steps) > 1):
            raise ValueError(f"first_noise is {self.first_noise}, which needs a start from flow matching or an NTM "
                             "that had one, transporter_blocks 0, pairs True and a single number of steps")
        for steps in self.steps:
            try:
                self.time_grid(self.max_t_min, steps)
            except ValueError as error:
                raise ValueError(f"max_t_min: {error}") from error

    @property
    def patches(self):
        """Rows and columns of patches, a token each."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size

    @property
    def num_tokens(self):
        return math.prod(self.patches)

    @property
    def token_dim(self):
        return self.channels * self.patch_size**2

    def examples_at_once(self, steps, gradients=True):
        """How many trajectories of so many steps fit into about 4 GB. A layer makes some 13 numbers of 4 bytes for a
        token and unit of width; gradients, of a score for instance, need those of all layers at a time."""
        depth, layers = (self.depth, self.transporter_blocks * self.transporter_layers) if gradients else (1, 1)
        units = steps * depth * (self.text_len + self.num_tokens) * self.width
        units += (steps + 1) * layers * self.num_tokens * self.transporter_width
        return max(1, 4_000_000_000 // (4 * 13 * units))

    def time_grid(self, t_min, steps=0):
        """Eq. (6): the noise levels (T+1,) of a trajectory that ends at t_min; steps: T, 0 for the first trained with.

        Raises ValueError for a t_min outside [0, t_1), and for 0 in the posterior parametrisation.
        """
        if self.parametrization == "posterior" and t_min == 0:
            raise ValueError("t_min is 0, where the posterior's last step has no variance (C = 0) and so no density: "
                             "choose t_min > 0, such as 0.02")
        return time_grid(steps or self.steps[0], t_min, self.num_tokens, self.shift)


class ImageModel(nn.Module):
    """A network on images as tokens, patches of them."""

    def __init__(self, config):
        super().__init__()
        self.config = config

    @classmethod
    def from_fields(cls, fields):
        """A network by the fields of its NTMConfig, a dict. Raises ValueError for a field there is not."""
        if unknown := fields.keys() - NTMConfig.__dataclass_fields__:
            raise ValueError(f"model_config has {', '.join(sorted(unknown))}")
        return cls(NTMConfig(**fields))

    def patchify(self, images):
        """(B, C, H, W) to tokens (B, N, D), row by row."""
        p = self.config.patch_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)

    def unpatchify(self, tokens):
        """(B, N, D) to images (B, C, H, W)."""
        p, (rows, columns) = self.config.patch_size, self.config.patches
        return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)


def exact(method):
    """The method without autocast, which would round variances and log-determinants to bfloat16."""
    @functools.wraps(method)
    def without_autocast(self, *args):
        with torch.autocast(self.mean.device.type, enabled=False):
            return method(self, *args)
    return without_autocast


class Gaussian(NamedTuple):
    """N(mean, diag(sigma) (1 + S^T S) diag(sigma)) over N tokens of D numbers; leading dimensions are a batch.

    mean, log_std (..., N, D): sigma is exp(log_std). directions: S (..., R, N, D), or None for a diagonal covariance.
    """
    mean: torch.Tensor
    log_std: torch.Tensor
    directions: torch.Tensor | None = None

    def unflatten(self, sizes):
        """The same with its first dimension split in two."""
        return Gaussian(*(part if part is None else part.unflatten(0, sizes) for part in self))

    def factored(self):
        """S as a matrix (..., R, ND), and L^-1 (..., R, R), where L is the Cholesky factor of M = 1 + S S^T."""
        S = self.directions.flatten(-2)
        one = torch.eye(S.shape[-2], dtype=S.dtype, device=S.device)
        L = torch.linalg.cholesky_ex(one + S @ S.mT).L  # cholesky would wait for a GPU, to look for errors
        return S, torch.linalg.solve_triangular(L, one, upper=False)

    @exact
    def nll(self, u, factored=None):
        """Eq. (29): -log N(u) in nats, (...); u like mean. factored: what factored() has returned already."""
        z, log_scale = ((u - self.mean) * torch.exp(-self.log_std)).flatten(-2), self.log_std.sum(dim=(-2, -1))
        squares = z.square()
        if self.directions is not None:
            S, inverse = factored or self.factored()
            w = (inverse.mT @ (inverse @ (S @ z[..., None])))[..., 0]  # the likeliest, given z
            # a sum of squares, where z^T (1 - S^T M^-1 S) z would be the difference of two large numbers
            squares = torch.cat([(z - (w[..., None, :] @ S)[..., 0, :]).square(), w.square()], dim=-1)
            log_scale = log_scale - inverse.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)
        return 0.5 * squares.sum(dim=-1) + log_scale + 0.5 * math.log(2 * math.pi) * z.shape[-1]

    @exact
    def expected_nll(self, mean, std):
        """Eq. (31): the mean of nll(u) over u ~ N(mean, std^2), in nats, (...); mean (..., N, D), std (...)."""
        precision, factored = torch.exp(-2 * self.log_std).flatten(-2), None
        if self.directions is not None:
            S, inverse = factored = self.factored()
            precision = precision * (1 - (inverse @ S).square().sum(dim=-2))
        return self.nll(mean, factored) + 0.5 * std**2 * precision.sum(dim=-1)

    @exact
    def sample(self, z, w=None):
        """Eq. (28): mean + sigma (z + S^T w), for standard normal z (..., N, D) and w (..., R)."""
        if self.directions is not None:
            z = z + torch.einsum("...rnd,...r->...nd", self.directions, w)
        return self.mean + torch.exp(self.log_std) * z

    def guided(self, unconditional, weight):
        """Eq. (20): the Gaussian proportional to p^(1+w) / p_u^w, number by number by their marginal variances.

        Where the caption leaves a number *less* certain (sigma > sigma_u) the ratio is held at 1, which keeps the
        result a density for every w: there the mean is still extrapolated, and the standard deviation stays sigma.
        """
        log_ratio = 2 * (self.marginal_log_std() - unconditional.marginal_log_std()).clamp(max=0)
        d = 1 - weight * torch.expm1(log_ratio)  # 1 + w - w r, without its cancellation for large w
        mean = self.mean + weight * torch.exp(log_ratio) * (self.mean - unconditional.mean) / d
        return Gaussian(mean, self.log_std - 0.5 * torch.log(d), self.directions)

    def marginal_log_std(self):
        """Of each number by itself, (..., N, D)."""
        if self.directions is None:
            return self.log_std
        return self.log_std + 0.5 * torch.log1p(self.directions.square().sum(dim=-3))


def rotations(text_len, rows, columns, pairs):
    """cos and sin of the angle by which each pair of numbers of a query or key is turned, (2, L+N, pairs): words by
    their place in the caption, patches by row and column (rotary positions, arXiv:2104.09864). Pairs take turns to
    measure one of the three, in wavelengths from 6 places to 100 times as many."""
    place = torch.zeros(text_len + rows * columns, 3)
    place[text_len:, :2] = torch.cartesian_prod(torch.arange(rows), torch.arange(columns))
    place[:text_len, 2] = torch.arange(1, text_len + 1)
    pair = torch.arange(pairs)
    angles = place[:, pair % 3] * 100.0 ** (-(pair // 3) / (pairs / 3))
    return torch.stack([angles.cos(), angles.sin()])


def null_caption(text):
    """The caption that says nothing, shaped like text (B, L)."""
    return torch.cat([torch.ones_like(text[:, :1]), torch.zeros_like(text[:, 1:])], dim=1)


class CaptionedTransformer(nn.Module):
    """Full attention over [caption tokens; image tokens], conditioned on times: the trunk of predictor and denoiser."""

    def __init__(self, config, times):
        super().__init__()
        if not config.depth:
            raise ValueError("depth is 0, but must be at least 1: only an NTM's predictor can be left out")
        if config.width % (2 * config.heads):
            raise ValueError(f"width {config.width} is not divisible by twice {config.heads} heads")
        self.embed = nn.Embedding(config.vocab_size, config.width)  # of variance 1: a patch must not drown a word
        self.proj_in = nn.Linear(config.token_dim, config.width)
        self.time = TimeEmbedding(times, config.width)
        self.layers = nn.ModuleList(Layer(config.width, config.heads) for _ in range(config.depth))
        rotation = rotations(config.text_len, *config.patches, config.width // config.heads // 2)
        self.register_buffer("rotation", rotation, persistent=False)

    def forward(self, tokens, text, times):
        """tokens (B, N, D), text (B, L), times (B, count) to hidden states of the image tokens (B, N, width)."""
        c = self.time(times)
        words = self.embed(text)
        h = torch.cat([words, self.proj_in(tokens).to(words.dtype)], dim=1)
        for layer in self.layers:
            h = layer(h, c, rotation=self.rotation)
        h = h[:, text.shape[1]:]
        return F.layer_norm(h, h.shape[-1:])


def gaussian_head(width, zeros, rank, token_dim):
    """A linear layer to `zeros` + R numbers for each number of a token: zero at initialisation, but for the R
    directions, which are small: at zero their gradient would be zero as well."""
    head = zeroed(nn.Linear(width, (zeros + rank) * token_dim))
    nn.init.normal_(head.weight[zeros * token_dim:], std=0.01 / width**0.5)
    return head


class Predictor(nn.Module):
    """f_P of Eq. (10): the network of the Gaussian p(u_s | u_t, y). No mask; a row is one level of one trajectory."""

    def __init__(self, config):
        super().__init__()
        self.trunk = CaptionedTransformer(config, times=3)
        self.head = gaussian_head(config.width, 2, config.rank, config.token_dim)

    def forward(self, u, t, s, steps, text):
        """u (B, N, D), t, s, steps (B,), text (B, L) to 2 + R tensors like u, in full precision."""
        h = self.trunk(u, text, torch.stack([t, s, 1 / steps], dim=1))
        return full_precision(self.head, h).split(u.shape[-1], dim=-1)


class StandardNormal(nn.Module):
    """p(u_s | u_t, y) = N(0, I), whatever u_t and y: all is left to the transporter. With T = 1 and deep blocks this is
    TarFlow (arXiv:2412.06329), and the bound (14) is -log p(x_{t_0}) itself, since x_1 tells nothing of x_{t_0}."""

    def forward(self, u, t, s, steps, text):
        return torch.zeros_like(u), torch.zeros_like(u)
