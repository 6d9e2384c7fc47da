"""What the unit tests share: the smallest models that still have everything, and data for them."""
import gzip
import struct

import torch
from conftest import covariance, randomize
from helpers import ROOT
from torch import nn

from beyond import CoupledConfig, CoupledNTM
from correlated import CorrelatedGaussian
from evidence import update
from flow import forward_trajectory, time_grid
from model import NTM, NTMConfig
from predictor import Gaussian

# 2 x 3 patches: 6 tokens of 4 numbers; a grid without shift, k/T
TINY = dict(
    image_size=(4, 6), channels=1, patch_size=2, vocab_size=9, text_len=3, width=16, depth=2, heads=2,
    transporter_width=16, transporter_blocks=2, transporter_layers=1, transporter_heads=2, shift=1.0,
)
COUPLED = TINY | dict(depth=1, transporter_blocks=0, parametrization="posterior", rank=2, first_noise=0.2)


def make_model(scale=1.0, dtype=torch.float64, **config):
    return randomize(NTM(NTMConfig(**TINY | config)), scale).to(dtype)


def make_coupled(scale=0.3, **config):
    return randomize(CoupledNTM(CoupledConfig(**COUPLED | config)), scale).double()


def make_images(batch):
    return torch.rand(batch, 1, 4, 6) * 2 - 1


def make_text(batch):
    return torch.randint(2, TINY["vocab_size"], (batch, TINY["text_len"]))


def make_trajectory(model, batch=3, steps=3):
    """x (B, T+1, N, D), ts (B, T+1) and text; no two examples have the same times."""
    config = model.config
    dtype = model.predictor.head.weight.dtype
    t_min = torch.linspace(0.01, 0.05, batch, dtype=dtype)
    ts = time_grid(steps, t_min, config.num_tokens, shift=1.0)
    x0 = torch.rand(batch, config.num_tokens, config.token_dim, dtype=dtype) * 2 - 1
    return forward_trajectory(x0, ts), ts, make_text(batch)


def levels_of(model, images, text, steps, ts):
    """What NTM.forward takes as drawn: steps, ts and a trajectory (B, K, N, D) at those times."""
    ts = ts.to(images.dtype)
    return steps, ts, model.noised(model.patchify(images), text, ts)


def make_gaussian(R, batch=(2, 5), dtype=torch.float64):
    """Of 3 tokens of 4 numbers, along its directions as uncertain as in each number."""
    mean, log_std = torch.randn(2, *batch, 3, 4, dtype=dtype)
    if R == 0:
        return Gaussian(mean, log_std)
    return CorrelatedGaussian(mean, log_std, torch.randn(*batch, R, 3, 4, dtype=dtype))


def dense(gaussian):
    """Mean (..., ND) and covariance (..., ND, ND)."""
    std = torch.diag_embed(torch.exp(gaussian.log_std).flatten(-2))
    dense_covariance = std @ std
    if isinstance(gaussian, CorrelatedGaussian):
        V = gaussian.directions.flatten(-2) @ std
        dense_covariance = dense_covariance + V.mT @ V
    return gaussian.mean.flatten(-2), dense_covariance


def changed(before, after):
    """The (row, column)s that hold any number which is not the same to the last bit."""
    places = (before != after).flatten(2).any(dim=2).nonzero()
    return {tuple(place) for place in places.tolist()}


def fixed(*draws):
    """A randn(*shape) for NTM.sample: the tensors `draws`, one a call, whatever is asked for."""
    left = iter(draws)
    return lambda *shape: next(left)


def noise_of(noise, rank=0):
    """The same with the levels' noise (B, T+1, N, D), and none along directions."""
    return fixed(noise, noise.new_zeros(len(noise), noise.shape[1] - 1, rank))


# ---------------------------------------------------------------------------------------------------------------
# Where everything is known: x_0 ~ N(m, v) for every number by itself, and its exact reverse as the predictor

MEAN, VARIANCE = torch.tensor([[[0.3], [-0.7]], [[0.05], [1.5]]]).double()  # each (N, D), of two tokens of one number


def levels_mean_and_covariance(ts):
    """Of (x_{t_0}, ..., x_{t_T}), for each token: (N, T+1) and (N, T+1, T+1)."""
    a = 1 - ts
    return MEAN * a, VARIANCE[:, :, None] * a[:, None] * a + covariance(ts)


def exact_reverse(x_t, t, s, steps, text):
    """Mean and log-std of x_s given x_t: both are Gaussian, with covariance alpha Var(x_s)."""
    t, s = t[:, None, None], s[:, None, None]
    variance_s = (1 - s) ** 2 * VARIANCE + s**2
    variance_t = (1 - t) ** 2 * VARIANCE + t**2
    shared = (1 - t) / (1 - s) * variance_s
    mean = (1 - s) * MEAN + shared / variance_t * (x_t - (1 - t) * MEAN)
    return mean, 0.5 * torch.log(variance_s - shared**2 / variance_t)


def exact_model():
    """A model whose predictor is the exact reverse and whose transporter is the identity."""
    model = NTM(NTMConfig(**TINY | dict(image_size=(1, 2), patch_size=1))).double()
    model.predictor.forward = exact_reverse
    return model


# ---------------------------------------------------------------------------------------------------------------
# Files and networks that several tests make


def network_of(name):
    """The network that a file in config/ trains, of the kind and size that train.py would give it."""
    return update.build(*update.of_config(ROOT / "config" / f"{name}.py"))


def write_idx(path, array):
    """An array as a file of the IDX format, gzipped if it is called so."""
    payload = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(payload) if path.suffix == ".gz" else payload)


class Encoder(nn.Module):
    """Means of 4x4 pixels, by channel and of all, shifted and stretched."""

    def forward(self, images):
        means = nn.functional.avg_pool2d(images, 4)
        return torch.cat([3 * means + 1, means.mean(dim=1, keepdim=True)], dim=1)
