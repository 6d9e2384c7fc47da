"""SiT: a published flow-matching network to start from (Scalable Interpolant Transformers, arXiv:2401.08740).

The published models are class-conditional, of ImageNet in the latents of the Stable Diffusion autoencoder. Parameters
have the names of the published checkpoints. SiT's time runs from noise (0) to data (1), and its velocity is data -
noise; here both are reversed, v(x, t) = -v_SiT(x, 1 - t), as section 11 of docs/method.md says.
"""

import argparse
import contextlib

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import nn

from beyond import CoupledNTM
from flow import TimeEmbedding, full_precision, normalized, zeroed
from pixels import PixelNTM
from predictor import emitted, flow_heads, gaussian_head

FREQUENCIES = 128
WRAPPERS = "module", "_orig_mod"  # prefixes that DistributedDataParallel and torch.compile add to names
HEADS = {384: 6, 768: 12, 1024: 16, 1152: 16}  # of the published S, B, L and XL, by width: checkpoints do not tell


def modulated_norm(x, shift, scale):
    """Layer norm without parameters, then scaled and shifted by vectors (B, 1, width)."""
    x = F.layer_norm(x, x.shape[-1:], eps=1e-6)
    return x * (1 + scale) + shift


def modulation(width, vectors):
    return nn.Sequential(nn.SiLU(), nn.Linear(width, vectors * width))


class Block(nn.Module):
    """A Transformer layer with adaLN-Zero, without query-key norm.

    Shift, scale and gate of attention and of the MLP come from the conditioning (B, width).
    """

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(width, 3 * width),
            "proj": nn.Linear(width, width),
        })
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(width, 4 * width),
            "fc2": nn.Linear(4 * width, width),
        })
        self.adaLN_modulation = modulation(width, 6)

    def forward(self, x, condition):
        vectors = self.adaLN_modulation(condition)[:, None]
        shift1, scale1, gate1, shift2, scale2, gate2 = vectors.chunk(6, dim=-1)
        qkv = self.attn.qkv(modulated_norm(x, shift1, scale1))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.heads)
        h = F.scaled_dot_product_attention(q, k, v)
        h = rearrange(h, "b h n d -> b n (h d)")
        x = x + gate1 * self.attn.proj(h)
        h = self.mlp.fc1(modulated_norm(x, shift2, scale2))
        h = F.gelu(h, approximate="tanh")
        return x + gate2 * self.mlp.fc2(h)


class SiT(nn.Module):
    """SiT's network, which estimates the velocity noise - data.

    forward takes images; hidden takes and velocity returns tokens (B, N, D) in the order of NTM.patchify.
    """

    def __init__(self, image_size, channels, patch_size, width, depth, heads, classes):
        super().__init__()
        self.image_size, self.channels, self.patch_size = image_size, channels, patch_size
        self.width, self.depth, self.heads, self.classes = width, depth, heads, classes
        tokens = (image_size // patch_size) ** 2
        token_dim = channels * patch_size**2
        self.register_buffer("pos_embed", torch.zeros(1, tokens, width))  # sines and cosines, not trained
        last = -4 * (FREQUENCIES - 1) / FREQUENCIES
        frequencies = torch.logspace(0, last, FREQUENCIES)
        self.register_buffer("frequencies", frequencies, persistent=False)
        patches = nn.Conv2d(channels, width, patch_size, stride=patch_size)
        self.x_embedder = nn.ModuleDict({"proj": patches})
        time = nn.Sequential(
            nn.Linear(2 * FREQUENCIES, width),
            nn.SiLU(),
            nn.Linear(width, width),
        )
        self.t_embedder = nn.ModuleDict({"mlp": time})
        labels = nn.Embedding(classes + 1, width)  # the last: no class
        self.y_embedder = nn.ModuleDict({"embedding_table": labels})
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = nn.ModuleDict({
            "linear": nn.Linear(width, token_dim),
            "adaLN_modulation": modulation(width, 2),
        })

    def hand_over(self, predictor):
        """Copy the weights into a SiTPredictor of the same size."""
        predictor.sit.load_state_dict(self.state_dict())

    def condition(self, t, y):
        """The conditioning (B, width) of every block, from time t (B,), where 1 is noise, and class y (B,)."""
        angles = (1 - t)[:, None] * self.frequencies
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.pos_embed.dtype)
        return self.t_embedder.mlp(waves) + self.y_embedder.embedding_table(y)

    def hidden(self, tokens, condition):
        """The last hidden states (B, N, width) of tokens (B, N, D)."""
        conv = self.x_embedder.proj  # as patches do not overlap, the convolution is a linear layer
        weight = rearrange(conv.weight, "w c p q -> w (p q c)")
        h = F.linear(tokens, weight, conv.bias) + self.pos_embed
        for block in self.blocks:
            h = block(h, condition)
        return h

    def velocity(self, h, condition):
        """The velocity (B, N, D) from the last hidden states, in full precision."""
        vectors = self.final_layer.adaLN_modulation(condition)[:, None]
        shift, scale = vectors.chunk(2, dim=-1)
        h = modulated_norm(h, shift, scale)
        return -full_precision(self.final_layer.linear, h)  # the published weights give data - noise

    def forward(self, x, t, y):
        """The velocity (B, C, H, W) of x (B, C, H, W) at t (B,); y (B,): class numbers, `classes` for none."""
        p = self.patch_size
        rows = x.shape[2] // p
        tokens = rearrange(x, "b c (h p) (w q) -> b (h w) (p q c)", p=p, q=p)
        condition = self.condition(t, y)
        h = self.hidden(tokens, condition)
        v = self.velocity(h, condition)
        return rearrange(v, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, p=p, q=p)


class SiTPredictor(nn.Module):
    """A SiT as the predictor of an NTM in the posterior parametrisation: velocity and rho of Eq. (25).

    Two parts are new. `step` embeds the step's end s and 1/T; its output starts at zero and is added to the
    conditioning. `head` computes rho and R directions (ours) from the last hidden states.
    """

    def __init__(self, config):
        super().__init__()
        height, width = config.image_size
        if config.parametrization != "posterior" or height != width:
            raise ValueError("a SiT needs parametrization 'posterior' and square images")
        self.sit = SiT(
            height,
            config.channels,
            config.patch_size,
            config.width,
            config.depth,
            config.heads,
            classes=config.vocab_size - 2,
        )
        self.step = TimeEmbedding(2, config.width)
        zeroed(self.step.mlp[-1])
        self.head = gaussian_head(config.width, 1, config.rank, config.token_dim)
        self.flow_heads = flow_heads(config)  # (ours)
        self.token_dim = config.token_dim

    def forward(self, u, t, s, steps, text):
        """Velocity, rho, R directions and flow_outputs (ours), each like u (B, N, D), as in Predictor.forward.

        t, s, steps (B,). The first id of text (B, L) is 2 + class, or 1 for no class.
        """
        y = torch.where(text[:, 0] < 2, self.sit.classes, text[:, 0] - 2)
        step = torch.stack([s, 1 / steps], dim=1)
        condition = self.sit.condition(t, y) + self.step(step)
        h = self.sit.hidden(u, condition)
        others = emitted(self, normalized(h))
        velocity = self.sit.velocity(h, condition)
        return velocity, *others


class SiTNTM(PixelNTM):
    """An NTM whose predictor is a SiT."""

    predictor_class = SiTPredictor


class CoupledSiTNTM(CoupledNTM):
    """(ours) An NTM whose predictor is a SiT and whose first step is coupled."""

    predictor_class = SiTPredictor


# ---------------------------------------------------------------------------------------------------------------
# Published checkpoints


def unwrapped(name):
    """A parameter's name in the network itself, without the WRAPPERS that training adds."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


def read_weights(path):
    """The state dict of a published checkpoint, or of one that SiT's trainer saved.

    Raises FileNotFoundError, or ValueError with one line that names the file.
    """
    with torch.serialization.safe_globals([argparse.Namespace]):  # the trainer's "args": names and values, no code
        try:
            contents = torch.load(path, map_location="cpu", weights_only=True)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"there is no SiT checkpoint {path}") from error
        except Exception as error:  # a damaged file may raise anything
            unsafe = []
            with contextlib.suppress(Exception):
                unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            if unsafe:
                raise ValueError(f"{path} holds {', '.join(sorted(unsafe))} beside its weights, which could run code: "
                                 "save its weights alone, by torch.save(checkpoint['ema'], PATH)") from error
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ValueError(f"cannot read {path}: it is truncated or not a checkpoint ({reason})") from error
    for name in ("ema", "model", "state_dict"):
        if isinstance(contents, dict) and isinstance(contents.get(name), dict):
            contents = contents[name]
    if not isinstance(contents, dict):
        return {}
    return {unwrapped(str(name)): value for name, value in contents.items()}


def check_heads(path, width, heads):
    """Raise ValueError if the number of heads is unknown for this width, or does not divide it."""
    remedy = f"such as --heads={max(1, width // 64)}"
    if not heads:
        raise ValueError(f"{path} has width {width}, which no published SiT has: set --heads, {remedy}")
    if width % heads:
        raise ValueError(f"{path} has width {width}, which {heads} heads do not divide: set --heads, {remedy}")


def load_sit(path, heads=None):
    """The SiT of a published checkpoint: a state dict, or a dict that holds one under "ema", "model" or "state_dict".

    The first of these keys counts. heads: attention heads; needed for a width that no published SiT has. Raises
    FileNotFoundError, or ValueError with one line that names the file and every tensor that is unknown, missing or of
    another shape.
    """
    state = read_weights(path)
    depth = len({name.split(".")[1] for name in state if name.startswith("blocks.")})
    expected = SiT(1, 1, 1, 1, depth, 1, 1).state_dict()
    wrong = state.keys() ^ expected.keys()
    if wrong:
        faults = (f"{name} is {'unknown' if name in state else 'missing'}" for name in sorted(wrong))
        raise ValueError(f"{path} is not a SiT checkpoint: {', '.join(faults)}")

    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    tokens = state["pos_embed"].shape[1]
    classes = len(state["y_embedder.embedding_table.weight"]) - 1
    heads = heads or HEADS.get(width)
    image_size = round(tokens**0.5) * patch_size
    sit = SiT(image_size, channels, patch_size, width, depth, heads, classes)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        if len(state[name]) == 2 * channels * patch_size**2:  # with learn_sigma: half of the outputs are unused
            state[name] = rearrange(state[name], "(patch two c) ... -> two (patch c) ...", two=2, c=channels)[0]
    try:
        sit.load_state_dict(state)
    except RuntimeError as error:  # torch's message names every tensor of another shape
        raise ValueError(f"{path} is not a SiT checkpoint: {' '.join(str(error).split())}") from error
    check_heads(path, width, heads)
    return sit
