"""The parts of a Normalizing Trajectory Model that see no caption.

A step of a Normalizing Trajectory Model composes two couplings:

- an affine coupling over the trajectory: u_s = mu(u_t) + sigma(u_t) z turns noise z into the cleaner level, given the
  noisier one (model.py);
- a spatial coupling, the transporter: an autoregressive map that shifts token n of a level by b and scales it by e^-l,
  where b and l depend on the tokens before n.

            x_s                x_t           x-space, where the forward trajectory lives
             |                  |
         f_T | spatial      f_T | spatial    u_n = (x_n - b(x_<n)) exp(-l(x_<n)), token by token
             v                  v
            u_s <------------- u_t           u-space: u_s = mu(u_t) + sigma(u_t) z, all tokens at once

Read from top to bottom: the time grid; the forward trajectory q, its posterior and covariance, all without parameters;
a Transformer layer, of which all networks here but sit.py's are built; the transporter f_T.

Time runs from 0 (data) to 1 (noise); a step goes from t (noisier) to s < t (cleaner); tokens are (B, N, D).
Equation numbers are those of docs/method.md, which also cites the papers. steps (B,) is T of each example.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---------------------------------------------------------------------------------------------------------------
# The time grid and the forward trajectory


def grid_shift(num_tokens):
    """e^m of Eq. (6): an image of more tokens is still recognisable at higher noise, so its levels move towards 1."""
    m = 0.5 + 0.65 * (num_tokens - 256) / (4096 - 256)
    return math.exp(m)


def time_at(k, steps, shift):
    """t_k of the time grid for k >= 1, Eq. (6); t_0 is t_min, not the 0 of k = 0. k and steps: numbers or tensors."""
    # numerator and denominator of Eq. (6) are multiplied by k, so that t_T is exactly 1
    return shift * k / (shift * k + (steps - k))


def time_grid(steps, t_min, num_tokens, shift=None):
    """Noise levels t_0 = t_min < t_1 < ... < t_T = 1, Eq. (6).

    steps: T. t_min: float, or (B,) for a grid per example. shift: e^m; None: grid_shift(num_tokens).
    Returns (T+1,) or (B, T+1), ascending. Raises ValueError for a float t_min outside [0, t_1).
    """
    if shift is None:
        shift = grid_shift(num_tokens)
    if not torch.is_tensor(t_min):  # a tensor's values are not checked: that would synchronise with the GPU
        first = time_at(1, steps, shift)
        if not 0 <= t_min < first:
            raise ValueError(
                f"t_min is {t_min}, but the grid of {steps} steps starts at {first:.4f}: "
                f"choose 0 <= t_min < {first:.4f}, fewer steps or a larger shift"
            )
        t_min = torch.tensor(float(t_min))
    k = torch.arange(1, steps + 1, dtype=t_min.dtype, device=t_min.device)
    later = time_at(k, steps, shift).expand(*t_min.shape, steps)
    return torch.cat([t_min[..., None], later], dim=-1)


def forward_kernel(t, s):
    """alpha, beta of q(x_t | x_s) = N(alpha x_s, beta^2 I), s < t, Eq. (2); each shaped like t."""
    alpha = (1 - t) / (1 - s)
    squared = (t - s) * (t + s - 2 * t * s)  # beta^2 (1 - s)^2, factored: no digits are lost when s and t are close
    beta = squared.sqrt() / (1 - s)
    return alpha, beta


def forward_chain(x, ts, noise):
    """Continue a trajectory from one level on, by the Markov chain of Eq. (2).

    x (B, N, D) at ts[:, 0]; ts (B, K), ascending; noise (B, K-1, N, D), standard normal. Returns (B, K, N, D).
    """
    levels = [x]
    times = ts[:, :, None, None]
    for k in range(1, ts.shape[1]):
        alpha, beta = forward_kernel(times[:, k], times[:, k - 1])
        levels.append(alpha * levels[-1] + beta * noise[:, k - 1])
    return torch.stack(levels, dim=1)


def forward_trajectory(x0, ts, generator=None, noise=None):
    """Draw a trajectory: its cleanest level from Eq. (1), then level by level from the Markov chain of Eq. (2).

    x0: (B, N, D). ts: (B, K), ascending, any consecutive part of a grid (K = T+1 for the whole, 2 for one step).
    noise: (B, K, N, D) standard normal, drawn with `generator` when None. Returns (B, K, N, D).
    """
    if noise is None:
        shape = *ts.shape, *x0.shape[1:]
        noise = torch.randn(shape, generator=generator, dtype=x0.dtype, device=x0.device)
    t0 = ts[:, 0, None, None]
    cleanest = (1 - t0) * x0 + t0 * noise[:, 0]
    return forward_chain(cleanest, ts, noise[:, 1:])


def reverse_posterior(t, s):
    """A, B, C of q(x_s | x_t, x_0) = N(A x_t + B x_0, C^2 I), s < t, Eqs. (3) and (4); each shaped like t."""
    alpha, beta = forward_kernel(t, s)
    A = alpha * s**2 / t**2
    B = beta**2 * (1 - s) / t**2
    C = beta * s / t
    return A, B, C


def trajectory_covariance(ts):
    """Covariance S of a trajectory's noise between levels, given x_0, Eq. (5); ts (..., T+1) to (..., T+1, T+1)."""
    rows, columns = ts[..., :, None], ts[..., None, :]
    low = torch.minimum(rows, columns)
    high = torch.maximum(rows, columns)
    ratio = (1 - high) / (1 - low)
    return low**2 * torch.where(low < 1, ratio, 1.0)  # at t_T the ratio is 0/0, and its limit 1


# ---------------------------------------------------------------------------------------------------------------
# The building block


def zeroed(linear):
    """The linear layer with weight and bias set to zero, so that its output is zero at initialisation."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def full_precision(linear, h):
    """linear(h) in the layer's own precision, even under autocast: for means, log-scales and directions."""
    with torch.autocast(h.device.type, enabled=False):
        return linear(h.to(linear.weight.dtype))


def normalized(h):
    """Layer norm without parameters; adaLN may add scale and shift."""
    return F.layer_norm(h, h.shape[-1:])


class TimeEmbedding(nn.Module):
    """Embeds times (B, count), in [0, 1], as one conditioning vector (B, width): sinusoids, then a two-layer MLP.

    The number of steps T enters as the time 1/T, the length of a step if all were equal.
    """

    def __init__(self, count, width, frequencies=32):
        super().__init__()
        # up to 1000 radians per unit of time: near the data, times that differ by 0.001 matter
        self.register_buffer("frequencies", torch.logspace(0, 3, frequencies), persistent=False)
        self.mlp = nn.Sequential(
            nn.Linear(count * 2 * frequencies, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )

    def forward(self, times):
        angles = times[..., None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
        dtype = self.mlp[0].weight.dtype
        return self.mlp(waves.to(dtype))


def rotated(x, rotation):
    """Turn each pair of numbers i and i + d/2 of x (B, heads, N, d) by its angle; rotation (2, N, d/2): cos and sin."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rotation
    turned = a * cos - b * sin, a * sin + b * cos
    return torch.cat(turned, dim=-1)


def attend(q, k, v, causal=False):
    """softmax(q k^T / sqrt(d)) v of each head; q (B, heads, M, d), k and v (B, heads, N, d).

    causal: no token attends to a later one; needs M = N. A single query stands for the last token, which may see all.
    """
    causal = causal and q.shape[-2] > 1
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    # on a CPU in bfloat16 torch's fused kernel takes seven times as long in the backward pass as the formula
    logits = (q * q.shape[-1] ** -0.5) @ k.mT
    if causal:
        mask = torch.full_like(logits[0, 0], -math.inf)
        logits = logits + mask.triu(1)
    return torch.softmax(logits, dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys; causal, or over all tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, causal=False, cache=None, position=0, rotation=None):
        """Attend among the tokens x (B, N, width); returns the same shape.

        cache: keys and values (2, B, heads, N, width/heads). With a cache, x is the one token at `position`, which
        writes its key and value into the cache and attends to itself and the tokens before. rotation: as in rotated();
        attention then depends on relative positions only.
        """
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q = normalized(q)  # bounds the logits
        k = normalized(k)
        if rotation is not None:
            q = rotated(q, rotation)
            k = rotated(k, rotation)
        q = q.to(v.dtype)  # autocast runs layer norms in float32
        k = k.to(v.dtype)
        if cache is not None:
            cache[0, :, :, position] = k[:, :, 0]
            cache[1, :, :, position] = v[:, :, 0]
            k, v = cache[:, :, :, : position + 1]
        h = attend(q, k, v, causal)
        return self.out(rearrange(h, "b h n d -> b n (h d)"))


class Layer(nn.Module):
    """A pre-norm Transformer layer, modulated by a conditioning vector (adaLN-Zero: gates start at 0)."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * width, width),
        )
        self.modulation = nn.Sequential(
            nn.SiLU(),
            zeroed(nn.Linear(width, 6 * width)),
        )

    def forward(self, x, condition, causal=False, rotation=None):
        """x: (B, N, width); condition: (B, width). Returns (B, N, width)."""
        modulation = self.modulation(condition)
        return self.modulated(x, modulation, causal, rotation=rotation)

    def modulated(self, x, modulation, causal=False, cache=None, position=0, rotation=None):
        """Like forward, with modulation = self.modulation(condition), (B, 6 width), which all tokens share."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)
        h = normalized(x) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, causal, cache, position, rotation)
        h = normalized(x) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


# ---------------------------------------------------------------------------------------------------------------
# The transporter: the coupling over the tokens of one level


class FlowBlock(nn.Module):
    """One autoregressive affine map, u_n = (x_n - b_n) exp(-l_n), Eq. (7), scanning forwards or backwards.

    b_n (`offset`) and l_n (`log_scale`) depend on the tokens before n in the scan, on t and on T.
    """

    log_scale_bound = 4.0  # |l| < 4: a block scales a number by e^4 at most, so that no exp overflows

    def __init__(self, num_tokens, token_dim, width, layers, heads, backwards):
        super().__init__()
        self.backwards = backwards
        self.proj_in = nn.Linear(token_dim, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))  # by place in the scan
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = zeroed(nn.Linear(width, 2 * token_dim))  # the map starts as the identity

    def affine(self, x, condition):
        """b_n and l_n of all tokens x (B, N, D) in the order of the scan, each (B, N, D)."""
        # the input is moved by one place, so that b_n and l_n do not see token n: place n holds token n-1
        start = self.first_place(condition)
        known = self.proj_in(x[:, :-1]).to(start.dtype)
        h = torch.cat([start, known], dim=1) + self.position
        for layer in self.layers:
            h = layer(h, condition, causal=True)
        return self.offset_and_log_scale(h)

    def first_place(self, condition):
        """The input at place 0, before all tokens: a learned vector plus the conditioning, (B, 1, width)."""
        return (self.start + condition)[:, None]

    def offset_and_log_scale(self, h):
        """b_n and l_n of Eq. (7) from the last hidden states (B, N, width)."""
        numbers = full_precision(self.head, normalized(h))
        offset, log_scale = numbers.chunk(2, dim=-1)
        bound = self.log_scale_bound
        return offset, bound * torch.tanh(log_scale / bound)

    def forward(self, x, condition):
        """Map x (B, N, D) to u, all tokens in parallel. Returns u like x and log|det du/dx| (B,), Eq. (8)."""
        x = self.scan(x)
        offset, log_scale = self.affine(x, condition)
        u = (x - offset) * torch.exp(-log_scale)
        return self.scan(u), -log_scale.sum(dim=(1, 2))

    def inverse_cached(self, u, condition):
        """Map u (B, N, D) back to x, Eq. (7), token by token, with a cache of the known tokens' keys and values."""
        u = self.scan(u)
        x = torch.empty_like(u)
        batch, num_tokens, _ = u.shape
        heads = self.layers[0].attention.heads
        head_dim = len(self.start) // heads
        cache = u.new_empty(len(self.layers), 2, batch, heads, num_tokens, head_dim)
        modulations = [layer.modulation(condition) for layer in self.layers]
        h = self.first_place(condition)
        for n in range(num_tokens):
            h = h + self.position[n]
            for layer, modulation, layer_cache in zip(self.layers, modulations, cache):
                h = layer.modulated(h, modulation, cache=layer_cache, position=n)
            offset, log_scale = self.offset_and_log_scale(h)
            token = u[:, n, None] * torch.exp(log_scale) + offset
            x[:, n, None] = token
            h = self.proj_in(token)
        return self.scan(x)

    def inverse_jacobi(self, u, condition, tol):
        """Map u back to x by fixed-point sweeps over all tokens, Eq. (9), until the largest change is below tol.

        Each sweep makes at least one more token exact, so N sweeps suffice. self.sweeps becomes the number of sweeps.
        """
        u = self.scan(u)
        x = u
        for sweep in range(1, u.shape[1] + 1):
            previous = x
            offset, log_scale = self.affine(x, condition)
            x = u * torch.exp(log_scale) + offset
            if (x - previous).abs().max() < tol:
                break
        self.sweeps = sweep
        return self.scan(x)

    def scan(self, x):
        """Put tokens into the order of the scan; a second call puts them back."""
        return x.flip(1) if self.backwards else x


class Transporter(nn.Module):
    """f_T(x_t, t): `blocks` autoregressive maps in alternating scan order, conditioned on t and T, Eqs. (7) to (9).

    It is the identity at initialisation, and always at t = 1, since pure noise needs no map. With 0 blocks it is always
    the identity, and the model's reverse step is the plain Gaussian of a diffusion model.
    """

    def __init__(self, num_tokens, token_dim, width, blocks, layers, heads):
        super().__init__()
        self.time = TimeEmbedding(2, width) if blocks else None
        self.blocks = nn.ModuleList(
            FlowBlock(num_tokens, token_dim, width, layers, heads, backwards=i % 2 == 1)
            for i in range(blocks)
        )
        self.sweeps = []  # how many each block took in the last inversion, first block first; empty after "cache"

    def forward(self, x, t, steps):
        """Map x (B, N, D) at t (B,) to u. Returns u like x and log|det du/dx| (B,), Eq. (8); steps (B,)."""
        u = x
        logdet = x.new_zeros(len(x))
        condition = self.condition(t, steps)
        for block in self.blocks:
            u, block_logdet = block(u, condition)
            logdet = logdet + block_logdet
        u = torch.where(t[:, None, None] < 1, u, x)
        logdet = torch.where(t < 1, logdet, 0.0)
        return u, logdet

    @torch.no_grad()
    def inverse(self, u, t, steps, method="", tol=1e-5):
        """Map u (B, N, D) at t (B,) back to x like u; steps (B,).

        method: "cache", exact, token by token; "jacobi", sweeps over all tokens until the largest change is below tol
        (0: as many sweeps as tokens, which is exact). Empty: the faster, "jacobi" on CUDA and else "cache".
        """
        method = method or ("jacobi" if u.is_cuda else "cache")
        if method not in ("cache", "jacobi"):
            raise ValueError(f"inversion method {method!r} is unknown: choose 'cache' or 'jacobi'")
        self.sweeps = []
        below_one = (t < 1).nonzero()[:, 0]  # at t = 1 the map is the identity
        if len(below_one) == 0:
            return u
        x = u[below_one]
        with torch.autocast(u.device.type, enabled=False):  # bfloat16 is too coarse for an inverse
            condition = self.condition(t[below_one], steps[below_one])
            for block in reversed(self.blocks):
                if method == "cache":
                    x = block.inverse_cached(x, condition)
                else:
                    x = block.inverse_jacobi(x, condition, tol)
                    self.sweeps.insert(0, block.sweeps)
        return u.index_copy(0, below_one, x)

    def condition(self, t, steps):
        """The conditioning (B, width) of every block, or None for a transporter without blocks."""
        if not self.blocks:
            return None
        return self.time(torch.stack([t, 1 / steps], dim=1))
