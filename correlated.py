"""(ours) Correlated steps: a Gaussian whose covariance is diagonal plus low rank. Beyond the paper.

The paper's diagonal Gaussian draws every number of u_s on its own: it cannot move an object, or brighten an image, as a
whole. With R directions V the covariance is sigma (1 + V^T V) sigma. The density stays exact and cheap: it takes the
inverse and the determinant of an R x R matrix. docs/beyond.md has the mathematics.

NTM.predict returns this Gaussian where NTMConfig.rank is above 0.
"""

import math
from typing import NamedTuple

import torch

from predictor import sharpened, without_autocast


class CorrelatedGaussian(NamedTuple):
    """N(mean, diag(sigma) (1 + V^T V) diag(sigma)) over N tokens of D numbers; leading dimensions are a batch.

    mean, log_std (..., N, D): sigma is exp(log_std). directions: V (..., R, N, D), in units of sigma.
    """

    mean: torch.Tensor
    log_std: torch.Tensor
    directions: torch.Tensor

    def unflatten(self, sizes):
        """This Gaussian with its first dimension split into `sizes`."""
        return CorrelatedGaussian(*(part.unflatten(0, sizes) for part in self))

    @without_autocast
    def nll(self, u):
        """Eq. (29): -log N(u) in nats, (...); u like mean."""
        return self.nll_by_factors(u, *self.factors())

    @without_autocast
    def expected_nll(self, mean, std):
        """Eq. (31): the mean of nll(u) over u ~ N(mean, std^2), in nats, (...); mean (..., N, D), std (...)."""
        V, L_inv = self.factors()
        whitened = L_inv @ V
        explained = whitened.square().sum(dim=-2)
        diagonal = torch.exp(-2 * self.log_std).flatten(-2)
        precision = diagonal * (1 - explained)
        trace = precision.sum(dim=-1)
        return self.nll_by_factors(mean, V, L_inv) + 0.5 * std**2 * trace

    def factors(self):
        """V as a matrix (..., R, ND), and L^-1 (..., R, R), where L is the Cholesky factor of M = 1 + V V^T."""
        V = self.directions.flatten(-2)
        identity = torch.eye(V.shape[-2], dtype=V.dtype, device=V.device)
        M = identity + V @ V.mT
        L, _ = torch.linalg.cholesky_ex(M)  # cholesky would wait for the GPU to check for errors
        L_inv = torch.linalg.solve_triangular(L, identity, upper=False)
        return V, L_inv

    def nll_by_factors(self, u, V, L_inv):
        """Eq. (29), given the results of factors()."""
        z = (u - self.mean) * torch.exp(-self.log_std)
        z = z.flatten(-2).unsqueeze(-1)
        whitened = L_inv @ (V @ z)
        xi_hat = L_inv.mT @ whitened  # the likeliest xi, given z
        rest = z - V.mT @ xi_hat
        # a sum of squares, where z^T (1 - V^T M^-1 V) z would be the difference of two large numbers
        squares = torch.cat([rest, xi_hat], dim=-2).square()
        log_scale = self.log_std.sum(dim=(-2, -1))
        diagonal = L_inv.diagonal(dim1=-2, dim2=-1)
        half_log_det = -diagonal.log().sum(dim=-1)
        constant = 0.5 * math.log(2 * math.pi) * z.shape[-2]
        return 0.5 * squares.sum(dim=(-2, -1)) + log_scale + half_log_det + constant

    @without_autocast
    def sample(self, z, xi=None):
        """Eq. (28): mean + sigma (z + V^T xi), for standard normal z (..., N, D) and xi (..., R); None: draws xi."""
        if xi is None:
            R = self.directions.shape[-3]
            xi = torch.randn(*z.shape[:-2], R, dtype=z.dtype, device=z.device)
        z = z + torch.einsum("...rnd,...r->...nd", self.directions, xi)
        std = torch.exp(self.log_std)
        return self.mean + std * z

    def guided(self, unconditional, guidance):
        """The guided Gaussian, Eq. (20), by each number's marginal variance; V, in units of sigma, stays the same."""
        log_ratio = 2 * (self.marginal_log_std() - unconditional.marginal_log_std())
        return sharpened(self, unconditional.mean, log_ratio, guidance)

    def marginal_log_std(self):
        """Log of each number's own standard deviation, (..., N, D)."""
        of_directions = self.directions.square().sum(dim=-3)
        return self.log_std + 0.5 * torch.log1p(of_directions)
