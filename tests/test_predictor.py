"""The Gaussian of a step is the dense one, however it is computed, and every part of a model knows its correlations."""
import math

import pytest
import torch
from conftest import randomize
from test_fm import TINY as TINY_FM
from test_model import make_images, make_model, make_text, make_trajectory
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

import train
from configurator import Settings
from flow import forward_trajectory, reverse_posterior, rotated
from fm import FlowMatching
from model import NTM, NTMConfig
from predictor import Gaussian, rotations


def make_gaussian(R, batch=(2, 5), dtype=torch.float64):
    """Of 3 tokens of 4 numbers, along its directions as uncertain as in each number."""
    directions = torch.randn(*batch, R, 3, 4, dtype=dtype) if R else None
    return Gaussian(torch.randn(*batch, 3, 4, dtype=dtype), torch.randn(*batch, 3, 4, dtype=dtype), directions)


def dense(gaussian):
    """Mean (..., ND) and covariance (..., ND, ND)."""
    std = torch.diag_embed(torch.exp(gaussian.log_std).flatten(-2))
    covariance = std @ std
    if gaussian.directions is not None:
        V = gaussian.directions.flatten(-2) @ std
        covariance = covariance + V.mT @ V
    return gaussian.mean.flatten(-2), covariance


@pytest.mark.parametrize("R", [0, 1, 3, 12, 20])
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
        rounded = Gaussian(*(part.float() for part in wide)).nll(u.float())
        assert ((rounded - wide.nll(u)) / wide.nll(u)).abs().max() < 1e-4


@pytest.mark.parametrize("R", [0, 2])
def test_expected_nll_is_the_mean_of_nll(R):
    gaussian = make_gaussian(R, batch=())
    m, C = torch.randn(3, 4).double(), torch.tensor(0.7).double()
    nll = torch.stack([gaussian.nll(m + C * torch.randn(3, 4).double()) for _ in range(4000)])
    assert (nll.mean() - gaussian.expected_nll(m, C)).abs() < 4 * nll.std() / math.sqrt(4000)
    mean, covariance = dense(gaussian)
    exact = -MultivariateNormal(mean, covariance).log_prob(m.flatten()) + 0.5 * C**2 * covariance.inverse().trace()
    torch.testing.assert_close(gaussian.expected_nll(m, C), exact)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_directions_that_overflow_show_in_the_loss(value):
    """Which the training loop then skips and, if it goes on, names: the factorisation raises nothing."""
    directions = torch.randn(2, 3, 4, 5)
    directions[0, 1, 2, 3] = value
    gaussian = Gaussian(torch.zeros(2, 4, 5), torch.zeros(2, 4, 5), directions)
    for nll in gaussian.nll(torch.ones(2, 4, 5)), gaussian.expected_nll(torch.ones(2, 4, 5), torch.ones(2)):
        assert nll.isfinite().tolist() == [False, True]


def test_samples_have_the_covariance():
    gaussian = make_gaussian(2, batch=())
    samples = gaussian.sample(torch.randn(200_000, 3, 4).double(), torch.randn(200_000, 2).double()).flatten(1)
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
        mean, log_std, S = model.predict(u_t, ts[one, 1], ts[one, 0], steps[one], text[one])
        assert S.shape == (1, 3, 6, 4)
        gaussian = MultivariateNormal(*(part[0] for part in dense(Gaussian(mean, log_std, S))))
        exact = -gaussian.log_prob(u_s.flatten()) - torch.linalg.slogdet(J)[1]
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
    u = model.sample(text, ts, noise=noise, randn=lambda *shape: along)
    for k in range(4):
        mean, log_std, S = model.predict(u[:, k + 1], ts[k + 1].expand(3), ts[k].expand(3), torch.full((3,), 4), text)
        expected = mean + log_std.exp() * (noise[:, k] + (S * along[:, k, :, None, None]).sum(1))
        torch.testing.assert_close(u[:, k], expected)
    one, same = (model.sample(text, ts, 2.0, torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(one, same) and not torch.equal(one[:1], one[1:2])


def test_directions_start_small_and_learn():
    model = NTM(NTMConfig(**TINY_FM, rank=4))
    u, step = torch.randn(2, 6, 4), (torch.full((2,), 0.5), torch.full((2,), 0.2), torch.full((2,), 4))
    mean, log_std, S = model.predict(u, *step, make_text(2))
    assert mean.abs().max() == log_std.abs().max() == 0 and 0 < S.abs().max() < 0.05
    model(torch.rand(2, 1, 4, 6), make_text(2)).backward()
    assert (model.predictor.head.weight.grad[2 * 4:] != 0).any()


def test_flow_matching_hands_its_mean_over_whatever_the_rank():
    network, model = randomize(FlowMatching(NTMConfig(**TINY_FM))), {}
    u, step = torch.randn(2, 6, 4), (torch.full((2,), 0.5), torch.full((2,), 0.2), torch.full((2,), 4))
    for rank in 0, 3:
        model[rank] = NTM(NTMConfig(**TINY_FM, rank=rank, parametrization="posterior"))
        network.hand_over(model[rank].predictor)
    text = make_text(2)
    plain, correlated = (model[rank].predict(u, *step, text) for rank in (0, 3))
    torch.testing.assert_close(correlated[:2], plain)


# ---------------------------------------------------------------------------------------------------------------
# Training


def test_weights_are_a_power_of_the_level_over_its_mean():
    model, plain = make_model(steps=(2, 4), level_weight=2.0, pairs=True), make_model(steps=(2, 4), pairs=True)
    images, text = make_images(6).double(), make_text(6)
    plain.load_state_dict(model.state_dict())
    steps, ts, noise = model.randomness(6)
    x = forward_trajectory(model.patchify(images), ts, noise=noise)
    nll = model.transitions(x, ts, text, steps)[0][:, 0] / 24
    means = {T: sum(s**2 for s in [0.025, *(k / T for k in range(1, T))]) / T for T in (2, 4)}  # TINY's grid is k/T
    expected = sum(ts[b, 0] ** 2 / means[steps[b].item()] * nll[b] for b in range(6)) / 6
    parts = model(images, text, (steps, ts, noise), parts=True)
    torch.testing.assert_close(parts["objective"], expected)
    torch.testing.assert_close(model(images, text, (steps, ts, noise)), expected)
    torch.testing.assert_close(parts["nll"], plain(images, text, (steps, ts, noise)))
    assert (expected - parts["nll"]).abs() > 0.01


@pytest.mark.parametrize("level_weight", [0.0, 1.0])
def test_what_is_logged_has_no_weights(level_weight):
    model = make_model(level_weight=level_weight, dtype=torch.float32)
    images, text, randomness = make_images(4), make_text(4), model.randomness(4)
    settings = Settings(level_weight=level_weight, velocity_weight=0.0)
    losses = train.training_losses(model, None, images, text, randomness, settings, 0)
    plain = make_model(dtype=torch.float32)
    plain.load_state_dict(model.state_dict())
    torch.testing.assert_close(losses["loss"], plain(images, text, randomness))
    assert ("objective" in losses) == bool(level_weight)


@pytest.mark.parametrize("pairs", [True, False])
def test_closed_form_is_the_mean_of_the_sampled_loss(pairs):
    settings = dict(transporter_blocks=0, rank=2, pairs=pairs, parametrization="posterior", scale=0.3)
    sampled, closed = make_model(**settings), make_model(**settings, closed_form=True)
    closed.load_state_dict(sampled.state_dict())
    images, text = make_images(1).double(), make_text(1)
    steps, ts, noise = closed.randomness(1)
    noise = noise.double()
    x0, ts = closed.patchify(images), ts.double()
    if not pairs:  # the last step of it
        ts, noise = ts[:, :2], noise[:, :2]
    x_t = forward_trajectory(x0, ts, noise=noise)[:, 1:]
    A, B, C = (a[..., None, None] for a in reverse_posterior(ts[:, 1:], ts[:, :-1]))
    many = 4000
    x_s = A * x_t + B * x0[:, None] + C * torch.randn(many, 1, 6, 4).double()
    x = torch.cat([x_s, x_t.expand(many, -1, -1, -1)], dim=1)
    nll = sampled.transitions(x, ts.expand(many, -1), text.expand(many, -1), steps.expand(many))[0][:, 0] / 24
    expected = closed(images, text, (steps, ts, noise))
    assert (nll.mean() - expected).abs() < 4 * nll.std() / math.sqrt(many)


def test_closed_form_needs_a_model_without_a_transporter():
    with pytest.raises(ValueError, match="closed_form is True, which needs transporter_blocks 0, not 2"):
        NTMConfig(closed_form=True, transporter_blocks=2)
    with pytest.raises(ValueError, match="velocity_weight is 0.5, which needs closed_form True"):
        NTMConfig(velocity_weight=0.5)


def test_rotary_positions_are_distances():
    """Products of a rotated query and key: those of words by how far apart they are in the caption, of patches by rows
    and columns; and no two of them alike."""
    L, rows, columns, pairs = 5, 4, 3, 6
    rotation = rotations(L, rows, columns, pairs).double()
    q, k = torch.randn(2, 2 * pairs).double()
    products = torch.einsum("nd,md->nm", *(rotated(a.expand(L + rows * columns, -1), rotation) for a in (q, k)))
    torch.testing.assert_close(products[:L, :L][1:, 1:], products[:L, :L][:-1, :-1], atol=1e-5, rtol=0)
    patches = products[L:, L:].view(rows, columns, rows, columns)
    torch.testing.assert_close(patches[1:, 1:, 1:, 1:], patches[:-1, :-1, :-1, :-1], atol=1e-5, rtol=0)
    distances = torch.cat([products[0, 1:L], patches[0, 0].flatten()])
    assert (distances[:, None] - distances).abs().add(torch.eye(len(distances))).min() > 1e-4


def test_width_of_an_odd_head_is_named():
    with pytest.raises(ValueError, match="width 15 is not divisible by twice 3 heads"):
        NTM(NTMConfig(width=15, heads=3))
