"""One reverse step of a trajectory as a conditional normalizing flow: everything that needs no caption.

Read from top to bottom:
- the time grid: the few noise levels that a trajectory visits;
- the forward trajectory q, which turns data into noise level by level, its posterior and covariance (no parameters);
- a Transformer layer, the building block of every network here;
- the transporter f_T: shallow, invertible, autoregressive over the tokens of one level. It maps x_t to the u-space
  where a Gaussian step is right, and returns the log-determinant of that map.

Time runs from 0 (data) to 1 (noise), a step goes from t (noisier) to s < t (cleaner), tensors of tokens are (B, N, D).
"Eq. (3)" is equation (3) of docs/method.md, which also cites the papers.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

# ---------------------------------------------------------------------------------------------------------------
# The time grid and the forward trajectory


def time_grid(steps, t_min, num_tokens, shift=None):
    """Noise levels t_0 = t_min < t_1 < ... < t_T = 1, Eq. (6).

    steps: T. t_min: float, or (B,) for a grid per example. num_tokens: N, which determines `shift` (e^m) when None:
    an image of more tokens is still recognisable at higher noise, so its levels move towards 1.
    Returns (T+1,) or (B, T+1), ascending. Raises ValueError for a float t_min outside [0, t_1).
    """
    if shift is None:
        shift = math.exp(0.5 + 0.65 * (num_tokens - 256) / (4096 - 256))
    first = shift / (shift + steps - 1)
    if not torch.is_tensor(t_min):  # a tensor's values are not checked: that would synchronise with the GPU
        if not 0 <= t_min < first:
            raise ValueError(f"t_min is {t_min}, but the grid of {steps} steps starts at {first:.4f}: "
                             f"choose 0 <= t_min < {first:.4f}, fewer steps or a larger shift")
        t_min = torch.tensor(float(t_min))
    k = torch.arange(1, steps + 1, dtype=t_min.dtype, device=t_min.device)
    sigma = shift * k / (shift * k + (steps - k))  # Eq. (6) times k/k: exactly 1 at k = T
    return torch.cat([t_min[..., None], sigma.expand(*t_min.shape, steps)], dim=-1)


def forward_kernel(t, s):
    """alpha, beta of q(x_t | x_s) = N(alpha x_s, beta^2 I), s < t, Eq. (2); each shaped like t."""
    alpha = (1 - t) / (1 - s)
    beta = ((t - s) * (t + s - 2 * t * s)).sqrt() / (1 - s)  # factored: no digits are lost when s and t are close
    return alpha, beta


def forward_trajectory(x0, ts, generator=None, noise=None):
    """Draws a trajectory: its cleanest level from Eq. (1), then level by level from the Markov chain of Eq. (2).

    x0: (B, N, D). ts: (B, K), ascending, any consecutive part of a grid (K = T+1 for the whole, 2 for one step).
    noise: (B, K, N, D) standard normal, drawn with `generator` when None. Returns (B, K, N, D).
    """
    if noise is None:
        noise = torch.randn(*ts.shape, *x0.shape[1:], generator=generator, dtype=x0.dtype, device=x0.device)
    t0 = ts[:, 0, None, None]
    return forward_chain((1 - t0) * x0 + t0 * noise[:, 0], ts, noise[:, 1:])


def forward_chain(x, ts, noise):
    """Eq. (2) from a level x (B, N, D) on: it and the noisier ones, (B, K, N, D). ts (B, K), noise (B, K-1, N, D)."""
    levels, times = [x], ts[:, :, None, None]
    for k in range(1, ts.shape[1]):
        alpha, beta = forward_kernel(times[:, k], times[:, k - 1])
        levels.append(alpha * levels[-1] + beta * noise[:, k - 1])
    return torch.stack(levels, dim=1)


def taken_again(steps):
    """The steps that a restart takes again, Eq. (34), each by the number of its cleaner level: those of the first half,
    which decide what is drawn, but for the very first, out of pure noise."""
    return range(steps // 2, steps - 1)


def forward_log_prob(x, ts):
    """log q(x_{t_1:T} | x_{t_0}) in nats, (B,), Eq. (13), which the bound of Eq. (14) needs.

    x: (B, T+1, N, D). ts: (B, T+1).
    """
    times = ts[:, :, None, None]
    alpha, beta = forward_kernel(times[:, 1:], times[:, :-1])
    z = (x[:, 1:] - alpha * x[:, :-1]) / beta
    log_density = -0.5 * z**2 - torch.log(beta) - 0.5 * math.log(2 * math.pi)
    return log_density.sum(dim=(1, 2, 3))


def gaussian_nll(z):
    """-log N(z; 0, I) in nats, a term of Eq. (11), over all but the first two dimensions: (B, K, N, D) to (B, K)."""
    return (0.5 * z**2 + 0.5 * math.log(2 * math.pi)).sum(dim=(2, 3))


def bits_per_dim(nats, dims):
    """Eq. (15): nats of dequantised 8-bit data in [-1, 1], whose bins are 2^-7 wide, to bits per number."""
    return nats / dims / math.log(2) + 7


def reverse_posterior(t, s):
    """A, B, C of q(x_s | x_t, x_0) = N(A x_t + B x_0, C^2 I), s < t, Eqs. (3) and (4); each shaped like t."""
    alpha, beta = forward_kernel(t, s)
    return alpha * s**2 / t**2, beta**2 * (1 - s) / t**2, beta * s / t


def trajectory_covariance(ts):
    """Covariance S of a trajectory's noise between levels, given x_0, Eq. (5); ts (..., T+1) to (..., T+1, T+1)."""
    a, b = ts[..., :, None], ts[..., None, :]
    low, high = torch.minimum(a, b), torch.maximum(a, b)
    ratio = (1 - high) / torch.where(low < 1, 1 - low, 1.0)
    return low**2 * torch.where(low < 1, ratio, 1.0)


# ---------------------------------------------------------------------------------------------------------------
# The building block


def zeroed(linear):
    """The linear layer with weight and bias set to zero, so that its output is zero at initialisation."""
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


def full_precision(linear, h):
    """linear(h) in the layer's own precision, even under autocast: for log-scales and variances."""
    with torch.autocast(h.device.type, enabled=False):
        return linear(h.to(linear.weight.dtype))


class TimeEmbedding(nn.Module):
    """Times in [0, 1], (B, count), to one conditioning vector, (B, width): sinusoids, then a two-layer MLP.

    The number of steps T enters as the time 1/T, the length of a step of equal size.
    """

    def __init__(self, count, width, frequencies=32):
        super().__init__()
        # up to 1000 radians per unit of time: near the data, times that differ by 0.001 matter
        self.register_buffer("frequencies", torch.logspace(0, 3, frequencies), persistent=False)
        self.mlp = nn.Sequential(nn.Linear(count * 2 * frequencies, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, times):
        angles = times[..., None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)
        return self.mlp(waves.to(self.mlp[0].weight.dtype))


def rotated(x, rotation):
    """x (B, heads, N, d), each of its d/2 pairs of numbers turned by an angle; rotation: (2, N, d/2), cos and sin."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = rotation
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


def attend(q, k, v, causal=False):
    """softmax(q k^T / sqrt(d)) v of each head; q (B, heads, M, d), the last M of the N tokens of k, v (B, heads, N, d).
    causal: none attends to a later one."""
    (M, d), N = q.shape[-2:], k.shape[-2]
    mask = torch.ones(M, N, dtype=torch.bool, device=q.device).tril(N - M) if causal and 1 < M < N else None
    if q.device.type != "cpu" or q.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and M == N)
    # there torch's fused kernel takes seven times as long in the backward pass as the formula itself
    logits = (q * d ** -0.5) @ k.mT
    if causal:
        logits = logits.masked_fill(torch.ones_like(logits[0, 0], dtype=torch.bool).triu(N - M + 1), -math.inf)
    return torch.softmax(logits, dim=-1) @ v


class Attention(nn.Module):
    """Multi-head self-attention with normalised queries and keys; causal, or over all tokens."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x, causal=False, cache=None, position=0, rotation=None):
        """x: (B, N, width). With a cache (2, B, heads, N, width/heads), x are the tokens from `position` on: their keys
        and values are written to the cache, and they attend to those of the tokens before as well. rotation: as
        rotated's, of queries and keys, whose products then depend on the distance between their tokens."""
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        q, k = (F.layer_norm(a, a.shape[-1:]) for a in (q, k))  # bounds the logits
        q, k = ((a if rotation is None else rotated(a, rotation)).to(v.dtype) for a in (q, k))
        if cache is not None:
            end = position + x.shape[1]
            cache[0, :, :, position:end], cache[1, :, :, position:end] = k, v
            k, v = cache[:, :, :, :end]
        return self.out(rearrange(attend(q, k, v, causal), "b h n d -> b n (h d)"))


class Layer(nn.Module):
    """A pre-norm Transformer layer whose norms are shifted, scaled and gated by a conditioning vector (adaLN)."""

    def __init__(self, width, heads):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width))
        self.modulation = nn.Sequential(nn.SiLU(), zeroed(nn.Linear(width, 6 * width)))

    def forward(self, x, c, causal=False, rotation=None):
        """x: (B, N, width); c: (B, width). Returns (B, N, width)."""
        return self.modulated(x, self.modulation(c), causal, rotation=rotation)

    def modulated(self, x, modulation, causal=False, cache=None, position=0, rotation=None):
        """The same with self.modulation(c), (B, 6 width), computed before: it is the same for all tokens."""
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation[:, None].chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        x = x + gate1 * self.attention(h, causal, cache, position, rotation)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.mlp(h)


# ---------------------------------------------------------------------------------------------------------------
# The transporter


class FlowBlock(nn.Module):
    """One autoregressive affine map, u_n = (x_n - b_n) exp(-l_n), Eq. (7), scanning forwards or backwards.

    b_n (`shift`) and l_n (`log_scale`) depend on the tokens before n in the scan, on t and on T.
    """

    log_scale_bound = 4.0  # |l| < 4: a block scales by e^4 at most, so the inverse cannot overflow

    def __init__(self, num_tokens, token_dim, width, layers, heads, backwards):
        super().__init__()
        self.backwards = backwards
        self.proj_in = nn.Linear(token_dim, width)
        self.start = nn.Parameter(torch.zeros(width))
        self.position = nn.Parameter(0.02 * torch.randn(num_tokens, width))  # by place in the scan
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(layers))
        self.head = zeroed(nn.Linear(width, 2 * token_dim))  # the map starts as the identity

    def shift_and_log_scale(self, h):
        shift, log_scale = full_precision(self.head, F.layer_norm(h, h.shape[-1:])).chunk(2, dim=-1)
        return shift, self.log_scale_bound * torch.tanh(log_scale / self.log_scale_bound)

    def affine(self, x, c):
        """b_n and l_n of every token, each (B, N, D)."""
        # the input is moved by one place, which makes it causal: place n holds token n-1, place 0 start token and time
        start = (self.start + c)[:, None]
        h = torch.cat([start, self.proj_in(x[:, :-1]).to(start.dtype)], dim=1) + self.position
        for layer in self.layers:
            h = layer(h, c, causal=True)
        return self.shift_and_log_scale(h)

    def forward(self, x, c):
        """x to u, all tokens in parallel. Returns u (B, N, D) and log|det du/dx| (B,), Eq. (8)."""
        x = self.scan(x)
        shift, log_scale = self.affine(x, c)
        u = (x - shift) * torch.exp(-log_scale)
        return self.scan(u), -log_scale.sum(dim=(1, 2))

    def inverse(self, u, c, chunk, tol):
        """u to x, Eq. (7), `chunk` tokens after another, with a cache of the keys and values of those already known;
        within a chunk by fixed-point sweeps over its tokens at once, Eq. (9), until the largest change is below tol.

        Each sweep makes at least one more token exact, so a chunk needs as many as it has tokens at most. A chunk of 1
        is the exact scan, one of N is Jacobi's iteration, what lies between Gauss-Seidel-Jacobi's (arXiv:2505.12849).
        Returns x (B, N, D) and the mean number of sweeps of a chunk.
        """
        u = self.scan(u)
        x, (batch, num_tokens, _), heads = u.clone(), u.shape, self.layers[0].attention.heads
        cache = u.new_empty(len(self.layers), 2, batch, heads, num_tokens, len(self.start) // heads)
        modulations, start, sweeps = [layer.modulation(c) for layer in self.layers], (self.start + c)[:, None], 0
        for first in range(0, num_tokens, chunk):
            last = min(first + chunk, num_tokens)
            for left in reversed(range(last - first)):
                known = self.proj_in(x[:, max(first - 1, 0):last - 1])
                h = (known if first else torch.cat([start, known], dim=1)) + self.position[first:last]
                for layer, modulation, layer_cache in zip(self.layers, modulations, cache):
                    h = layer.modulated(h, modulation, causal=True, cache=layer_cache, position=first)
                shift, log_scale = self.shift_and_log_scale(h)
                previous, x[:, first:last] = x[:, first:last].clone(), u[:, first:last] * log_scale.exp() + shift
                sweeps += 1
                if left and (x[:, first:last] - previous).abs().max() < tol:
                    break
        return self.scan(x), sweeps / math.ceil(num_tokens / chunk)

    def scan(self, x):
        """Tokens to the order of the scan, and back."""
        return x.flip(1) if self.backwards else x


class Transporter(nn.Module):
    """f_T(x_t, t): `blocks` autoregressive maps in alternating scan order, conditioned on t and T, Eqs. (7) to (9).

    The identity at initialisation, and always at t = 1, since pure noise needs no map. With 0 blocks it is always the
    identity, and the model's reverse step the plain Gaussian of a diffusion model.
    """

    def __init__(self, num_tokens, token_dim, width, blocks, layers, heads):
        super().__init__()
        self.time = TimeEmbedding(2, width) if blocks else None
        self.blocks = nn.ModuleList(
            FlowBlock(num_tokens, token_dim, width, layers, heads, backwards=i % 2 == 1) for i in range(blocks))
        self.sweeps = []  # over each chunk of tokens, that each block took in the last inversion, first block first

    def forward(self, x, t, steps):
        """x (B, N, D), t (B,), steps (B,) to u (B, N, D) and log|det du/dx| (B,), Eq. (8)."""
        u, logdet = x, x.new_zeros(len(x))
        c = self.condition(t, steps)
        for block in self.blocks:
            u, block_logdet = block(u, c)
            logdet = logdet + block_logdet
        return torch.where(t[:, None, None] < 1, u, x), torch.where(t < 1, logdet, 0.0)

    @torch.no_grad()
    def inverse(self, u, t, steps, method="", tol=1e-5):
        """u (B, N, D) to x (B, N, D): exactly ("cache"), or to a tolerance, unless that is 0, by sweeps over all tokens
        ("jacobi") or an eighth of them after another ("gauss-seidel"). By default the faster: "jacobi" on CUDA."""
        method = method or ("jacobi" if u.is_cuda else "cache")
        chunks = {"cache": 1, "jacobi": u.shape[1], "gauss-seidel": math.ceil(u.shape[1] / 8)}
        if method not in chunks:
            raise ValueError(f"inversion method {method!r} is unknown: choose {' or '.join(map(repr, chunks))}")
        self.sweeps, mapped = [], (t < 1).nonzero()[:, 0]  # pure noise is left out
        if not len(mapped):
            return u
        x = u[mapped]
        with torch.autocast(u.device.type, enabled=False):  # bfloat16 is too coarse for an inverse
            c = self.condition(t[mapped], steps[mapped])
            for block in reversed(self.blocks):
                x, sweeps = block.inverse(x, c, chunks[method], tol)
                self.sweeps.insert(0, sweeps)
        return u.index_copy(0, mapped, x)

    def condition(self, t, steps):
        return self.time(torch.stack([t, 1 / steps], dim=1)) if self.blocks else None
