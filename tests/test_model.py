"""The likelihood is one, and sampling, guidance and score denoising are what the densities say they must be."""
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from conftest import covariance, randomize
from helpers import ENVIRONMENT, ROOT
from tiny import (MEAN, TINY, VARIANCE, changed, exact_model, levels_mean_and_covariance, levels_of, make_images,
                  make_model, make_text, make_trajectory, noise_of)
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal
from torch.func import functional_call

from flow import forward_trajectory, reverse_posterior, time_grid
from model import NTM, Denoiser, NTMConfig, bits_per_dim, forward_log_prob


def draw(model, batch, pairs, **settings):
    return model.draw_pairs(batch, **settings) if pairs else model.draw_trajectories(batch, **settings)


# ---------------------------------------------------------------------------------------------------------------
# Likelihood


@pytest.mark.parametrize("parametrization", ["direct", "posterior"])
def test_step_nll_is_the_change_of_variables(parametrization):
    model = make_model(parametrization=parametrization)
    x, ts, text = make_trajectory(model, steps=2)
    steps = torch.tensor([2, 4, 8])
    for k in range(2):
        (x_s, x_t), (s, t) = x[:, k:k + 2].unbind(1), ts[:, k:k + 2].unbind(1)
        nll = model.step_nll(x_s, x_t, s, t, steps, text)
        mean, log_std = model.predict(model.transporter(x_t, t, steps)[0], t, s, steps, text)
        assert log_std.abs().max() > 0.5
        for b in range(3):
            def latent(x_s):
                u_s = model.transporter(x_s[None], s[b:b + 1], steps[b:b + 1])[0][0]
                return (u_s - mean[b]) / log_std[b].exp()
            J = jacobian(latent, x_s[b]).reshape(24, 24)
            expected = 0.5 * (latent(x_s[b])**2).sum() + 12 * math.log(2 * math.pi) - torch.linalg.slogdet(J)[1]
            torch.testing.assert_close(nll[b], expected, rtol=1e-8, atol=0)


def test_trajectory_nll_is_the_change_of_variables_of_the_whole():
    """The latents of all levels as one function of all levels; that its Jacobian is triangular is the model's claim."""
    model = make_model()
    x, ts, text = make_trajectory(model, batch=1, steps=2)

    def latents(x):
        u, _ = model.transporter(x, ts[0], torch.tensor([2, 2, 2]))
        mean, log_std = model.predict(u[1:], ts[0, 1:], ts[0, :-1], torch.tensor([2, 2]), text.expand(2, -1))
        return torch.cat([(u[:-1] - mean) / log_std.exp(), x[-1:]])

    J = jacobian(latents, x[0]).reshape(72, 72)
    expected = -Normal(0, 1).log_prob(latents(x[0])).sum() - torch.linalg.slogdet(J)[1]
    torch.testing.assert_close(model.trajectory_nll(x, ts, text).sum(), expected, rtol=1e-8, atol=0)


def test_columns_of_trajectory_nll_are_its_steps_and_the_prior():
    model = make_model()
    x, ts, text = make_trajectory(model, steps=4)
    nll = model.trajectory_nll(x, ts, text)
    assert nll.shape == (3, 5)
    for k in range(4):
        step = model.step_nll(x[:, k], x[:, k + 1], ts[:, k], ts[:, k + 1], torch.tensor([4, 4, 4]), text)
        torch.testing.assert_close(nll[:, k], step, rtol=1e-10, atol=0)
    torch.testing.assert_close(nll[:, 4], -Normal(0, 1).log_prob(x[:, 4]).sum((1, 2)), rtol=1e-10, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("image_size, points", [(1, 2001), ((1, 2), 201)])
@pytest.mark.parametrize("s, t", [(0.02, 0.4), (0.4, 1.0)])
@torch.no_grad()
def test_density_integrates_to_one(image_size, points, s, t):
    model = make_model(scale=0.7, image_size=image_size, patch_size=1)
    N = model.config.num_tokens
    s, t, steps = torch.tensor([s]).double(), torch.tensor([t]).double(), torch.tensor([4])
    x_t, text = torch.randn(1, N, 1).double(), make_text(1)
    mean, log_std = model.predict(model.transporter(x_t, t, steps)[0], t, s, steps, text)
    # the mass of x_s lies inside the image of the latent's sphere of six standard deviations
    z = torch.randn(2000, N, 1).double()
    u_s = mean + log_std.exp() * 6 * z / (z**2).sum(1, keepdim=True).sqrt()
    edge = model.transporter.inverse(u_s, s.expand(2000), steps.expand(2000))[..., 0]
    axes = [torch.linspace(*limits, points, dtype=torch.float64) for limits in zip(edge.amin(0), edge.amax(0))]
    x_s = torch.cartesian_prod(*axes).reshape(-1, N, 1)
    n = len(x_s)
    nll = model.step_nll(x_s, x_t.expand(n, N, 1), s.expand(n), t.expand(n), steps.expand(n), text.expand(n, -1))
    cell = math.prod(axis[1] - axis[0] for axis in axes)
    assert (torch.exp(-nll).sum() * cell).item() == pytest.approx(1, abs=1e-3)


def test_no_level_sees_a_cleaner_one_nor_another_example():
    """Moving x_{t_k} moves the Gaussian of the step that starts there and no other, to the last bit."""
    model = make_model(dtype=torch.float32)
    x, ts, text = make_trajectory(model, steps=4)
    gaussians = []  # of every pass: (B, T, N, 2D)
    model.predictor.register_forward_hook(
        lambda module, inputs, outputs: gaussians.append(torch.cat(outputs, dim=2).unflatten(0, (3, 4))))
    nll = model.trajectory_nll(x, ts, text)[..., None]
    for b in range(3):
        for k in range(5):
            moved = x.clone()
            moved[b, k, 2] += 0.5
            moved_nll = model.trajectory_nll(moved, ts, text)[..., None]
            assert changed(gaussians[0], gaussians[-1]) == {(b, k - 1)} - {(b, -1)}
            assert changed(nll, moved_nll) == {(b, k - 1), (b, k)} - {(b, -1)}  # the step that starts there, and ends
    assert len(gaussians) == 1 + 3 * 5  # one pass gave every step's


def test_prediction_depends_on_all_it_is_given():
    model = make_model()
    t, s = torch.tensor([[0.5, 0.9], [0.2, 0.4]]).double()
    u, steps, text = torch.randn(2, 6, 4).double(), torch.tensor([4, 4]), torch.tensor([[2, 3, 4], [5, 6, 7]])
    given = dict(u=u, t=t, s=s, steps=steps, text=text)
    other = dict(u=u + 0.1, t=t + 0.05, s=s + 0.05, steps=2 * steps, text=text.flip(1))
    before = torch.stack(model.predict(**given))
    for name in given:
        assert (torch.stack(model.predict(**given | {name: other[name]})) != before).all(), name


def test_prediction_has_no_mask():
    model, u, text = make_model(), torch.randn(6, 4).double(), make_text(1)
    t, s, steps = torch.tensor([0.5]).double(), torch.tensor([0.2]).double(), torch.tensor([4])
    J = jacobian(lambda u: torch.cat(model.predict(u[None], t, s, steps, text), dim=2)[0], u)
    assert (J != 0).all()  # every token's Gaussian depends on every token


# ---------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("steps", [1, 2, 4, (2, 4)])
@pytest.mark.parametrize("pairs", [False, True])
def test_loss_is_the_mean_nll_per_dimension_per_step(pairs, steps):
    model, images, text = make_model(steps=steps), make_images(5).double(), make_text(5)
    levels = steps, ts, x = levels_of(model, images, text, *draw(model, 5, pairs))
    loss = model(images, text, levels)
    assert loss.shape == () and loss.dtype == torch.float64
    nll = [model.step_nll(x[:, k], x[:, k + 1], ts[:, k], ts[:, k + 1], steps, text) for k in range(ts.shape[1] - 1)]
    assert len(nll) == (1 if pairs else steps[0])
    torch.testing.assert_close(loss, sum(nll).mean() / len(nll) / 24)
    assert model(images, text, levels) == loss  # no randomness but the draws


def test_by_default_the_loss_is_of_whole_trajectories_drawn_anew(monkeypatch):
    model, images, text, seen = make_model(), make_images(3).double(), make_text(3), []
    transition_nll = model.transition_nll

    def recorded(x, ts, steps, text, ends_in_noise):
        seen.append((x, ts, steps, ends_in_noise))
        return transition_nll(x, ts, steps, text, ends_in_noise)

    monkeypatch.setattr(model, "transition_nll", recorded)
    assert model(images, text) != model(images, text)
    for x, ts, steps, ends_in_noise in seen:
        assert x.shape == (3, 5, 6, 4) and ts.shape == (3, 5) and steps.tolist() == [4, 4, 4] and ends_in_noise
        assert (ts[:, 0] < 0.05).all() and (ts[:, -1] == 1).all()
        noise = x - (1 - ts[..., None, None]) * model.patchify(images)[:, None]
        assert noise[:, 0].abs().max() < 0.5 and noise[:, -1].std() > 0.7


@pytest.mark.slow
@torch.no_grad()
def test_pairs_and_trajectories_have_the_same_expectation():
    model, images, text = make_model(scale=0.5, dtype=torch.float32), make_images(128), make_text(128)

    def mean_and_standard_error(passes, pairs):
        losses = []
        for _ in range(passes):
            steps, ts = draw(model, 128, pairs)
            losses.append(model(images, text, levels_of(model, images, text, steps, ts)))
        losses = torch.stack(losses)
        return losses.mean(), losses.std() / passes**0.5

    whole, whole_error = mean_and_standard_error(40, pairs=False)
    _, ts, x = levels_of(model, images, text, *model.draw_trajectories(128))
    steps = model.trajectory_nll(x, ts, text)[:, :4].mean(0) / 24
    pair, pair_error = mean_and_standard_error(160, pairs=True)
    error = (whole_error**2 + pair_error**2).sqrt()
    assert (whole - pair).abs() < 4 * error
    assert steps.std() > 10 * error  # the four steps differ by so much that drawing them unevenly would show


@pytest.mark.parametrize("pairs", [False, True])
def test_draws_cover_step_counts_times_and_levels(pairs):
    model = make_model(steps=(4, 8))
    seen, mixed = Counter(), 0
    for _ in range(40):
        steps, ts = draw(model, 16, pairs, max_t_min=0.03)
        T = steps[:, None]
        assert steps.shape == (16,) and ts.shape == (16, 2 if pairs else T[0] + 1)
        mixed += (steps != steps[0]).any().item()
        k = (ts * T).round()  # the unshifted grid is k/T, but for its start
        assert (k.diff() == 1).all()
        torch.testing.assert_close(ts[k > 0], (k / T)[k > 0])
        assert (0 <= ts[k == 0]).all() and (ts[k == 0] < 0.03).all()
        seen.update(zip(steps.tolist(), k[:, 0].int().tolist()))
    assert seen.keys() == {(T, k) for T in (4, 8) for k in range(T if pairs else 1)}
    assert mixed > 35 if pairs else mixed == 0  # in pair mode each example has its own T
    if pairs:  # 640 draws: both T alike, and the steps of each; four standard deviations
        assert all(abs(count - 320 / T) < 4 * (320 / T) ** 0.5 for (T, _), count in seen.items())


@pytest.mark.parametrize("shift", [None, 0.3, 3.0])
def test_pairs_are_neighbours_of_the_models_own_grid(shift):
    model = make_model(steps=(2, 3), shift=shift)
    steps, ts = model.draw_pairs(60)
    assert ts[:, 1].max() == 1  # exactly: the transporter tells pure noise by it
    for T in (2, 3):
        grid = time_grid(T, 0.0, 6, shift)
        later = ts[steps == T][:, 1]
        place = (later[:, None] - grid).abs().argmin(dim=1)
        assert set(place.tolist()) == set(range(1, T + 1))
        torch.testing.assert_close(later, grid[place])
        cleaner = grid[place - 1]
        torch.testing.assert_close(ts[steps == T][place > 1, 0], cleaner[place > 1])


@pytest.mark.parametrize("pairs", [False, True])
def test_start_of_a_trajectory_is_uniform_below_max_t_min(pairs):
    """Its quantiles; of 4,000 numbers one has a standard error of at most 0.5 / sqrt(4,000) = 0.008."""
    model = make_model()
    _, ts = draw(model, 16_000 if pairs else 4_000, pairs, max_t_min=0.04)
    t_min = ts[:, 0][ts[:, 0] < 0.2]
    assert len(t_min) == 4_000
    found = torch.quantile(t_min / 0.04, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), atol=0.04, rtol=0)
    assert (t_min > 0).all()  # a posterior has no density at 0
    _, ts = draw(model, 4_000, pairs)
    assert 0.04 < ts[:, 0][ts[:, 0] < 0.2].max() <= 0.05  # by default


def test_a_batch_has_as_many_of_each_step():
    model, firsts = make_model(), Counter()
    for _ in range(200):
        _, ts = model.draw_pairs(16)
        k = (ts[:, 1] * 4).round() - 1
        assert k.unique(return_counts=True)[1].tolist() == [4, 4, 4, 4]
        firsts[k[0].item()] += 1  # of each example any
    assert len(firsts) == 4 and min(firsts.values()) > 25  # 50 expected, with a standard deviation of 6


def test_of_several_step_counts_an_example_has_any_step():
    """The first of a batch as well as the others, all steps of a T alike."""
    model, firsts = make_model(steps=(2, 3)), Counter()
    for _ in range(600):
        steps, ts = model.draw_pairs(2)
        T = steps[0].item()
        firsts[T, round(ts[0, 1].item() * T)] += 1  # the unshifted grid is k/T
    assert firsts.keys() == {(2, 1), (2, 2), (3, 1), (3, 2), (3, 3)}
    assert all(abs(count - 300 / T) < 4 * (300 / T) ** 0.5 for (T, _), count in firsts.items())


@pytest.mark.parametrize("pairs", [False, True])
def test_draws_are_reproducible_from_their_generator(pairs):
    model = make_model(steps=(4, 8))
    one, same, other = (draw(model, 3, pairs, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 5))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not torch.equal(one[1], other[1])


def test_noise_of_levels_is_given_or_drawn_anew():
    model, x0, ts = make_model(), torch.randn(2, 6, 4), torch.tensor([[0.1, 0.5, 1.0]] * 2)
    noise = torch.randn(2, 3, 6, 4)
    assert torch.equal(model.noised(x0, None, ts, noise), forward_trajectory(x0, ts, noise=noise))
    one, other = model.noised(x0, None, ts), model.noised(x0, None, ts)
    assert one.shape == (2, 3, 6, 4) and not torch.equal(one, other)


@pytest.mark.parametrize("parametrization", ["direct", "posterior"])
@pytest.mark.parametrize("pairs", [False, True])
def test_gradient_reaches_every_parameter(parametrization, pairs):
    model = make_model(dtype=torch.float32, parametrization=parametrization, steps=(2, 3))
    images, text = make_images(8), make_text(8)
    model(images, text, levels_of(model, images, text, *draw(model, 8, pairs))).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_gradient_is_the_slope_of_the_loss():
    """Nothing is cut off: not u_t, through which a step's Gaussian depends on the transporter."""
    model = make_model(scale=0.7)
    images, text = make_images(3).double(), make_text(3)
    levels = levels_of(model, images, text, *model.draw_trajectories(3))
    model(images, text, levels).backward()
    for network in "transporter", "predictor":
        parameters = {name: p for name, p in model.named_parameters() if name.startswith(network)}
        direction = {name: torch.randn_like(p) for name, p in parameters.items()}

        def loss(h):
            moved = {name: p + h * direction[name] for name, p in parameters.items()}
            return functional_call(model, moved, (images, text, levels))

        slope = sum((p.grad * direction[name]).sum() for name, p in parameters.items())
        torch.testing.assert_close((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-5, atol=0)


def test_loss_is_float32_under_bfloat16():
    model, images, text = make_model(scale=0.5, dtype=torch.float32), make_images(16), make_text(16)
    levels = levels_of(model, images, text, *model.draw_trajectories(16))
    exact = model(images, text, levels)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, text, levels)
        gaussian = model.predict(torch.randn(2, 6, 4), *torch.rand(3, 2), text[:2])
    assert all(a.dtype == torch.float32 for a in (rough, *gaussian))
    assert rough != exact  # the layers did run in bfloat16
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)


@pytest.mark.slow
def test_training_lowers_the_loss_and_leaves_the_transporter_invertible():
    model = NTM(NTMConfig(**TINY))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    images, text, losses = 0.3 * make_images(64).cumsum(3), make_text(64), []
    for _ in range(40):
        loss = model(images, text)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5]) - 1
    x, ts, _ = make_trajectory(model)
    u, logdet = model.transporter(x[:, 0], ts[:, 0], torch.tensor([4, 4, 4]))
    assert logdet.abs().min() > 0.5
    for method in "cache", "jacobi":
        back = model.transporter.inverse(u, ts[:, 0], torch.tensor([4, 4, 4]), method)
        torch.testing.assert_close(back, x[:, 0], atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------------------------------------------
# Guidance and sampling


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_sampling_is_ancestral(guidance):
    model, text, noise = make_model(scale=0.5), make_text(2), torch.randn(2, 4, 6, 4).double()
    ts, null = torch.tensor([0.02, 0.3, 0.6, 1.0]).double(), torch.tensor([[1, 0, 0], [1, 0, 0]])
    u = [noise[:, 3]]
    for t, s, z in zip([1.0, 0.6, 0.3], [0.6, 0.3, 0.02], noise.unbind(1)[2::-1]):
        step = torch.tensor([t, t]).double(), torch.tensor([s, s]).double(), torch.tensor([3, 3])
        mean, log_std = model.predict(u[0], *step, text).guided(model.predict(u[0], *step, null), guidance)
        u.insert(0, mean + log_std.exp() * z)
    before = noise.clone()
    found = model.sample(text, ts, guidance, randn=noise_of(noise))
    torch.testing.assert_close(found, torch.stack(u, 1), rtol=1e-12, atol=1e-12)
    assert torch.equal(noise, before)


def test_sampling_depends_on_its_generator_caption_and_guidance():
    model, text, ts = make_model(scale=0.5, dtype=torch.float32), make_text(2), time_grid(4, 0.02, 6, 1.0)

    def draw(seed=0, text=text, guidance=0.0):
        return model.sample(text, ts, guidance, torch.Generator().manual_seed(seed))

    assert draw().shape == (2, 5, 6, 4) and draw().dtype == torch.float32 and not draw().requires_grad
    assert torch.equal(draw(), draw())
    assert not (draw() == draw(seed=1)).any()
    assert changed(draw(), draw(text=text.roll(1, 1))) == changed(draw(), draw(guidance=1.0)) == {
        (b, k) for b in range(2) for k in range(4)}  # all but the noise at t = 1


def test_guidance_does_nothing_to_the_null_caption():
    model, null, noise = make_model(scale=0.5), torch.tensor([[1, 0, 0]]), torch.randn(1, 5, 6, 4).double()
    ts = time_grid(4, 0.02, 6, 1.0).double()
    guided, plain = (model.sample(null, ts, guidance, randn=noise_of(noise)) for guidance in (3.0, 0.0))
    torch.testing.assert_close(guided, plain)


@pytest.mark.parametrize("method", ["cache", "jacobi"])
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_invert_returns_every_level_to_where_it_came_from(method, dtype, atol):
    model, u = make_model(dtype=dtype), torch.randn(2, 5, 6, 4, dtype=dtype)
    ts, steps = time_grid(4, torch.tensor([0.01, 0.04], dtype=dtype), 6, 1.0), torch.tensor([4, 4])
    x = model.invert(u, ts, method)
    if method == "jacobi":
        atol = 1e-4  # it stops at a tolerance
    for k in range(5):
        alone = model.transporter.inverse(u[:, k], ts[:, k], steps, method)
        torch.testing.assert_close(x[:, k], alone, atol=atol, rtol=0)
        torch.testing.assert_close(model.transporter(x[:, k], ts[:, k], steps)[0], u[:, k], atol=atol, rtol=0)
    assert torch.equal(x[:, 4], u[:, 4]) and (x - u)[:, :4].abs().mean() > 0.5
    torch.testing.assert_close(model.invert(u[:1], ts[0], method), x[:1], atol=atol, rtol=0)  # one grid for all


def test_a_part_of_a_trajectory_is_inverted_at_its_own_step_count():
    model, u, ts = make_model(), torch.randn(2, 5, 6, 4).double(), time_grid(4, 0.02, 6, 1.0).double()
    whole = model.invert(u, ts)
    torch.testing.assert_close(model.invert(u[:, :1], ts[:1], steps=4), whole[:, :1])
    with pytest.raises(ValueError, match="does not say how many steps there were: give steps"):
        model.invert(u[:, :1], ts[:1])
    torch.testing.assert_close(model.invert(u[:, 1:3], ts[1:3], steps=4), whole[:, 1:3])
    assert (model.invert(u[:, 1:3], ts[1:3]) - whole[:, 1:3]).abs().max() > 0.01  # as of one step


# ---------------------------------------------------------------------------------------------------------------
# Where everything is known, tiny.exact_model, and the transporter at pure noise


@pytest.mark.parametrize("steps, pairs", [(4, False), (1, False), (1, True)])
def test_pure_noise_is_left_out_of_the_transporter_without_a_difference(monkeypatch, steps, pairs):
    """Of whole trajectories, and of the only step there is: in training, likelihood, and back-propagation to x."""
    model, images, text, passed = make_model(steps=steps), make_images(3).double(), make_text(3), []
    levels = T, ts, x = levels_of(model, images, text, *draw(model, 3, pairs))
    x.requires_grad_()
    found = [model.transition_nll(x, ts, T, text, ends_in_noise) for ends_in_noise in (True, False)]
    torch.testing.assert_close(*found, rtol=1e-12, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(nll.sum(), x)[0] for nll in found), rtol=1e-9, atol=1e-9)
    (u, logdet), (_, all_logdets) = (model.transport(x, ts, T, ends_in_noise) for ends_in_noise in (True, False))
    assert torch.equal(u[:, -1], x[:, -1]) and (logdet[:, -1] == 0).all()
    torch.testing.assert_close(logdet, all_logdets, rtol=1e-12, atol=0)
    forward = model.transporter.forward
    monkeypatch.setattr(model.transporter, "forward", lambda x, *args: passed.append(len(x)) or forward(x, *args))
    model(images, text, levels)
    model.trajectory_nll(x, ts, text)
    model.score_denoise(x, ts, text)
    assert passed == [3 * (ts.shape[1] - 1)] * 3


def test_pairs_pass_the_transporter_whole(monkeypatch):
    """For among them are steps that do not start from pure noise."""
    model, images, text, passed = make_model(), make_images(8).double(), make_text(8), []
    levels = levels_of(model, images, text, *model.draw_pairs(8))
    forward = model.transporter.forward
    monkeypatch.setattr(model.transporter, "forward", lambda x, *args: passed.append(len(x)) or forward(x, *args))
    model(images, text, levels)
    assert passed == [2 * 8]


def test_forward_log_prob_is_the_joint_normal_over_the_marginal():
    """q(x_{t_1:T} | x_{t_0}) = q(x_{t_0:T} | x_0) / q(x_{t_0} | x_0), whatever x_0 is, for the chain is Markov."""
    ts = time_grid(4, torch.tensor([0.01, 0.05]).double(), 256)
    x = torch.randn(2, 5, 4, 3).double()
    for b in range(2):
        for x0 in (-0.8, 0.0, 1.3):
            mean, levels = (1 - ts[b]) * x0, x[b].permute(1, 2, 0)
            joint = MultivariateNormal(mean, covariance(ts[b])).log_prob(levels).sum()
            first = Normal(mean[0], ts[b, 0]).log_prob(levels[..., 0]).sum()
            torch.testing.assert_close(forward_log_prob(x, ts)[b], joint - first)


def test_the_bound_is_nll_and_log_q():
    model = make_model()
    x, ts, text = make_trajectory(model, steps=4)
    nll, bound = model.trajectory_bound(x, ts, text)
    torch.testing.assert_close(nll, model.trajectory_nll(x, ts, text))
    torch.testing.assert_close(bound, nll.sum(dim=1) + forward_log_prob(x, ts))


def test_bits_per_dimension():
    """A density of 2^7 on a bin as wide as 2^-7 has it all: no bits. One of 1/2 on all of [-1, 1] leaves 8."""
    assert bits_per_dim(-7 * math.log(2) * 30, 30) == pytest.approx(0)
    assert bits_per_dim(math.log(2) * 30, 30) == pytest.approx(8)


def test_exact_reverse_gives_the_exact_likelihood():
    model = exact_model()
    x, ts, text = make_trajectory(model, steps=4)
    nll = model.trajectory_nll(x, ts, text).sum(1)
    bound = nll + forward_log_prob(x, ts)
    for b in range(3):
        mean, cov = levels_mean_and_covariance(ts[b])
        levels = x[b, :, :, 0].T
        torch.testing.assert_close(nll[b], -MultivariateNormal(mean, cov).log_prob(levels).sum(), rtol=1e-10, atol=0)
        # -log p(x_{t_0}) <= E_q[-log p(x_{t_0:T}) + log q(x_{t_1:T} | x_{t_0})], and here every draw attains it
        marginal = Normal(mean[:, 0], cov[:, 0, 0].sqrt()).log_prob(levels[:, 0]).sum()
        torch.testing.assert_close(bound[b], -marginal, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("t_min", [0.0, 0.04])
def test_exact_reverse_samples_the_exact_trajectories(t_min):
    ts = time_grid(4, torch.tensor(t_min).double(), 2, 1.0)
    # sampling is affine in the noise: example k has unit noise at level k only, the last none
    noise = torch.zeros(6, 5, 2, 1).double()
    for k in range(5):
        noise[k, k] = 1
    x = exact_model().sample(make_text(6), ts, randn=noise_of(noise))[..., 0]
    mean, factor = x[5].T, (x[:5] - x[5]).permute(2, 1, 0)
    expected_mean, expected_cov = levels_mean_and_covariance(ts)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(factor @ factor.mT, expected_cov)


def test_score_denoising_is_the_posterior_mean_from_every_level():
    model = exact_model()
    x, ts, text = make_trajectory(model, steps=4)
    with torch.no_grad():
        denoised = model.score_denoise(x, ts, text)
    assert denoised.shape == (3, 2, 1)
    x.requires_grad_()
    g, = torch.autograd.grad(model.trajectory_nll(x, ts, text).sum(), x)
    for b in range(3):
        a, (mean, cov) = 1 - ts[b], levels_mean_and_covariance(ts[b])
        levels = x[b, :, :, 0].T
        expected = MEAN[:, 0] + VARIANCE[:, 0] * (torch.linalg.solve(cov, levels - mean) @ a)  # E[x_0 | x_{t_0:T}]
        torch.testing.assert_close(denoised[b, :, 0], expected, rtol=1e-9, atol=1e-9)
        for i in range(4):
            from_level = (levels[:, i] - g[b, :, :, 0].T @ covariance(ts[b])[i]) / a[i]
            torch.testing.assert_close(from_level, expected, rtol=1e-9, atol=1e-9)


def test_score_denoising_is_tweedies_formula_at_the_trajectorys_own_step_count():
    """(x_{t_0} + sum_k S_0k d log p / d x_k) / (1 - t_0), of a log p whose network depends on T, here 3."""
    model = make_model(scale=0.5)
    x, ts, text = make_trajectory(model, steps=3)
    three, nll = torch.tensor([3, 3, 3]), 0.5 * (x.requires_grad_()[:, 3]**2).sum()
    for k in range(3):
        nll = nll + model.step_nll(x[:, k], x[:, k + 1], ts[:, k], ts[:, k + 1], three, text).sum()
    g, = torch.autograd.grad(nll, x)
    for b in range(3):
        expected = (x[b, 0] - torch.einsum("k,knd->nd", covariance(ts[b])[0], g[b])) / (1 - ts[b, 0])
        torch.testing.assert_close(model.score_denoise(x[b:b + 1], ts[b], text[b:b + 1])[0], expected.detach())


def test_score_denoising_returns_clean_data():
    model = make_model()
    x, ts, text = make_trajectory(model)
    ts[:, 0] = 0
    torch.testing.assert_close(model.score_denoise(x, ts, text), x[:, 0], rtol=0, atol=0)


def test_score_denoising_leaves_no_trace():
    model = make_model()
    x, ts, text = make_trajectory(model)
    denoised = model.score_denoise(x, ts, text)
    assert not denoised.requires_grad and not x.requires_grad
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model.score_denoise(x, ts, text), denoised)
    torch.testing.assert_close(model.score_denoise(x[1:2], ts[1], text[1:2]), denoised[1:2])  # one grid for all


# ---------------------------------------------------------------------------------------------------------------
# Starting from flow matching


def test_posterior_parametrization_is_the_reverse_posterior_of_what_the_velocity_says():
    model = NTM(NTMConfig(**TINY | dict(parametrization="posterior"))).double()
    t, s = torch.tensor([[1.0, 0.6], [0.5, 0.02]]).double()
    steps, text, (x0, noise) = torch.tensor([4, 4]), make_text(2), torch.randn(2, 4).double()
    A, B, C = (a[:, None, None] for a in reverse_posterior(t, s))

    u = torch.randn(2, 6, 4).double()
    mean, log_std = model.predict(u, t, s, steps, text)  # at initialisation v = 0: the data is taken to be u
    torch.testing.assert_close(mean, A * u + B * u)
    torch.testing.assert_close(log_std.exp(), C.expand_as(u))

    # a network that says v = noise - x_0 and 0.1 for every token
    model.predictor.head.bias.data = torch.cat([noise - x0, torch.full((4,), 0.1).double()])
    u = (1 - t)[:, None, None] * x0 + t[:, None, None] * noise.expand(2, 6, 4)
    mean, log_std = model.predict(u, t, s, steps, text)
    torch.testing.assert_close(mean, A * u + B * x0)
    delta = 0.1 * torch.log((C**2 + B**2).sqrt() / C)  # in units of the way to the spread of data of variance 1
    torch.testing.assert_close(log_std, (C.log() + delta).expand_as(u))


# ---------------------------------------------------------------------------------------------------------------
# Shapes, settings and the denoiser


def test_patches_go_row_by_row_and_come_back():
    model = NTM(NTMConfig(**TINY | dict(channels=3)))
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    tokens = model.patchify(images)
    assert tokens.shape == (2, 6, 12)
    for n in range(6):
        row, column = 2 * (n // 3), 2 * (n % 3)
        patch = images[:, :, row:row + 2, column:column + 2].flatten(1)
        assert torch.equal(tokens[:, n].sort().values, patch.sort().values)
    assert torch.equal(model.unpatchify(tokens), images)


def test_image_size_is_a_side_or_height_and_width():
    assert NTMConfig(image_size=8, patch_size=2).num_tokens == 16
    assert NTMConfig(image_size=[4, 6], patch_size=2).patches == (2, 3)
    assert NTMConfig(channels=3, patch_size=2).token_dim == 12


@pytest.mark.parametrize("setting, named", [(dict(image_size=(4, 7)), "4x7"), (dict(parametrization="flow"), "flow")])
def test_impossible_settings_are_named(setting, named):
    with pytest.raises(ValueError, match=named):
        NTMConfig(**TINY | setting)


@pytest.mark.parametrize("t_min, steps, named", [(0.25, 0, "t_min is 0.25, but the grid of 4 steps"),
                                                 (0.05, 20, "t_min is 0.05, but the grid of 20 steps"),
                                                 (-0.1, 0, "t_min is -0.1")])
def test_a_grid_that_cannot_start_there_is_named(t_min, steps, named):
    with pytest.raises(ValueError, match=named):
        NTMConfig(**TINY).time_grid(t_min, steps)


def test_the_configs_grid():
    """Of its tokens and its shift, and of the first of its steps unless others are asked for."""
    config = NTMConfig(**TINY | dict(steps=(3, 5)))
    torch.testing.assert_close(config.time_grid(0.02), torch.tensor([0.02, 1 / 3, 2 / 3, 1]))
    torch.testing.assert_close(config.time_grid(0.02, 5), torch.tensor([0.02, 0.2, 0.4, 0.6, 0.8, 1]))
    by_tokens = NTMConfig(**TINY | dict(shift=None))
    torch.testing.assert_close(by_tokens.time_grid(0.02), time_grid(4, 0.02, 6))
    assert config.grid_shift == 1 and by_tokens.grid_shift == pytest.approx(math.exp(0.5 + 0.65 * (6 - 256) / 3840))


def test_no_density_at_zero_is_named():
    with pytest.raises(ValueError, match="t_min is 0, .* choose t_min > 0"):
        NTMConfig(**TINY | dict(parametrization="posterior")).time_grid(0)
    assert NTMConfig(**TINY).time_grid(0.0)[0] == 0  # a direct model has one


@pytest.mark.parametrize("setting", [dict(heads=3), dict(transporter_heads=3)])
def test_heads_must_divide_the_width(setting):
    with pytest.raises(ValueError, match="16 .* 3 heads"):
        NTM(NTMConfig(**TINY | setting))


def test_size_of_the_default_model():
    """Predictor: four layers of 18 w^2 + 15 w numbers, 514 words, patches of 4 numbers in and 2 x 4 out,
    three times of 64 waves; the transporter: two times, and three blocks of two layers."""
    def layer(w):
        return 18 * w**2 + 15 * w

    predictor = 4 * layer(128) + 514 * 128 + (4 + 1) * 128 + (128 + 1) * 8 + (192 + 1 + 128 + 1) * 128
    block = 2 * layer(64) + (4 + 1) * 64 + (1 + 16) * 64 + (64 + 1) * 8
    model = NTM(NTMConfig())
    count = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    assert count == {"predictor": predictor, "transporter": 3 * block + (128 + 1 + 64 + 1) * 64}
    assert predictor == 1_296_008 and model.predictor.trunk.layers[0].attention.heads == 4
    assert model.transporter.blocks[0].layers[0].attention.heads == 2
    assert model.config.steps == (4,)


def test_words_start_as_large_as_patches_and_a_flows_positions_small():
    """Standard deviation 1 of words and 0.02 of the places in the scan; a flow's start token at 0."""
    torch.manual_seed(0)
    model = NTM(NTMConfig(width=512, transporter_width=512, vocab_size=50))
    trunk, block = model.predictor.trunk, model.transporter.blocks[0]
    assert trunk.embed.weight.std().item() == pytest.approx(1, rel=0.1)
    assert block.position.std().item() == pytest.approx(0.02, rel=0.1)
    assert (block.start == 0).all()


def test_denoiser_maps_tokens_to_tokens_and_reads_the_caption():
    denoiser = randomize(Denoiser(NTMConfig(**TINY)))
    u0, text = torch.randn(2, 6, 4), torch.tensor([[2, 3, 4], [5, 6, 7]])
    x0 = denoiser(u0, text)
    assert x0.shape == (2, 6, 4)
    assert not (x0 == denoiser(u0, text.flip(1))).any()
    J = jacobian(lambda u: denoiser(u[None], text[:1])[0], u0[0])
    assert (J != 0).all()  # every token from every token
    torch.testing.assert_close(denoiser(u0[1:], text[1:]), x0[1:])


def test_a_denoiser_starts_at_zero_and_is_told_no_time():
    denoiser, seen = Denoiser(NTMConfig(**TINY)), []
    denoiser.trunk.register_forward_pre_hook(lambda trunk, inputs: seen.append(inputs[2]))
    assert (denoiser(torch.randn(2, 6, 4), make_text(2)) == 0).all()
    assert torch.equal(seen[0], torch.zeros(2, 1))


def test_a_denoisers_image_is_float32_under_bfloat16():
    denoiser, u0, text = randomize(Denoiser(NTMConfig(**TINY))), torch.randn(2, 6, 4), make_text(2)
    exact = denoiser(u0, text)
    with torch.autocast("cpu", torch.bfloat16):
        rough = denoiser(u0, text)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("setting", ["width", "patch_size", "transporter_layers", "steps", "depth", "image_size"])
def test_a_size_below_one_is_named(setting):
    with pytest.raises(ValueError, match=f"{setting} is 0, but must be at least 1"):
        NTMConfig(**{setting: 0})


# ---------------------------------------------------------------------------------------------------------------
# The paper alone


@pytest.mark.slow
def test_the_paper_knows_nothing_of_what_is_added():
    """But for the seam: a model of rank > 0 has a CorrelatedGaussian."""
    program = """
import sys
for name in "flow", "predictor", "model":
    __import__(name)
    print(*sys.modules)
"""
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, check=True, text=True,
                         capture_output=True)
    ours = {path.stem for path in ROOT.glob("*.py")} | {"plumbing"}
    loaded = [set(line.split()) & ours for line in ran.stdout.splitlines()]
    assert loaded == [{"flow"}, {"flow", "predictor"}, {"flow", "predictor", "correlated", "model"}]


def test_a_size_of_several_numbers_is_checked_in_each():
    assert NTMConfig(steps=[4, 8]).steps == (4, 8) and NTMConfig(steps=3).steps == (3,)
    for wrong in dict(steps=(4, 0)), dict(image_size=(8, -8)):
        with pytest.raises(ValueError, match="but must be at least 1"):
            NTMConfig(**wrong)
