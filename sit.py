"""SiT: a published flow-matching network, to start from (Scalable Interpolant Transformers, arXiv:2401.08740).

Class-conditional ImageNet in the latents of the Stable Diffusion autoencoder. The network has the parameter names of
the published checkpoints, and its size is read off their tensors. What differs from ours is mapped at its door: there,
time runs from noise (0) to data (1), and the velocity is data - noise.

    load_sit(path)     the velocity network of a checkpoint
    SiTPredictor       the same network as an NTM's predictor: its last hidden states also give the scale
"""

import re

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from flow import TimeEmbedding, full_precision, zeroed

# The tensors do not tell how many heads share a width. These are SiT-S, -B, -L and -XL.
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}
FREQUENCIES = 128


def heads_of(width):
    """The published number of heads for a width; for others a head of 64 numbers or, if that does not fit, 4 heads."""
    return HEADS.get(width) or (width // 64 if width % 64 == 0 else 4)


def normalise(x, shift, scale):
    """Layer norm without parameters, then shifted and scaled by vectors (B, width)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale[:, None]) + shift[:, None]


def modulation(width, vectors):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


class Attention(nn.Module):
    """Over all tokens; unlike ours, queries and keys are not normalised."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = rearrange(self.qkv(x), "b n (three h d) -> three b h n d", three=3, h=self.heads)
        return self.proj(rearrange(F.scaled_dot_product_attention(q, k, v), "b h n d -> b n (h d)"))


class Block(nn.Module):
    """adaLN-Zero: six vectors from the conditioning, shift, scale and gate of attention, then of the MLP."""

    def __init__(self, width, heads):
        super().__init__()
        self.attn = Attention(width, heads)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(width, 4 * width), "fc2": nn.Linear(4 * width, width)})
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        x = x + gate1[:, None] * self.attn(normalise(x, shift1, scale1))
        hidden = F.gelu(self.mlp.fc1(normalise(x, shift2, scale2)), approximate="tanh")
        return x + gate2[:, None] * self.mlp.fc2(hidden)


class SiT(nn.Module):
    """The velocity noise - data, of images or of their tokens (B, N, D) in the order of NTM.patchify."""

    def __init__(self, image_size, channels, patch_size, width, depth, heads, classes):
        super().__init__()
        self.image_size, self.channels, self.patch_size = image_size, channels, patch_size
        self.width, self.depth, self.heads, self.classes = width, depth, heads, classes
        tokens, token_dim = (image_size // patch_size) ** 2, channels * patch_size**2
        self.register_buffer("pos_embed", torch.zeros(1, tokens, width))  # sines and cosines, not trained
        self.register_buffer("frequencies", torch.logspace(0, -4 * (FREQUENCIES - 1) / FREQUENCIES, FREQUENCIES),
                             persistent=False)
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(channels, width, patch_size, stride=patch_size)})
        self.t_embedder = nn.ModuleDict(
            {"mlp": nn.Sequential(nn.Linear(2 * FREQUENCIES, width), nn.SiLU(), nn.Linear(width, width))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(classes + 1, width)})  # the last: no class
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, token_dim),
                                          "adaLN_modulation": modulation(width, 2)})

    def condition(self, t, y):
        """The vector (B, width) that time t (B,), in [0, 1] with 1 noise, and class y (B,) modulate every block by."""
        angles = (1 - t)[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.pos_embed.dtype)
        return self.t_embedder.mlp(waves) + self.y_embedder.embedding_table(y)

    def hidden(self, tokens, c):
        """Tokens (B, N, D) to what the last block leaves, (B, N, width)."""
        conv = self.x_embedder.proj  # on patches that do not overlap, a linear layer
        h = F.linear(tokens, rearrange(conv.weight, "w c p q -> w (p q c)"), conv.bias) + self.pos_embed
        for block in self.blocks:
            h = block(h, c)
        return h

    def velocity(self, h, c):
        """What the last block left to noise - data, (B, N, D), in full precision."""
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        return -full_precision(self.final_layer.linear, normalise(h, shift, scale))

    def forward(self, x, t, y):
        """x (B, C, H, W), t (B,), y (B,) class numbers, `classes` for none. Returns the velocity (B, C, H, W)."""
        p = self.patch_size
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        c = self.condition(t, y)
        v = self.velocity(self.hidden(tokens, c), c)
        return rearrange(v, "b (h w) (p q c) -> b c (h p) (w q)", h=x.shape[2] // p, p=p, q=p)


class SiTPredictor(nn.Module):
    """A SiT as the predictor of an NTM in the posterior parametrisation: velocity and correction to the scale.

    What the published network did not have starts at zero: the correction, read off the last hidden states, and what
    the step's end s and the number of steps add to the conditioning.
    """

    def __init__(self, config):
        super().__init__()
        height, width = config.image_size
        if config.parametrization != "posterior" or height != width:
            raise ValueError("predictor 'sit' needs parametrization 'posterior' and square pictures")
        self.sit = SiT(height, config.channels, config.patch_size, config.width, config.depth, config.heads,
                       classes=config.vocab_size - 2)
        self.step = TimeEmbedding(2, config.width)
        zeroed(self.step.mlp[-1])
        self.head = zeroed(nn.Linear(config.width, config.token_dim))

    def forward(self, u, t, s, steps, text):
        """u (B, N, D), t, s, steps (B,), text (B, L) whose first id is 2 + class, or 1 for none; two tensors like u."""
        y = torch.where(text[:, 0] < 2, self.sit.classes, text[:, 0] - 2)
        c = self.sit.condition(t, y) + self.step(torch.stack([s, 1 / steps], dim=1))
        h = self.sit.hidden(u, c)
        return self.sit.velocity(h, c), full_precision(self.head, F.layer_norm(h, h.shape[-1:]))

    def adopt(self, sit):
        """Takes over the weights of a SiT of the same size."""
        self.sit.load_state_dict(sit.state_dict())


def load_sit(path):
    """The network of a published checkpoint: a state dict, or a dict that holds one under "ema".

    Its size is read off the tensors. Raises FileNotFoundError, or ValueError in one line that names the file and all
    tensors that are unknown or missing, or all of another shape.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"there is no SiT checkpoint {path}") from error
    except Exception as error:  # what reading garbage raises depends on the garbage
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read {path}: it is truncated or not a checkpoint ({reason})") from error
    state = state.get("ema", state) if isinstance(state, dict) else {}
    blocks = [int(match[1]) for name in state if (match := re.match(r"blocks\.(\d+)\.", name))]
    depth = max(blocks, default=0) + 1
    names = SiT(1, 1, 1, 1, depth, 1, 1).state_dict().keys()
    wrong = [f"{name} is missing" for name in names - state.keys()]
    wrong += [f"{name} is unknown" for name in state.keys() - names]
    if wrong:
        raise ValueError(f"{path} is not a SiT checkpoint: {', '.join(sorted(wrong))}")

    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    tokens, classes = state["pos_embed"].shape[1], len(state["y_embedder.embedding_table.weight"]) - 1
    sit = SiT(round(tokens**0.5) * patch_size, channels, patch_size, width, depth, heads_of(width), classes)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if len(state[name]) == 2 * channels * patch_size**2:  # learn_sigma: half of the channels, which nobody uses
            state[name] = rearrange(state[name], "(patch two c) ... -> two (patch c) ...", two=2, c=channels)[0]
    try:
        sit.load_state_dict(state)
    except RuntimeError as error:  # torch names every tensor of another shape, a line each
        raise ValueError(f"{path} is not a SiT checkpoint: {' '.join(str(error).split())}") from error
    return sit
