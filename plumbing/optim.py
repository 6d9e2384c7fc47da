"""Optimisers, the learning rate schedule, and the averaged weights."""

import math
import re
from collections import defaultdict

import torch

from plumbing.runtime import LAYER

# endings of the names of a layer's matrices, in our Transformers and in SiT
HIDDEN = (
    "attention.qkv.weight",
    "attention.out.weight",
    "mlp.0.weight",
    "mlp.2.weight",
    "attn.qkv.weight",
    "attn.proj.weight",
    "mlp.fc1.weight",
    "mlp.fc2.weight",
)
WORDS = "embed.weight", "embedding_table.weight"


def make_optimizers(model, name, weight_decay, device, bfloat16=False, hidden=HIDDEN, words_lr=1.0):
    """The optimisers, a list: AdamW, or for name "muon" Muon for the layers' matrices and AdamW for all other weights.

    In equal time Muon made far more progress on every data set here. bfloat16: whether Muon multiplies matrices in
    bfloat16. hidden: the endings of the names of Muon's matrices. words_lr: factor on the learning rate of the word
    embeddings. Raises ValueError for another name.
    """
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer {name!r} is unknown: choose 'adamw' or 'muon'")
    matrices, words, rest = [], [], []
    for key, parameter in model.named_parameters():
        if name == "muon" and re.search(LAYER, key) and key.endswith(hidden):
            matrices.append(parameter)
        elif key.endswith(WORDS):
            words.append(parameter)
        else:
            rest.append(parameter)
    groups = [
        {"params": rest},
        {"params": words, "factor": words_lr},
    ]
    fused = device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)
    return [Muon(matrices, weight_decay, bfloat16), adamw] if name == "muon" else [adamw]


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalised updates, for matrices (https://kellerjordan.github.io/posts/muon/).

    It is torch.optim.Muon's rule with "match_rms_adamw", so that one learning rate serves AdamW too. Differences: all
    matrices of a shape are updated at once, and bfloat16 is optional: on a CPU without instructions for it, Muon would
    take half of the training time.
    """

    def __init__(self, params, weight_decay, bfloat16=False, lr=1e-3, momentum=0.95):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype = torch.bfloat16 if bfloat16 else torch.float32

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for matrix in group["params"]:
                if matrix.grad is not None:
                    by_shape[matrix.shape].append(matrix)
            for matrices in by_shape.values():
                self.update(matrices, group)

    def update(self, matrices, group):
        """Update matrices of the same shape."""
        lr, momentum = group["lr"], group["momentum"]
        for matrix in matrices:
            if not self.state[matrix]:
                self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
        gradients = [matrix.grad for matrix in matrices]
        buffers = [self.state[matrix]["momentum_buffer"] for matrix in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        updates = torch.stack(torch._foreach_lerp(gradients, buffers, momentum))  # Nesterov's
        updates = orthogonal(updates.to(self.dtype)).to(updates.dtype)
        longest = max(matrices[0].shape)
        torch._foreach_mul_(matrices, 1 - lr * group["weight_decay"])
        torch._foreach_add_(matrices, updates.unbind(), alpha=-lr * 0.2 * math.sqrt(longest))  # as large as AdamW's


def orthogonal(matrices):
    """U V^T of each matrix U S V^T in matrices (K, m, n), roughly: singular values end between 0.7 and 1.2."""
    tall = matrices.shape[1] > matrices.shape[2]  # the iteration is cheaper on the smaller of x x^T and x^T x
    x = matrices.mT if tall else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(5):  # the Newton-Schulz iteration, with coefficients that raise small values fast
        gram = x @ x.mT
        x = 3.4445 * x + torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315) @ x
    return x.mT if tall else x


def learning_rate(config, i):
    """The learning rate of iteration i: linear warm-up to lr, then a cosine to min_lr at max_iters."""
    highest, lowest = config["lr"], config["min_lr"]
    warmup = config["warmup_iters"]
    if i < warmup:
        return highest * (i + 1) / warmup
    progress = (i - warmup) / max(1, config["max_iters"] - warmup)
    return lowest + (highest - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def update_weights(optimizers, lr):
    """Make a step with each optimiser; a group's learning rate is lr times its factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("factor", 1.0)
        optimizer.step()


@torch.no_grad()
def update_average(ema, model, decay, i):
    """Update the averaged weights after iteration i, Eq. (18): with a smaller decay at first, to forget the start."""
    decay = min(decay, (1 + i) / (10 + i))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
