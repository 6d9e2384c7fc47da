"""What training minimises: the paper's loss, what starts from flow matching adds, and what is ours.

An update of train.py goes draw_levels -> TrainingLoss -> losses_of_batch. Without a setting of ours TrainingLoss is
NTM.forward, Eq. (16). "Eq. (26)" is equation (26) of docs/method.md.
"""

import math

import torch
from torch import nn

from beyond import expected_nll, known_step, level_weights, velocity_error
from fm import FlowMatching
from plumbing.runtime import coarse_products


class TrainingLoss(nn.Module):
    """A model with the loss that the settings name: what DDP wraps and torch.compile compiles."""

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        self.config = config
        self.ours = bool(config["closed_form"] or config["level_weight"] or config["velocity_weight"])

    def forward(self, images, text, levels, start_means=None):
        """{name: scalar}, per dimension, of images (B, channels, H, W) with captions text (B, L).

        levels: draw_levels'. start_means: mu_FM of Eq. (26), (B, K-1, N, D), or None. "nll" is -log p, or flow
        matching's loss. "objective" is what is minimised, but for "aux", the distance of Eq. (26).
        """
        if start_means is None and not self.ours:
            nll = self.model(images, text, levels)  # Eq. (16) alone, or Eq. (22)
            return {"nll": nll, "objective": nll}

        config, model = self.config, self.model
        steps, ts, x = levels
        pairs = config["pairs"] and model.config.steps != (1,)
        u, logdet = model.transport(x, ts, steps, ends_in_noise=not pairs)
        gaussian = model.gaussians(u, ts, text, steps)
        if config["closed_form"] or config["velocity_weight"]:  # (ours)
            mean, std = known_step(model, x, model.patchify(images), ts)
        if config["closed_form"]:  # (ours) Eq. (31)
            nll = expected_nll(gaussian, mean, std)
        else:
            nll = gaussian.nll(u[:, :-1]) - logdet[:, :-1]
        nll = nll / x[0, 0].numel()
        losses = {"nll": nll.mean(), "objective": nll.mean()}
        if config["level_weight"]:  # (ours) Eq. (30)
            weights = level_weights(model.config, config["level_weight"], ts, steps, config["max_t_min"])
            losses["objective"] = (weights * nll).mean()
        if config["velocity_weight"]:  # (ours)
            losses["objective"] = losses["objective"] + config["velocity_weight"] * velocity_error(gaussian, mean, ts)
        if start_means is not None:
            losses["aux"] = (gaussian.mean - start_means).square().mean()
        return losses


def means_of_start(frozen, text, levels):
    """mu_FM of Eq. (26), (B, K-1, N, D): the means of the flow-matching model that an NTM started from, as an NTM."""
    steps, ts, x = levels
    with torch.no_grad(), coarse_products(ts.device):
        return frozen.gaussians(x, ts, text, steps).mean


def losses_of_batch(loss, frozen, aux_weight, images, text, *levels):
    """{name: scalar} of images (B, channels, H, W): "objective" is minimised, the others are for the log.

    "loss" is -log p, and what keeps the means near those of the start, Eq. (26), without the weights that are ours.
    """
    if frozen is None:
        losses = loss(images, text, levels)
        return {"objective": losses["objective"], "loss": losses["nll"]}
    losses = loss(images, text, levels, means_of_start(frozen, text, levels))
    aux = aux_weight * losses["aux"]
    return {
        "objective": losses["objective"] + aux,
        "loss": losses["nll"] + aux,
        "nll": losses["nll"],
        "aux": losses["aux"],
        "aux_weight": torch.full_like(aux, aux_weight),
    }


def aux_weight_at(i, config):
    """lambda_i of Eq. (26)."""
    return config["aux_weight"] * 0.5 * (1 + math.cos(math.pi * i / config["max_iters"]))


def draw_levels(model, noised, images, text, config, batches, generator):
    """What a batch learns from, besides its images and captions text, of which a rank has its rows.

    All that is random is drawn for the whole batch, so that it does not depend on the ranks. Of an NTM steps T, times
    ts and the levels there, by `noised`; of flow matching times and noise.
    """
    device = images.device
    batch, rows = config["batch_size"], batches.rows
    token = model.config.num_tokens, model.config.token_dim
    if isinstance(model, FlowMatching):
        t = model.draw_times(batch, generator, device)
        return t[rows], batches.randn((batch, *token), generator=generator, device=device)
    draw = model.draw_pairs if config["pairs"] else model.draw_trajectories
    steps, ts = draw(batch, config["max_t_min"], generator, device)
    noise = batches.randn((*ts.shape, *token), generator=generator, device=device)
    steps, ts = steps[rows], ts[rows]
    x = noised(model.patchify(images), text, ts, noise)
    return steps, ts, x
