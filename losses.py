"""The loss that training minimises: the paper's, the term (26) of runs that start from flow matching, and ours.

An update of train.py calls draw_levels, then losses_of_batch, which calls TrainingLoss. Without the term (26) and
settings of ours, TrainingLoss is NTM.forward, Eq. (16). Equation numbers are those of docs/method.md and, from (28),
docs/beyond.md.
"""

import math

import torch
from torch import nn

from beyond import expected_nll, known_step, level_weights, mirror_image, velocity_error
from fm import FlowMatching
from plumbing.runtime import coarse_products


class TrainingLoss(nn.Module):
    """A model with the loss that the settings name: what DDP wraps and torch.compile compiles."""

    def __init__(self, model, config):
        super().__init__()
        self.model = model
        self.config = config
        ours = "closed_form", "mirrored", "level_weight", "velocity_weight"
        self.ours = any(config[name] for name in ours)

    def forward(self, images, text, drawn, start_means=None):
        """The losses {name: scalar}, per dimension, of images (B, channels, H, W) with captions text (B, L).

        drawn: the result of draw_levels. start_means: mu_FM of Eq. (26), (B, K-1, N, D), or None. "nll": -log p, or
        flow matching's loss. "aux": the term of Eq. (26) without its weight. "minimised": what is differentiated, to
        which losses_of_batch adds "aux".
        """
        if start_means is None and not self.ours:
            nll = self.model(images, text, drawn)  # Eq. (16) alone, or Eq. (22)
            return {"nll": nll, "minimised": nll}

        # NTM.forward stays the paper's loss alone; the rest computes the loss from parts that settings of ours change
        config, model = self.config, self.model
        steps, ts, x = drawn
        u, logdet = model.transport(x, ts, steps, model.is_whole_trajectory(ts))
        gaussian = model.predict_all(u, ts, steps, text)
        if config["closed_form"] or config["mirrored"] or config["velocity_weight"]:  # (ours)
            mean, std = known_step(model, x, model.patchify(images), ts)
        if config["closed_form"]:  # (ours) Eq. (31)
            nll = expected_nll(gaussian, mean, std)
        else:
            nll = gaussian.nll(u[:, :-1]) - logdet[:, :-1]
        if config["mirrored"]:  # (ours) Eq. (40)
            u, logdet = model.transport(mirror_image(x, mean), ts[:, :-1], steps)
            nll = 0.5 * (nll + gaussian.nll(u) - logdet)
        nll = nll / x[0, 0].numel()
        losses = {"nll": nll.mean(), "minimised": nll.mean()}
        if config["level_weight"]:  # (ours) Eq. (30)
            weights = level_weights(model.config, config["level_weight"], ts, steps, config["max_t_min"])
            losses["minimised"] = (weights * nll).mean()
        if config["velocity_weight"]:  # (ours)
            error = velocity_error(gaussian, mean, ts)
            losses["minimised"] = losses["minimised"] + config["velocity_weight"] * error
        if start_means is not None:
            losses["aux"] = (gaussian.mean - start_means).square().mean()
        return losses


def means_of_start(frozen, text, drawn):
    """mu_FM of Eq. (26), (B, K-1, N, D): the means of `frozen`, the flow-matching start in the form of an NTM."""
    steps, ts, x = drawn
    with torch.no_grad(), coarse_products(ts.device):
        return frozen.predict_all(x, ts, steps, text).mean  # no transporter, so u = x


def losses_of_batch(network, frozen, aux_weight, images, text, *drawn):
    """{name: scalar} of images (B, channels, H, W): "minimised" is differentiated, the others are for the log.

    "loss" is "nll" plus, if there is a frozen start, the weighted term of Eq. (26), without weights and terms of ours.
    """
    if frozen is None:
        losses = network(images, text, drawn)
        return {"minimised": losses["minimised"], "loss": losses["nll"]}
    losses = network(images, text, drawn, means_of_start(frozen, text, drawn))
    aux = aux_weight * losses["aux"]
    return {
        "minimised": losses["minimised"] + aux,
        "loss": losses["nll"] + aux,
        "nll": losses["nll"],
        "aux": losses["aux"],
        "aux_weight": torch.full_like(aux, aux_weight),
    }


def aux_weight_at(i, config):
    """lambda_i of Eq. (26), the weight at update i."""
    return config["aux_weight"] * 0.5 * (1 + math.cos(math.pi * i / config["max_iters"]))


def draw_levels(model, noised, images, text, config, batches, generator):
    """The random part of an update, drawn for the whole batch and cut to this rank's rows.

    Returns (steps, ts, x) for an NTM, with levels x that `noised` makes; (t, noise) for flow matching. images and text
    are already the rank's rows.
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
