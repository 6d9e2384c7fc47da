"""The likelihood is one, and sampling, guidance and score denoising are what the densities say they must be."""
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from conftest import covariance, randomize
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal, Normal
from torch.func import functional_call

from flow import forward_kernel, forward_log_prob, forward_trajectory, reverse_posterior, time_grid
from fm import FlowMatching
from model import NTM, Denoiser, NTMConfig
from plumbing.tokenizer import get_tokenizer
from predictor import Gaussian, null_caption

# 2 x 3 patches: 6 tokens of 4 numbers; a grid without shift, k/T
TINY = dict(image_size=(4, 6), channels=1, patch_size=2, vocab_size=9, text_len=3, width=16, depth=2, heads=2,
            shift=1.0, transporter_width=16, transporter_blocks=2, transporter_layers=1, transporter_heads=2)


def guide(conditional, unconditional, weight):
    """Of two diagonal Gaussians, (mean, log_std) each."""
    return Gaussian(*conditional).guided(Gaussian(*unconditional), weight)[:2]


def make_model(scale=1.0, dtype=torch.float64, **config):
    return randomize(NTM(NTMConfig(**TINY | config)), scale).to(dtype)


def make_images(batch):
    return torch.rand(batch, 1, 4, 6) * 2 - 1


def make_text(batch):
    return torch.randint(2, TINY["vocab_size"], (batch, TINY["text_len"]))


def make_trajectory(model, batch=3, steps=3):
    """x (B, T+1, N, D), ts (B, T+1) and text; no two examples have the same times."""
    dtype = model.predictor.head.weight.dtype
    ts = time_grid(steps, torch.linspace(0.01, 0.05, batch, dtype=dtype), model.config.num_tokens, shift=1.0)
    x0 = torch.rand(batch, model.config.num_tokens, model.config.token_dim, dtype=dtype) * 2 - 1
    return forward_trajectory(x0, ts), ts, make_text(batch)


def changed(before, after):
    """The (row, column)s that hold any number which is not the same to the last bit."""
    return {tuple(place) for place in (before != after).flatten(2).any(2).nonzero().tolist()}


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


@pytest.mark.parametrize("pairs", [False, True])
def test_loss_is_the_mean_nll_per_dimension_per_step(pairs):
    model = make_model(pairs=pairs)
    images, text, (steps, ts, noise) = make_images(3).double(), make_text(3), model.randomness(3)
    ts, noise = ts.double(), noise.double()
    loss = model(images, text, (steps, ts, noise))
    assert loss.shape == () and loss.dtype == torch.float64
    x = forward_trajectory(model.patchify(images), ts, noise=noise)
    nll = [model.step_nll(x[:, k], x[:, k + 1], ts[:, k], ts[:, k + 1], steps, text) for k in range(ts.shape[1] - 1)]
    assert len(nll) == (1 if pairs else 4)
    torch.testing.assert_close(loss, sum(nll).mean() / len(nll) / 24)
    assert model(images, text, (steps, ts, noise)) == loss  # no randomness but the draws
    assert model(images, text) != model(images, text)


@torch.no_grad()
def test_pairs_and_trajectories_have_the_same_expectation():
    model, images, text = make_model(scale=0.5, dtype=torch.float32), make_images(128), make_text(128)

    def mean_and_standard_error(passes):
        losses = torch.stack([model(images, text) for _ in range(passes)])
        return losses.mean(), losses.std() / passes**0.5

    whole, whole_error = mean_and_standard_error(40)
    _, ts, noise = model.randomness(128)
    x = forward_trajectory(model.patchify(images), ts, noise=noise)
    steps = model.trajectory_nll(x, ts, text)[:, :4].mean(0) / 24
    model.config.pairs = True
    pair, pair_error = mean_and_standard_error(160)
    error = (whole_error**2 + pair_error**2).sqrt()
    assert (whole - pair).abs() < 4 * error
    assert steps.std() > 10 * error  # the four steps differ by so much that drawing them unevenly would show


@pytest.mark.parametrize("pairs", [False, True])
def test_draws_cover_step_counts_times_and_levels(pairs):
    model = make_model(steps=(4, 8), pairs=pairs, max_t_min=0.03)
    seen, mixed = Counter(), 0
    for _ in range(40):
        steps, ts, noise = model.randomness(16)
        T = steps[:, None]
        assert ts.shape == (16, 2 if pairs else T[0] + 1) and noise.shape == (*ts.shape, 6, 4)
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


def test_start_of_a_trajectory_is_uniform_below_max_t_min():
    """Its quantiles; of 4,000 numbers one has a standard error of at most 0.5 / sqrt(4,000) = 0.008."""
    _, ts, _ = make_model(max_t_min=0.04).randomness(4_000)
    found = torch.quantile(ts[:, 0] / 0.04, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]))
    torch.testing.assert_close(found, torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0]), atol=0.04, rtol=0)
    assert (ts[:, 0] > 0).all()  # a posterior has no density at 0


def test_a_batch_has_as_many_of_each_step():
    model, firsts = make_model(pairs=True), Counter()
    for _ in range(200):
        _, ts, _ = model.randomness(16)
        k = (ts[:, 1] * 4).round() - 1
        assert k.unique(return_counts=True)[1].tolist() == [4, 4, 4, 4]
        firsts[k[0].item()] += 1  # of each example any
    assert len(firsts) == 4 and min(firsts.values()) > 25  # 50 expected, with a standard deviation of 6


def test_draws_are_reproducible_from_their_generator():
    model = make_model(steps=(4, 8), pairs=True)
    one, same, other = (model.randomness(3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(one, same))
    assert not torch.equal(one[1], other[1]) and not torch.equal(one[2], other[2])


@pytest.mark.parametrize("parametrization", ["direct", "posterior"])
@pytest.mark.parametrize("pairs", [False, True])
def test_gradient_reaches_every_parameter(parametrization, pairs):
    model = make_model(dtype=torch.float32, parametrization=parametrization, pairs=pairs, steps=(2, 3))
    model(make_images(8), make_text(8)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all() and (parameter.grad != 0).any(), name


def test_gradient_is_the_slope_of_the_loss():
    """Nothing is cut off: not u_t, through which a step's Gaussian depends on the transporter."""
    model = make_model(scale=0.7)
    images, text, draws = make_images(3).double(), make_text(3), model.randomness(3)
    model(images, text, draws).backward()
    for network in "transporter", "predictor":
        parameters = {name: p for name, p in model.named_parameters() if name.startswith(network)}
        direction = {name: torch.randn_like(p) for name, p in parameters.items()}

        def loss(h):
            moved = {name: p + h * direction[name] for name, p in parameters.items()}
            return functional_call(model, moved, (images, text, draws))

        slope = sum((p.grad * direction[name]).sum() for name, p in parameters.items())
        torch.testing.assert_close((loss(1e-6) - loss(-1e-6)) / 2e-6, slope, rtol=1e-5, atol=0)


def test_loss_is_float32_under_bfloat16():
    model, images, text = make_model(scale=0.5, dtype=torch.float32), make_images(16), make_text(16)
    draws = model.randomness(16)
    exact = model(images, text, draws)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(images, text, draws)
        gaussian = model.predict(torch.randn(2, 6, 4), *torch.rand(3, 2), text[:2])
    assert all(a.dtype == torch.float32 for a in (rough, *gaussian))
    assert rough != exact  # the layers did run in bfloat16
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0.02)


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


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 4.0])
def test_guided_gaussian_is_the_normalised_product_of_powers(weight):
    mean_c, log_std_c = torch.tensor([[0.3, -1.0, 0.0], [-0.4, -1.2, 0.0]]).double()
    mean_u, log_std_u = torch.tensor([[-0.5, 0.2, 1.0], [-0.1, 0.3, 0.0]]).double()  # the last as wide as its partner
    mean, log_std = guide((mean_c, log_std_c), (mean_u, log_std_u), weight)
    x = torch.linspace(-20, 20, 40_001, dtype=torch.float64)[:, None]
    log_density = ((1 + weight) * Normal(mean_c, log_std_c.exp()).log_prob(x)
                   - weight * Normal(mean_u, log_std_u.exp()).log_prob(x))
    p = log_density.softmax(0)
    torch.testing.assert_close(mean, (p * x).sum(0))
    torch.testing.assert_close(log_std.exp(), (p * (x - mean)**2).sum(0).sqrt())


@pytest.mark.parametrize("weight", [0.5, 4.0])
def test_guidance_keeps_the_spread_where_the_caption_widens_it(weight):
    mean, log_std = guide((torch.tensor(0.3), torch.tensor(-0.2)), (torch.tensor(-0.5), torch.tensor(-0.9)), weight)
    torch.testing.assert_close(mean, torch.tensor(0.3 + weight * 0.8))
    torch.testing.assert_close(log_std, torch.tensor(-0.2))


def test_no_guidance_is_the_conditional_itself():
    conditional, unconditional = torch.randn(2, 2, 3, 6, 4)
    assert torch.equal(torch.stack(guide(conditional, unconditional, 0.0)), conditional)


@torch.no_grad()
@pytest.mark.parametrize("guidance", [0.0, 1.5])
def test_sampling_is_ancestral(guidance):
    model, text, noise = make_model(scale=0.5), make_text(2), torch.randn(2, 4, 6, 4).double()
    ts, null = torch.tensor([0.02, 0.3, 0.6, 1.0]).double(), torch.tensor([[1, 0, 0], [1, 0, 0]])
    u = [noise[:, 3]]
    for t, s, z in zip([1.0, 0.6, 0.3], [0.6, 0.3, 0.02], noise.unbind(1)[2::-1]):
        step = torch.tensor([t, t]).double(), torch.tensor([s, s]).double(), torch.tensor([3, 3])
        mean, log_std = guide(model.predict(u[0], *step, text), model.predict(u[0], *step, null), guidance)
        u.insert(0, mean + log_std.exp() * z)
    before = noise.clone()
    torch.testing.assert_close(model.sample(text, ts, guidance, noise=noise), torch.stack(u, 1), rtol=1e-12, atol=1e-12)
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


def test_null_caption_is_the_id_1_and_padding():
    text = torch.tensor([[5, 6, 7], [8, 0, 0]])
    assert null_caption(text).tolist() == [[1, 0, 0], [1, 0, 0]] and text[0, 0] == 5
    assert torch.equal(null_caption(text), get_tokenizer().encode(["", " "], 3))  # what training drops captions to


def test_guidance_does_nothing_to_the_null_caption():
    model, null, noise = make_model(scale=0.5), torch.tensor([[1, 0, 0]]), torch.randn(1, 5, 6, 4).double()
    ts = time_grid(4, 0.02, 6, 1.0).double()
    torch.testing.assert_close(model.sample(null, ts, 3.0, noise=noise), model.sample(null, ts, noise=noise))


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


# ---------------------------------------------------------------------------------------------------------------
# Where everything is known: x_0 ~ N(m, v) for every number by itself, and its exact reverse as the predictor

MEAN, VARIANCE = torch.tensor([[[0.3], [-0.7]], [[0.05], [1.5]]]).double()  # each (N, D), of two tokens of one number


def exact_reverse(x_t, t, s, steps, text):
    """Mean and log-std of x_s given x_t: both are Gaussian, with covariance alpha Var(x_s)."""
    t, s = t[:, None, None], s[:, None, None]
    variance_s, variance_t = ((1 - a)**2 * VARIANCE + a**2 for a in (s, t))
    shared = (1 - t) / (1 - s) * variance_s
    mean = (1 - s) * MEAN + shared / variance_t * (x_t - (1 - t) * MEAN)
    return mean, 0.5 * torch.log(variance_s - shared**2 / variance_t)


def exact_model():
    model = NTM(NTMConfig(**TINY | dict(image_size=(1, 2), patch_size=1))).double()  # its transporter is the identity
    model.predict = exact_reverse
    return model


def levels_mean_and_covariance(ts):
    """Of (x_{t_0}, ..., x_{t_T}), for each token: (N, T+1) and (N, T+1, T+1)."""
    a = 1 - ts
    return MEAN * a, VARIANCE[:, :, None] * a[:, None] * a + covariance(ts)


def test_pure_noise_is_left_out_of_the_transporter_without_a_difference(monkeypatch):
    """Of whole trajectories, and of the only step there is: in training, likelihood, and back-propagation to x."""
    for settings in dict(pairs=False), dict(steps=1, pairs=True):
        model, levels = make_model(**settings), []
        text, randomness = make_text(3), model.randomness(3)
        T, ts, noise = randomness
        x = forward_trajectory(torch.randn(3, *noise.shape[2:]).double(), ts, noise=noise).requires_grad_()
        found = [model.transitions(x, ts, text, T, from_noise)[0] for from_noise in (True, False)]
        torch.testing.assert_close(*found, rtol=1e-12, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(nll.sum(), x)[0] for nll in found), rtol=1e-9, atol=1e-9)
        forward = model.transporter.forward
        monkeypatch.setattr(model.transporter, "forward", lambda x, *args: levels.append(len(x)) or forward(x, *args))
        model(make_images(3).double(), text, randomness)
        model.trajectory_nll(x, ts, text)
        assert levels == [3 * (ts.shape[1] - 1)] * 2


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


@pytest.mark.parametrize("t_min, restarts", [(0.0, 0), (0.04, 0), (0.04, 1), (0.04, 2)])
def test_exact_reverse_samples_the_exact_trajectories(t_min, restarts):
    """And a step that is taken again, from noise added anew, leaves them as they are, all levels together."""
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

    x = exact_model().sample(make_text(draws + 1), ts, restarts=restarts, randn=randn)[..., 0]
    assert drawn == draws
    mean, factor = x[draws].T, (x[:draws] - x[draws]).permute(2, 1, 0)
    expected_mean, expected_cov = levels_mean_and_covariance(ts)
    torch.testing.assert_close(mean, expected_mean)
    torch.testing.assert_close(factor @ factor.mT, expected_cov)


@torch.no_grad()
def test_a_restart_adds_the_noise_in_x_space():
    model, text = make_model(scale=0.5), make_text(2)
    ts, drawn = torch.tensor([0.02, 0.3, 0.6, 1.0]).double(), []
    first = torch.randn(2, 4, 6, 4).double()

    def randn(*shape):
        drawn.append(torch.randn(2, *shape).double())
        return drawn[-1]

    once, again = (model.sample(text, ts, 1.0, restarts=n, noise=first, randn=randn) for n in (0, 1))
    before, after = model.invert(once, ts), model.invert(again, ts)
    assert (before - once).abs().max() > 0.1  # the transporter is no identity
    noise = next(draw for draw in drawn if draw.shape[1:] == (2, 6, 4))
    x = before[:, 1]
    for k in (2, 3):
        alpha, beta = forward_kernel(ts[k], ts[k - 1])
        x = alpha * x + beta * noise[:, k - 2]
        torch.testing.assert_close(after[:, k], x)
    assert (after[:, 1] - before[:, 1]).abs().max() > 0.1


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
    u0, target = model.distillation_pair(x, ts, text)
    torch.testing.assert_close(u0, model.transporter(x[:, 0], ts[:, 0], three)[0].detach())
    torch.testing.assert_close(target[2], expected.detach())


def test_score_denoising_in_parts_that_fit(monkeypatch):
    model = make_model(scale=0.5)
    x, ts, text = make_trajectory(model, batch=5, steps=3)
    whole, asked = model.score_denoise(x, ts, text, chunk=5), []
    monkeypatch.setattr(NTMConfig, "examples_at_once", lambda *args, **kwargs: asked.append((args[1:], kwargs)) or 2)
    torch.testing.assert_close(model.score_denoise(x, ts, text), whole)
    assert asked == [((3,), {})]  # for trajectories of three steps


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


@pytest.mark.parametrize("setting, named", [(dict(image_size=(4, 7)), "4x7"), (dict(parametrization="flow"), "flow"),
                                            (dict(max_t_min=0.25), "0.25"), (dict(steps=(4, 20)), "20 steps"),
                                            (dict(max_t_min=-0.1), "-0.1")])
def test_impossible_settings_are_named(setting, named):
    with pytest.raises(ValueError, match=named):
        NTMConfig(**TINY | setting)


@pytest.mark.parametrize("setting", [dict(heads=3), dict(transporter_heads=3)])
def test_heads_must_divide_the_width(setting):
    with pytest.raises(ValueError, match="16 .* 3 heads"):
        NTM(NTMConfig(**TINY | setting))


def test_trajectories_that_fit():
    """4 GB / (13 x 4 bytes x units); of one layer at a time without gradients."""
    config = NTMConfig(image_size=32, patch_size=2, text_len=77, width=1024, depth=24, transporter_width=512,
                       transporter_blocks=4, transporter_layers=2, shift=1.0)
    units = 4 * 24 * (77 + 256) * 1024 + 5 * 8 * 256 * 512
    assert config.examples_at_once(4) == int(4e9 / 52 / units) == 2
    assert config.examples_at_once(4, gradients=False) == int(4e9 / 52 / (4 * (77 + 256) * 1024 + 5 * 256 * 512)) == 38
    assert config.examples_at_once(1000) == 1  # never none


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
    assert model.config.max_t_min == 0.05 and model.config.steps == (4,)


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


@pytest.mark.parametrize("setting", ["width", "patch_size", "transporter_layers", "steps"])
def test_a_size_below_one_is_named(setting):
    with pytest.raises(ValueError, match=f"{setting} is 0, but must be at least 1"):
        NTMConfig(**{setting: 0})


@pytest.mark.parametrize("network", [Denoiser, FlowMatching])
def test_only_a_predictor_can_be_left_out(network):
    with pytest.raises(ValueError, match="depth is 0, but must be at least 1"):
        network(NTMConfig(depth=0))


@pytest.mark.parametrize("weight", [1.0, 3e7, 1e9, 1e12])
def test_guidance_keeps_its_digits_in_float32(weight):
    """Of sigma_c a little below sigma_u, where 1 + w - w r loses all digits to cancellation."""
    generator = torch.Generator().manual_seed(0)
    mean_c, mean_u, log_std_u = torch.randn(3, 1000, generator=generator)
    log_std_c = log_std_u - 10 ** (-4 * torch.rand(1000, generator=generator) - 1)
    pairs = (mean_c, log_std_c), (mean_u, log_std_u)
    mean, log_std = guide(*pairs, weight)
    (c, log_c), (u, log_u) = ((a.double(), b.double()) for a, b in pairs)
    precision_c, precision_u = torch.exp(-2 * log_c), torch.exp(-2 * log_u)
    precision = (1 + weight) * precision_c - weight * precision_u  # of p_c^(1+w) / p_u^w
    expected = ((1 + weight) * precision_c * c - weight * precision_u * u) / precision
    torch.testing.assert_close(log_std, (-0.5 * precision.log()).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(mean, expected.float(), rtol=1e-2, atol=1e-2)


# ---------------------------------------------------------------------------------------------------------------
# No predictor


def test_one_step_without_a_predictor_is_a_flow_of_the_image_alone():
    """The bound is the exact -log p(x_{t_0}): a standard normal's, by autograd's full Jacobian."""
    config = NTMConfig(image_size=4, width=8, heads=2, depth=0, steps=1, transporter_width=8, transporter_heads=2)
    model = randomize(NTM(config), 0.5).double()
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
    for wrong in dict(rank=2), dict(parametrization="posterior"):
        with pytest.raises(ValueError, match="depth is 0"):
            replace(config, **wrong)
