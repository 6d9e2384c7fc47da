"""What we add to the paper: each loss, each way to sample and each model against the formula that it stands for."""
import math
from collections import Counter

import pytest
import torch
from conftest import randomize
from tiny import (TINY, changed, exact_model, fixed, levels_mean_and_covariance, levels_of, make_coupled, make_images,
                  make_model, make_text, make_trajectory)
from torch.autograd.functional import jacobian
from torch.distributions import Normal

from beyond import (CoupledConfig, CoupledNTM, DenoiserConfig, ResidualDenoiser, TarFlow, cooled, expected_nll,
                    guided_log_density, known_step, level_weights, restarted_steps, sample_with_restarts,
                    velocity_error)
from flow import forward_kernel, forward_trajectory, reverse_posterior, time_grid
from fm import FlowMatching
from model import NTM, Denoiser, NTMConfig, noise_source
from pixels import PixelConfig
from predictor import Gaussian, null_caption
from start import take_weights

# ---------------------------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("max_t_min, middle", [(0.05, 0.025), (0.03, 0.015), (0.0, 0.01)])
def test_weights_are_a_power_of_the_level_over_its_mean(pairs, max_t_min, middle):
    model, power = make_model(steps=(2, 4)), 2.0
    steps, ts = model.draw_pairs(6, max_t_min) if pairs else model.draw_trajectories(6, max_t_min)
    weights = level_weights(model.config, power, ts, steps, max_t_min)
    means = {T: sum(s**2 for s in [middle, *(k / T for k in range(1, T))]) / T for T in (2, 4)}  # TINY's grid is k/T
    assert weights.shape == (6, ts.shape[1] - 1)
    for b in range(6):
        s = ts[b, :-1] if max_t_min else ts[b, :-1].clamp(min=middle)  # at s = 0 the last step would never be trained
        torch.testing.assert_close(weights[b], s**2 / means[steps[b].item()])
    assert (weights > 0).all()


def test_weights_have_mean_one_over_the_grid_and_none_are_ones():
    config = NTMConfig(**TINY)
    ts, steps = config.time_grid(0.025)[None], torch.tensor([4])
    for power in (0.0, 0.5, 3.0):
        torch.testing.assert_close(level_weights(config, power, ts, steps, 0.05).mean(), torch.tensor(1.0))
    assert (level_weights(config, 0.0, ts, steps, 0.05) == 1).all()


def closed_form(model, images, text, levels):
    """Eq. (31) for the steps of a batch, (B, K-1), as training has it."""
    steps, ts, x = levels
    gaussian = model.predict_all(x, ts, steps, text)
    return expected_nll(gaussian, *known_step(model, x, model.patchify(images), ts))


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("pairs", [True, False])
def test_closed_form_is_the_mean_of_the_sampled_loss(pairs, rank):
    model = make_model(transporter_blocks=0, rank=rank, parametrization="posterior", scale=0.3)
    images, text, many = make_images(1).double(), make_text(1), 4000
    steps, ts = model.draw_pairs(1) if pairs else model.draw_trajectories(1)
    levels = steps, ts, x = levels_of(model, images, text, steps, ts[:, :2])  # of a trajectory the last step
    A, B, C = (a[..., None, None] for a in reverse_posterior(ts[:, 1:], ts[:, :-1]))
    x_t = x[:, 1:]
    x_s = A * x_t + B * model.patchify(images)[:, None] + C * torch.randn(many, 1, 6, 4).double()
    drawn = torch.cat([x_s, x_t.expand(many, -1, -1, -1)], dim=1)
    nll = model.transition_nll(drawn, ts.expand(many, -1), steps.expand(many), text.expand(many, -1))[:, 0]
    expected = closed_form(model, images, text, levels)
    assert expected.shape == (1, 1)
    assert (nll.mean() - expected).abs() < 4 * nll.std() / math.sqrt(many)


def test_closed_form_of_a_trajectory_is_that_of_its_pairs():
    model, images, text = make_model(transporter_blocks=0, parametrization="posterior"), make_images(3), make_text(3)
    steps, ts, x = levels_of(model, images.double(), text, *model.draw_trajectories(3))
    whole = closed_form(model, images, text, (steps, ts, x))
    assert whole.shape == (3, 4)
    for k in range(4):
        pair = closed_form(model, images, text, (steps, ts[:, k:k + 2], x[:, k:k + 2]))
        torch.testing.assert_close(whole[:, k:k + 1], pair)


@pytest.mark.parametrize("pairs", [True, False])
def test_error_of_the_velocity_is_the_loss_of_flow_matching(pairs):
    """That of the network an NTM starts from, at the times of the grid and with the noise that each level holds."""
    network = randomize(FlowMatching(NTMConfig(**TINY)).double(), 0.5)
    model = make_model(transporter_blocks=0, parametrization="posterior")
    network.hand_over(model.predictor)
    images, text = make_images(3).double(), make_text(3)
    steps, ts = model.draw_pairs(3) if pairs else model.draw_trajectories(3)
    steps, ts, x = levels_of(model, images, text, steps, ts)
    x0 = model.patchify(images)
    losses = [network(images, text, (t, (x_t - (1 - t[:, None, None]) * x0) / t[:, None, None]))
              for t, x_t in zip(ts[:, 1:].T, x[:, 1:].transpose(0, 1))]
    mean, _ = known_step(model, x, x0, ts)
    found = velocity_error(model.predict_all(x, ts, steps, text), mean, ts)
    torch.testing.assert_close(found, torch.stack(losses).mean())
    assert losses[0] > 0.1


# ---------------------------------------------------------------------------------------------------------------
# Ways to sample


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("T, steps", [(4, [1, 2]), (3, [1]), (2, [1])])
def test_guided_density_is_of_the_middle_steps(guidance, T, steps):
    """(1 + w) log p(x | y) - w log p(x), by trajectory_nll, a trajectory at a time. Of two steps it is the first."""
    model = make_model(steps=T)
    x0, ts, text = torch.randn(3, 6, 4).double(), model.config.time_grid(0.02).double(), make_text(3)
    noise = torch.randn(2, T + 1, 6, 4).double()
    expected = 0
    for drawn in noise:
        x, times = forward_trajectory(x0, ts.expand(3, -1), noise=drawn.expand(3, -1, -1, -1)), ts.expand(3, -1)
        given, alone = (-model.trajectory_nll(x, times, caption)[:, steps].sum(dim=1)
                        for caption in (text, null_caption(text)))
        expected = expected + ((1 + guidance) * given - guidance * alone) / 2
    torch.testing.assert_close(guided_log_density(model, x0, text, ts, guidance, noise), expected)


@pytest.mark.parametrize("steps, repeated", [(1, []), (2, []), (3, [1]), (4, [2]), (5, [2, 3]), (8, [4, 5, 6])])
def test_restarts_are_of_the_first_half_but_the_first(steps, repeated):
    assert list(restarted_steps(steps)) == repeated


@pytest.mark.parametrize("t_min, restarts", [(0.0, 0), (0.04, 0), (0.04, 1), (0.04, 2)])
def test_restarts_of_an_exact_reverse_leave_the_exact_trajectories(t_min, restarts):
    """All levels together."""
    ts, drawn = time_grid(4, torch.tensor(t_min).double(), 2, 1.0), 0
    draws = 5 + restarts * (2 + 1)  # the levels' noise; of the second step that of the levels above, and its own

    def randn(*shape):
        nonlocal drawn
        if shape[-1] == 0:
            return torch.zeros(draws + 1, *shape).double()  # there are no directions
        noise = torch.zeros(draws + 1, *shape).double()
        count = shape[0] if len(shape) == 3 else 1
        # sampling is affine in the noise: example k has unit noise in draw k only, the last none
        noise.view(draws + 1, count, -1)[torch.arange(drawn, drawn + count), torch.arange(count)] = 1
        drawn += count
        return noise

    x = sample_with_restarts(exact_model(), make_text(draws + 1), ts, restarts, randn=randn)[..., 0]
    assert drawn == draws
    mean, factor = x[draws].T, (x[:draws] - x[draws]).permute(2, 1, 0)
    expected_mean, expected_cov = levels_mean_and_covariance(ts)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(factor @ factor.mT, expected_cov)


@pytest.mark.parametrize("guidance", [0.0, 1.5])
@pytest.mark.parametrize("rank", [0, 2])
def test_without_restarts_it_is_sampling(rank, guidance):
    model, text = make_model(scale=0.5, rank=rank), make_text(2)
    ts = model.config.time_grid(0.02).double()
    noise, along = torch.randn(2, 5, 6, 4).double(), torch.randn(2, 4, rank).double()
    plain = model.sample(text, ts, guidance, randn=fixed(noise.clone(), along))
    torch.testing.assert_close(sample_with_restarts(model, text, ts, 0, guidance, randn=fixed(noise, along)), plain)
    one, same, other = (sample_with_restarts(model, text, ts, 1, generator=torch.Generator().manual_seed(seed))
                        for seed in (3, 3, 4))
    assert torch.equal(one, same) and not torch.equal(one, other)


@torch.no_grad()
@pytest.mark.parametrize("restarts", [1, 2])
def test_a_restart_adds_the_noise_in_x_space(restarts):
    """And repeats the step from the level that this leads to, with noise of its own."""
    model, text = make_model(scale=0.5, rank=2), make_text(2)
    ts = torch.tensor([0.02, 0.3, 0.6, 1.0]).double()
    first, along = torch.randn(2, 4, 6, 4).double(), torch.randn(2, 3, 2).double()
    rounds = [(torch.randn(2, 2, 6, 4).double(), torch.randn(2, 6, 4).double(), torch.randn(2, 2).double())
              for _ in range(restarts)]
    once = model.sample(text, ts, 1.0, randn=fixed(first.clone(), along))
    draws = [first.clone(), along, *(draw for of_one in rounds for draw in of_one)]
    again = sample_with_restarts(model, text, ts, restarts, 1.0, randn=fixed(*draws))
    assert (model.invert(once, ts) - once).abs().max() > 0.1  # the transporter is no identity

    u = once[:, 1]
    for noise, z, w in rounds:
        x = [model.transporter.inverse(u, ts[1].expand(2), torch.tensor([3, 3]))]
        for k in (2, 3):
            alpha, beta = forward_kernel(ts[k], ts[k - 1])
            x.append(alpha * x[-1] + beta * noise[:, k - 2])
        u_2 = model.transporter(x[1], ts[2].expand(2), torch.tensor([3, 3]))[0]
        u = model.step(u_2, ts[2], ts[1], 3, text, 1.0).sample(z, w)
    torch.testing.assert_close(again[:, 3], x[2])
    torch.testing.assert_close(again[:, 2], u_2)
    torch.testing.assert_close(again[:, 1], u)
    last = model.step(u, ts[1], ts[0], 3, text, 1.0).sample(first[:, 0], along[:, 0])
    torch.testing.assert_close(again[:, 0], last)
    assert (again[:, 1] - once[:, 1]).abs().max() > 0.1


# ---------------------------------------------------------------------------------------------------------------
# A first step that keeps its noise: Eqs. (35) and (36), the bound they leave, and training on them

GAUSSIAN_MEAN, GAUSSIAN_STD = 0.3, 0.4  # of Gaussian data


def drawn(model, x0, ts, text, noise=None):
    """A trajectory of q, x_1 included."""
    return model.couple(forward_trajectory(x0, ts, noise=noise), ts, text)


def exact_velocity(u, t, s, steps, text):
    """noise - E[x_0 | x_t] of Gaussian data, and no correction to the scale."""
    t = t[:, None, None]
    variance = (1 - t) ** 2 * GAUSSIAN_STD**2 + t**2
    x0 = GAUSSIAN_MEAN + (1 - t) * GAUSSIAN_STD**2 / variance * (u - (1 - t) * GAUSSIAN_MEAN)
    return (u - x0) / t, torch.zeros_like(u)


@pytest.fixture
def exact(monkeypatch):
    model = make_coupled(rank=0)
    monkeypatch.setattr(model.predictor, "forward", exact_velocity)
    return model


def test_the_coupled_model_overrides_what_it_must_and_no_more():
    own = {name for name in vars(CoupledNTM) if not name.startswith("__")}
    assert {name for name in own if hasattr(NTM, name)} == {
        "config_class", "posterior", "noised", "trajectory_bound", "draw_pairs", "denoising_nll", "score_denoise"}
    assert own - {name for name in own if hasattr(NTM, name)} == {
        "couple", "flowed_to_noise", "noised_pairs", "velocity"}
    assert issubclass(CoupledConfig, NTMConfig)
    assert set(CoupledConfig.__dataclass_fields__) - set(PixelConfig.__dataclass_fields__) == {"first_noise"}


def test_with_nothing_but_noise_of_its_own_it_is_the_plain_model():
    coupled = make_coupled(first_noise=1.0)
    plain = make_model(transporter_blocks=0, parametrization="posterior", rank=2, depth=1)
    plain.load_state_dict(coupled.state_dict())
    images, text = make_images(6).double(), make_text(6)
    x0, ts = plain.patchify(images), plain.config.time_grid(0.02).double().expand(6, -1)
    noise = torch.randn(6, 5, 6, 4).double()
    x = plain.noised(x0, text, ts, noise)
    torch.testing.assert_close(coupled.noised(x0, text, ts, noise), x)
    for a, b in zip(coupled.trajectory_bound(x, ts, text), plain.trajectory_bound(x, ts, text)):
        torch.testing.assert_close(a, b)
    levels = torch.full((6,), 4), ts, x
    torch.testing.assert_close(coupled(images, text, levels), plain(images, text, levels))
    u, along = torch.randn(6, 5, 6, 4).double(), torch.randn(6, 4, 2).double()
    both = [model.sample(text, ts[0], 1.0, randn=fixed(u, along)) for model in (coupled, plain)]
    torch.testing.assert_close(*both)


@pytest.mark.parametrize("level", [0.5, 0.75, 0.9])
def test_the_flow_carries_gaussian_data_to_its_noise(exact, level):
    """Where the velocity is exact, x_s = (1 - s) m + sqrt((1 - s)^2 v + s^2) z flows to z."""
    s, z = torch.full((5,), level).double(), torch.randn(5, 6, 4).double()
    x = (1 - level) * GAUSSIAN_MEAN + math.hypot((1 - level) * GAUSSIAN_STD, level) * z
    torch.testing.assert_close(exact.flowed_to_noise(x, s, make_text(5)), z, atol=0.003, rtol=0.003)
    levels, ts = torch.stack([x, torch.full_like(x, 10)], dim=1), torch.stack([s, torch.ones_like(s)], dim=1)
    x = exact.couple(levels, ts, make_text(5))
    torch.testing.assert_close(x[:, 1], math.sqrt(1 - 0.2**2) * z + 0.2 * 10, atol=0.003, rtol=0.003)


def test_the_flow_is_the_estimates_of_each_level():
    """Two midpoint steps, of a velocity asked for as the model is trained on it: from t to s t."""
    model, x, text = make_coupled(), torch.randn(3, 6, 4).double(), make_text(3)
    s = torch.tensor([0.3, 0.5, 0.75]).double()

    def velocity(x, t):  # x_0 = x - t v is where the mean of Eq. (25) points
        A, B, _ = (a[:, None, None] for a in reverse_posterior(t, s * t))
        mean = model.predict(x, t, s * t, torch.full((3,), 4), text).mean
        return (x - (mean - A * x) / B) / t[:, None, None]

    h, expected = ((1 - s) / 2)[:, None, None], x
    for t in (s, (1 + s) / 2):
        expected = expected + h * velocity(expected + h / 2 * velocity(expected, t), t + (1 - s) / 4)
    torch.testing.assert_close(model.flowed_to_noise(x, s, text), expected)


def test_only_a_last_level_of_pure_noise_is_coupled():
    model, x0, text = make_coupled(), torch.randn(4, 6, 4).double(), make_text(4)
    ts = torch.tensor([[0.5, 0.75], [0.75, 1], [0.25, 0.5], [0.75, 1]]).double()
    noise = torch.randn(4, 2, 6, 4).double()
    fresh, coupled = forward_trajectory(x0, ts, noise=noise), drawn(model, x0, ts, text, noise)
    assert torch.equal(coupled[:, 0], fresh[:, 0]) and torch.equal(coupled[::2], fresh[::2])
    correlations = [torch.corrcoef(torch.stack([levels[1::2, 1].flatten(), noise[1::2, 1].flatten()]))[0, 1]
                    for levels in (fresh, coupled)]
    assert correlations[0] > 0.999 and correlations[1] < 0.7
    plain = make_coupled(first_noise=1.0)
    assert torch.equal(drawn(plain, x0, ts, text, noise), fresh)


def test_the_bound_counts_what_the_last_level_tells(monkeypatch):
    """-log p(x_{t_0:T}) + log q(x_{t_1:T} | x_{t_0}), each factor by torch's own normal distribution."""
    model, text = make_coupled(), make_text(3)
    ts = time_grid(4, 0.02, 6, shift=1.0).double().expand(3, -1)
    fresh = forward_trajectory(torch.randn(3, 6, 4).double(), ts)
    x, (nll, bound) = model.couple(fresh, ts, text), model.trajectory_bound(fresh, ts, text)
    log_q = 0
    for k in range(3):
        alpha = (1 - ts[0, k + 1]) / (1 - ts[0, k])
        beta = (ts[0, k + 1] ** 2 - alpha**2 * ts[0, k] ** 2).sqrt()
        log_q = log_q + Normal(alpha * x[:, k], beta).log_prob(x[:, k + 1]).sum(dim=(1, 2))
    mean = math.sqrt(1 - 0.2**2) * model.flowed_to_noise(x[:, 3], ts[:, 3], text)
    log_q = log_q + Normal(mean, 0.2).log_prob(x[:, 4]).sum(dim=(1, 2))
    torch.testing.assert_close(bound, nll.sum(dim=1) + log_q)
    torch.testing.assert_close(nll, model.trajectory_nll(x, ts, text))
    flowed, calls = model.flowed_to_noise, []
    monkeypatch.setattr(model, "flowed_to_noise", lambda *args: calls.append(1) or flowed(*args))
    model.trajectory_bound(fresh, ts, text)
    assert len(calls) == 1  # to draw x_1: its density is that of the noise it was drawn from


def test_the_bound_stays_above_the_truth_and_touches_it(exact):
    """Gaussian data and T = 1: if every p(x_s | x_1) is the reverse of q the bound is -log p(x_s) for any x; with the
    network's deviation too large it is above by as much as it should be."""
    n, c = 400, 0.2
    x0, text = GAUSSIAN_MEAN + GAUSSIAN_STD * torch.randn(n, 6, 4).double(), make_text(n)
    ts = torch.tensor([[0.75, 1.0]]).double().expand(n, 2)
    x = forward_trajectory(x0, ts)
    scale = math.hypot(0.25 * GAUSSIAN_STD, 0.75)
    truth = -Normal(0.25 * GAUSSIAN_MEAN, scale).log_prob(x[:, 0]).sum(dim=(1, 2))

    def bound(std):
        def predict(u, *_):
            mean = 0.25 * GAUSSIAN_MEAN + scale * math.sqrt(1 - c**2) * u
            return Gaussian(mean, torch.full_like(u, math.log(std)))
        exact.predict = predict
        return exact.trajectory_bound(x, ts, text)[1]

    torch.testing.assert_close(bound(scale * c), truth, atol=0.02, rtol=0)
    surplus = (bound(2 * scale * c) - truth).mean().item() / 24
    assert surplus == pytest.approx(math.log(2) - 0.5 * (1 - 1 / 4), abs=0.02)


def test_at_the_start_the_first_step_is_eulers():
    """Of a velocity that is not trained yet on it: x_s = x_1 - (1 - s) v, but for c."""
    model, c = make_coupled(), 0.2
    x, one, text = torch.randn(3, 6, 4).double(), torch.ones(3).double(), make_text(3)
    mean, log_std, _ = model.predict(x, one, one * 0.75, torch.full((3,), 4), text)
    v, rho, *_ = model.predictor(x, one, one * 0.75, torch.full((3,), 4), text)
    torch.testing.assert_close(mean, 0.75 * math.sqrt(1 - c**2) * x + 0.25 * (x - v))
    torch.testing.assert_close(log_std, math.log(c * 0.75) + rho * 0.5 * math.log(1 + (0.25 / (c * 0.75)) ** 2))


def test_only_the_first_step_knows_the_noise():
    model = make_coupled()
    t, s = torch.tensor([1.0, 0.75, 0.5, 1.0]).double(), torch.tensor([0.75, 0.5, 0.02, 0.3]).double()
    coupled, plain = model.posterior(t, s), reverse_posterior(t, s)
    for a, b in zip(coupled, plain):
        assert torch.equal(a[1:3], b[1:3])
    for b in (0, 3):
        expected = math.sqrt(1 - 0.2**2) * s[b], 1 - s[b], 0.2 * s[b]
        torch.testing.assert_close(torch.stack([a[b] for a in coupled]), torch.stack(expected))


def test_a_batch_has_as_many_of_each_pair_and_of_the_flows():
    model = make_coupled()
    steps, ts = model.draw_pairs(50, 0.04, generator=torch.Generator().manual_seed(0))
    assert ts.shape == (50, 2) and steps.tolist() == [4] * 50
    grid = [tuple(pair) for pair in ts.tolist() if pair[1] in (0.25, 0.5, 1.0) or pair == [0.5, 0.75]]
    flow = [tuple(pair) for pair in ts.tolist() if tuple(pair) not in grid]
    assert len(grid) == 40 and len(flow) == 10 and sum(t == 1 for _, t in grid) == 10
    assert {t for _, t in flow} == {0.75, 0.8125, 0.875, 0.9375} and all(s == 0.75 * t for s, t in flow)
    starts = [s for s, t in grid if t == 0.25]
    assert len(starts) == 10 and 0 < min(starts) and max(starts) <= 0.04
    _, ts = model.draw_pairs(4000)
    assert 0.045 < ts[ts[:, 1] == 0.25, 0].max() <= 0.05


def test_of_each_example_any_pair_or_flow():
    model, firsts = make_coupled(), Counter()
    for _ in range(300):
        _, ts = model.draw_pairs(5)
        first_is_flow = ts[0, 1] != 1 and ts[0, 1] >= 0.75 and ts[0, 0] != 0.5
        firsts["flow" if first_is_flow else ts[0, 1].item()] += 1
    assert firsts.keys() == {0.25, 0.5, 0.75, 1.0, "flow"}
    assert min(firsts.values()) > 30  # 60 expected, with a standard deviation of 7


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 3, 23, 50])
def test_training_couples_every_example_that_ends_at_noise_and_no_other(batch, steps):
    """Found without a look at the times, for that would wait for a GPU: as many as a batch may have."""
    model, x0, text = make_coupled(steps=steps), torch.randn(batch, 6, 4).double(), make_text(batch)
    for seed in range(5):
        _, ts = model.draw_pairs(batch, generator=torch.Generator().manual_seed(seed))
        ts, noise = ts.double(), torch.randn(batch, 2, 6, 4).double()
        x = model.noised_pairs(x0, text, ts, noise)
        torch.testing.assert_close(x, drawn(model, x0, ts, text, noise))
        torch.testing.assert_close(model.noised(x0, text, ts, noise), x)
        fresh, ends = forward_trajectory(x0, ts, noise=noise), ts[:, -1] == 1
        assert changed(x, fresh) == {(b, 1) for b in ends.nonzero()[:, 0].tolist()}


@pytest.mark.parametrize("own, steps", [(4, 4), (4, 3), (4, 2), (4, 1), (2, 2), (1, 1)])
def test_whole_trajectories_are_coupled_whatever_their_steps(own, steps):
    """Of a model that has its own number of steps."""
    model, x0, text = make_coupled(steps=own), torch.randn(5, 6, 4).double(), make_text(5)
    ts = time_grid(steps, 0.02, 6, shift=1.0).double().expand(5, -1)
    noise = torch.randn(5, steps + 1, 6, 4).double()
    x, fresh = model.noised(x0, text, ts, noise), forward_trajectory(x0, ts, noise=noise)
    torch.testing.assert_close(x, drawn(model, x0, ts, text, noise))
    assert changed(x, fresh) == {(b, steps) for b in range(5)}
    assert not x.requires_grad


@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_of_the_first_step_is_of_levels_as_drawn(rank):
    """Elsewhere closed form; there -log p(x_s | x_1) itself."""
    model, images, text = make_coupled(rank=rank), make_images(6).double(), make_text(6)
    x0, steps = model.patchify(images), torch.full((6,), 4)
    ts = torch.tensor([[0.75, 1], [0.5, 0.75], [0.02, 0.25]] * 2).double()
    x = drawn(model, x0, ts, text)
    nll = model.step_nll(x[:, 0], x[:, 1], ts[:, 0], ts[:, 1], steps, text)
    found = closed_form(model, images, text, (steps, ts, x))[:, 0]
    torch.testing.assert_close(found[::3], nll[::3])
    A, B, C = reverse_posterior(ts[:, 1], ts[:, 0])
    mean, std = known_step(model, x, x0, ts)
    expected = A[:, None, None] * x[:, 1] + B[:, None, None] * x0
    expected[::3], C[::3] = x[::3, 0], 0
    torch.testing.assert_close(mean[:, 0], expected)
    torch.testing.assert_close(std[:, 0], C)
    plain = known_step(make_model(transporter_blocks=0), x, x0, ts)
    torch.testing.assert_close(plain[0][1::3, 0], expected[1::3])
    assert (plain[1] > 0).all() and (plain[0][::3, 0] - expected[::3]).abs().max() > 0.1


@pytest.mark.parametrize("steps", [2, 4])
def test_score_denoising_is_of_the_steps_before_a_coupled_one(steps):
    """As if x_1 were not there: E[x_0 | the other levels]."""
    model, x0, text = make_coupled(), torch.randn(3, 6, 4).double(), make_text(3)
    ts = time_grid(steps, 0.02, 6, shift=1.0).double().expand(3, -1)
    x = drawn(model, x0, ts, text).requires_grad_()
    T = torch.full((3,), steps)
    nll = sum(model.step_nll(x[:, k], x[:, k + 1], ts[:, k], ts[:, k + 1], T, text).sum() for k in range(steps - 1))
    g, = torch.autograd.grad(nll, x)
    weights = torch.tensor([0.02**2 * (1 - t) / (1 - 0.02) for t in ts[0].tolist()])
    expected = (x[:, 0] - torch.einsum("j,bjnd->bnd", weights.double(), g)) / (1 - 0.02)
    torch.testing.assert_close(model.score_denoise(x.detach(), ts, text), expected.detach(), rtol=1e-5, atol=1e-7)


def test_a_single_coupled_step_is_denoised_by_its_own_estimate(exact):
    """Of the exact velocities it is E[x_0 | x_s], in closed form where the data are a Gaussian."""
    s = 0.4
    ts = torch.tensor([s, 1.0]).double()
    x = torch.randn(3, 2, 6, 4).double()
    variance = (1 - s) ** 2 * GAUSSIAN_STD**2 + s**2
    expected = GAUSSIAN_MEAN + (1 - s) * GAUSSIAN_STD**2 / variance * (x[:, 0] - (1 - s) * GAUSSIAN_MEAN)
    torch.testing.assert_close(exact.score_denoise(x, ts, make_text(3)), expected)


def test_candidates_see_a_coupled_step_where_that_is_all_there_is():
    """Of two steps the first alone scores them: of an x_1 that follows from the level before."""
    model, x0, text = make_coupled(), torch.randn(4, 6, 4).double(), make_text(4)
    noise = torch.randn(2, 3, 6, 4).double()
    ts, T = time_grid(2, 0.02, 6, shift=1.0).double(), torch.full((4,), 2)
    levels = [drawn(model, x0, ts.expand(4, -1), text, one.expand(4, -1, -1, -1)) for one in noise]
    nll = sum(model.step_nll(x[:, 1], x[:, 2], *ts[1:, None].expand(2, 4), T, text) for x in levels) / 2
    torch.testing.assert_close(guided_log_density(model, x0, text, ts, 0.0, noise), -nll)


@pytest.mark.parametrize("wrong", [dict(transporter_blocks=1), dict(steps=(2, 4)), dict(parametrization="direct")])
def test_what_a_coupled_step_needs_is_said(wrong):
    with pytest.raises(ValueError, match="first_noise is 0.2, which needs a start from flow matching"):
        make_coupled(**wrong)


@pytest.mark.parametrize("noise", [0.0, -0.5, 1.5])
def test_a_share_of_noise_is_a_share(noise):
    with pytest.raises(ValueError, match=f"first_noise is {noise}, but must be above 0 and at most 1"):
        make_coupled(first_noise=noise)


# ---------------------------------------------------------------------------------------------------------------
# TarFlow, and weights of another model


def test_tarflow_is_a_flow_of_the_image_alone():
    """The bound is the exact -log p(x_{t_0}): a standard normal's, by autograd's full Jacobian."""
    config = dict(image_size=4, width=8, heads=2, steps=1, transporter_width=8, transporter_heads=2)
    model = randomize(TarFlow(NTMConfig(**config)), 0.5).double()
    ts, x0 = torch.tensor([[0.02, 1.0]] * 2).double(), torch.rand(2, 4, 4).double()
    x, one = forward_trajectory(x0, ts), torch.ones(1, dtype=torch.long)
    _, bound = model.trajectory_bound(x, ts, torch.ones(2, 8, dtype=torch.long))
    for b in range(2):
        def flow(a):
            return model.transporter(a[None], ts[:1, 0], one)[0].flatten()
        J = jacobian(flow, x[b, 0]).view(16, 16)
        log_p = Normal(0, 1).log_prob(flow(x[b, 0])).sum() + torch.linalg.slogdet(J)[1]
        torch.testing.assert_close(bound[b], -log_p, rtol=1e-8, atol=1e-8)
    u = model.sample(torch.ones(3, 8, dtype=torch.long), ts[0], generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model.transport(model.invert(u, ts[0]), ts[:1].expand(3, -1), one.expand(3))[0], u)
    assert {name.split(".")[0] for name, _ in model.named_parameters()} == {"transporter"}
    for wrong in dict(rank=2), dict(parametrization="posterior"):
        with pytest.raises(ValueError, match="TarFlow has no predictor"):
            TarFlow(NTMConfig(**config, **wrong))
    with pytest.raises(ValueError, match="but a TarFlow has one"):
        TarFlow(NTMConfig(**config | dict(steps=4)))


def test_weights_of_the_same_architecture_are_all_taken():
    model, trained = make_model(rank=2), make_model(rank=2)
    take_weights(model, trained)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, trained.state_dict()[name]), name


def test_a_transporter_and_directions_that_are_new_stay_as_they_are():
    """With a transporter that starts as the identity, the new model's steps are the trained one's."""
    settings = dict(parametrization="posterior")
    trained = make_model(transporter_blocks=0, rank=1, **settings)
    model = NTM(NTMConfig(**TINY | settings | dict(rank=3))).double()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    theirs = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    take_weights(model, trained)
    ours = model.state_dict()
    for name, tensor in ours.items():
        if name.startswith("transporter."):
            assert torch.equal(tensor, before[name]), name
        elif name.startswith("predictor.head."):
            assert torch.equal(tensor[:3 * 4], theirs[name]) and torch.equal(tensor[3 * 4:], before[name][3 * 4:])
        else:
            assert torch.equal(tensor, theirs[name]), name
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in trained.state_dict().items())  # as they were
    x, ts, text = make_trajectory(model)
    steps = torch.tensor([3, 3, 3])
    found, expected = (one.predict_all(x, ts, steps, text) for one in (model, trained))
    torch.testing.assert_close(found[:2], expected[:2])
    torch.testing.assert_close(found.directions[:, :, :1], expected.directions)
    assert found.directions[:, :, 1:].abs().max() < 0.2


def test_temperature_scales_the_noise_of_the_last_step_alone():
    model = make_model(transporter_blocks=0, rank=2, depth=1, scale=0.3)
    text, ts = make_text(3), model.config.time_grid(0.05).to(torch.float64)
    shape = 3, model.config.num_tokens, model.config.token_dim

    def sample(temperature, restarts=0):
        generator = torch.Generator().manual_seed(4)
        randn = cooled(noise_source(model, text, generator), temperature)
        if restarts:
            return sample_with_restarts(model, text, ts, restarts, randn=randn)
        return model.sample(text, ts, randn=randn)

    for restarts in 0, 1:
        warm, cool, cold = (sample(temperature, restarts) for temperature in (1.0, 0.5, 0.0))
        assert torch.equal(warm[:, 1:], cool[:, 1:]) and torch.equal(warm[:, 1:], cold[:, 1:])
        mean = model.step(warm[:, 1], ts[1], ts[0], 4, text).mean
        assert cold[:, 0].shape == shape
        torch.testing.assert_close(cold[:, 0], mean)
        torch.testing.assert_close(cool[:, 0] - mean, 0.5 * (warm[:, 0] - mean))
    plain = model.sample(text, ts, generator=torch.Generator().manual_seed(4))
    torch.testing.assert_close(sample(1.0), plain)


# ---------------------------------------------------------------------------------------------------------------
# Denoising


def test_a_denoiser_with_a_residual_starts_as_the_identity_and_moves_by_the_noise():
    denoiser, u0, text = ResidualDenoiser(DenoiserConfig(**TINY, residual=0.02)), torch.randn(2, 6, 4), make_text(2)
    assert torch.equal(denoiser(u0, text), u0)
    plain = randomize(Denoiser(NTMConfig(**TINY)))
    denoiser.load_state_dict(plain.state_dict())
    torch.testing.assert_close(denoiser(u0, text), u0 + 0.02 * plain(u0, text))
