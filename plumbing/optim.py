"""Optimisers, the learning rate's schedule and the averaged weights."""

import math

import torch

HAS_MUON = hasattr(torch.optim, "Muon")  # torch 2.9 or newer
HIDDEN = "attention.qkv.weight", "attention.out.weight", "mlp.0.weight", "mlp.2.weight"  # matrices of a layer


def make_optimizers(model, name, weight_decay, device, hidden=HIDDEN):
    """A list: AdamW for all weights, or for name "muon" Muon for the Transformer layers' matrices and AdamW for the
    rest: at equal time it went much further on every data set here. name "": Muon where torch has it. hidden: the
    endings of the names of Muon's matrices. Raises ValueError for another name, or where torch has no Muon."""
    name, rest = name or default_optimizer(), dict(model.named_parameters())
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer {name!r} is unknown: choose 'adamw' or 'muon'")
    optimizers = []
    if name == "muon":
        if not HAS_MUON:
            raise ValueError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}: choose 'adamw'")
        matrices = [rest.pop(key) for key in list(rest) if ".layers." in key and key.endswith(hidden)]
        # scaled so that one learning rate serves both
        optimizers = [torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")]
    fused = device.type in ("cuda", "cpu")
    return optimizers + [torch.optim.AdamW(rest.values(), betas=(0.9, 0.95), weight_decay=weight_decay, fused=fused)]


def default_optimizer():
    return "muon" if HAS_MUON else "adamw"


def learning_rate(config, i):
    """Linear warm-up to lr, then a cosine to min_lr at max_iters."""
    if i < config["warmup_iters"]:
        return config["lr"] * (i + 1) / config["warmup_iters"]
    progress = (i - config["warmup_iters"]) / max(1, config["max_iters"] - config["warmup_iters"])
    return config["min_lr"] + (config["lr"] - config["min_lr"]) * 0.5 * (1 + math.cos(math.pi * progress))


def step(optimizers, lr):
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()


@torch.no_grad()
def update_average(ema, model, decay, i):
    """Eq. (18): exponential moving average of the weights; the first iterations are forgotten faster."""
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(decay, (1 + i) / (10 + i)))
