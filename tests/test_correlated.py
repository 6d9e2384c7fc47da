"""The correlated Gaussian is the dense one, however it is computed, and all of a model knows its correlations."""
import math

import pytest
import torch
from conftest import randomize
from tiny import TINY, dense, fixed, make_gaussian, make_images, make_model, make_text, make_trajectory
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

from beyond import expected_nll
from correlated import CorrelatedGaussian
from fm import FlowMatching
from model import NTM, NTMConfig
from predictor import Gaussian


@pytest.mark.parametrize("R", [1, 3, 12, 20])
def test_density_is_that_of_the_dense_covariance(R):
    gaussian, u = make_gaussian(R), 3 * torch.randn(2, 5, 3, 4).double()
    expected = -MultivariateNormal(*dense(gaussian)).log_prob(u.flatten(-2))
    torch.testing.assert_close(gaussian.nll(u), expected, rtol=1e-8, atol=1e-8)


def test_float32_keeps_four_digits_where_directions_dominate():
    """Along a direction a thousand times as long as the standard deviation a difference of squares would lose all."""
    gaussian, u = make_gaussian(4), torch.randn(2, 5, 3, 4).double()
    for scale in 1.0, 1e3:
        wide = gaussian._replace(directions=scale * gaussian.directions)
        u = wide.sample(torch.randn(2, 5, 3, 4).double(), torch.randn(2, 5, 4).double())
        rounded = CorrelatedGaussian(*(part.float() for part in wide)).nll(u.float())
        assert ((rounded - wide.nll(u)) / wide.nll(u)).abs().max() < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("R", [0, 2])
def test_expected_nll_is_the_mean_of_nll(R):
    gaussian = make_gaussian(R, batch=())
    m, C = torch.randn(3, 4).double(), torch.tensor(0.7).double()
    nll = torch.stack([gaussian.nll(m + C * torch.randn(3, 4).double()) for _ in range(4000)])
    expected = expected_nll(gaussian, m, C)
    assert (nll.mean() - expected).abs() < 4 * nll.std() / math.sqrt(4000)
    mean, covariance = dense(gaussian)
    exact = -MultivariateNormal(mean, covariance).log_prob(m.flatten()) + 0.5 * C**2 * covariance.inverse().trace()
    torch.testing.assert_close(expected, exact)
    if R:
        torch.testing.assert_close(gaussian.expected_nll(m, C), exact)


@pytest.mark.parametrize("R", [0, 2])
def test_expected_nll_is_exact_under_bfloat16(R):
    gaussian, m, C = make_gaussian(R, dtype=torch.float32), torch.randn(2, 5, 3, 4), torch.rand(2, 5)
    exact = expected_nll(gaussian, m, C)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(expected_nll(gaussian, m, C), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_directions_that_overflow_show_in_the_loss(value):
    """Which the training loop then skips and, if it goes on, names: the factorisation raises nothing."""
    directions = torch.randn(2, 3, 4, 5)
    directions[0, 1, 2, 3] = value
    gaussian = CorrelatedGaussian(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5), directions)
    for nll in gaussian.nll(torch.ones(2, 4, 5)), gaussian.expected_nll(torch.ones(2, 4, 5), torch.ones(2)):
        assert nll.isfinite().tolist() == [False, True]


@pytest.mark.parametrize("given", [True, False])
def test_samples_have_the_covariance(given):
    gaussian = make_gaussian(2, batch=())
    along = [torch.randn(200_000, 2).double()] if given else []  # what is not given is drawn
    samples = gaussian.sample(torch.randn(200_000, 3, 4).double(), *along).flatten(1)
    mean, covariance = dense(gaussian)
    deviation = covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mean) / deviation).abs().max() < 5 / math.sqrt(200_000)
    assert ((samples.T.cov() - covariance) / torch.outer(deviation, deviation)).abs().max() < 0.02


def test_guidance_goes_by_marginal_variances():
    """Number by number as for a diagonal Gaussian of that variance; sigma shrinks, and directions, in its units, with
    it."""
    conditional, unconditional, weight = make_gaussian(2), make_gaussian(2), 1.5
    guided = conditional.guided(unconditional, weight)
    diagonal = [Gaussian(g.mean, 0.5 * dense(g)[1].diagonal(dim1=-2, dim2=-1).log().unflatten(-1, (3, 4)))
                for g in (conditional, unconditional)]
    expected = diagonal[0].guided(diagonal[1], weight)
    torch.testing.assert_close(guided.mean, expected.mean)
    shrunk = torch.exp(expected.log_std - diagonal[0].log_std)
    torch.testing.assert_close(torch.exp(guided.log_std - conditional.log_std), shrunk)
    assert torch.equal(guided.directions, conditional.directions)
    assert (shrunk < 1).any() and (shrunk == 1).any()


# ---------------------------------------------------------------------------------------------------------------
# In a model


@pytest.mark.parametrize("parametrization", ["direct", "posterior"])
def test_a_step_is_exact(parametrization):
    """The change of variables by autograd's full Jacobian, the Gaussian by its dense covariance."""
    model = make_model(rank=3, parametrization=parametrization, scale=0.5)
    (x, ts, text), steps = make_trajectory(model, batch=2), torch.full((2,), 3)
    nll = model.step_nll(x[:, 0], x[:, 1], ts[:, 0], ts[:, 1], steps, text)
    for b in range(2):
        one = slice(b, b + 1)
        J = jacobian(lambda a: model.transporter(a[None], ts[one, 0], steps[one])[0][0], x[b, 0]).reshape(24, 24)
        u_s, u_t = (model.transporter(x[one, k], ts[one, k], steps[one])[0] for k in (0, 1))
        gaussian = model.predict(u_t, ts[one, 1], ts[one, 0], steps[one], text[one])
        assert gaussian.directions.shape == (1, 3, 6, 4)
        normal = MultivariateNormal(*(part[0] for part in dense(gaussian)))
        exact = -normal.log_prob(u_s.flatten()) - torch.linalg.slogdet(J)[1]
        torch.testing.assert_close(nll[b], exact, rtol=1e-8, atol=1e-8)


def test_a_models_float32_likelihood_keeps_four_digits():
    model = make_model(rank=3)
    x, ts, text = make_trajectory(model, batch=4)
    exact = model.trajectory_nll(x, ts, text).sum(1)
    rounded = model.float().trajectory_nll(x.float(), ts.float(), text).sum(1)
    assert ((rounded - exact) / exact).abs().max() < 1e-4


def test_sampling_is_the_gaussians_own():
    model, text = make_model(rank=2), make_text(3)
    ts = model.config.time_grid(0.02, 4).double()
    noise, along = torch.randn(3, 5, 6, 4).double(), torch.randn(3, 4, 2).double()
    u = model.sample(text, ts, randn=fixed(noise, along))
    for k in range(4):
        mean, log_std, V = model.predict(u[:, k + 1], ts[k + 1].expand(3), ts[k].expand(3), torch.full((3,), 4), text)
        expected = mean + log_std.exp() * (noise[:, k] + (V * along[:, k, :, None, None]).sum(1))
        torch.testing.assert_close(u[:, k], expected)
    one, same = (model.sample(text, ts, 2.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, same) and not torch.equal(one[:1], one[1:2])


def test_directions_start_small_and_learn():
    model = NTM(NTMConfig(**TINY, rank=4))
    u, step = torch.randn(2, 6, 4), (torch.full((2,), 0.5), torch.full((2,), 0.2), torch.full((2,), 4))
    mean, log_std, V = model.predict(u, *step, make_text(2))
    assert mean.abs().max() == log_std.abs().max() == 0 and 0 < V.abs().max() < 0.05
    model(make_images(2), make_text(2)).backward()
    assert (model.predictor.head.weight.grad[2 * 4:] != 0).any()


def test_flow_matching_hands_its_mean_over_whatever_the_rank():
    network, model = randomize(FlowMatching(NTMConfig(**TINY))), {}
    u, step = torch.randn(2, 6, 4), (torch.full((2,), 0.5), torch.full((2,), 0.2), torch.full((2,), 4))
    for rank in 0, 3:
        model[rank] = NTM(NTMConfig(**TINY, rank=rank, parametrization="posterior"))
        directions = model[rank].predictor.head.weight[2 * 4:].clone()
        network.hand_over(model[rank].predictor)
        assert torch.equal(model[rank].predictor.head.weight[2 * 4:], directions)
    text = make_text(2)
    plain, correlated = (model[rank].predict(u, *step, text) for rank in (0, 3))
    torch.testing.assert_close(correlated[:2], plain)
