"""A last level that is not fresh noise: Eqs. (35) and (36), the bound they leave, and training on them."""
import math

import pytest
import torch
from conftest import randomize
from helpers import SHORT, SMALL, TRAIN, contents, fails, interrupted_run, read_log, run, same_training
from torch.distributions import Normal

import evaluate
from flow import forward_trajectory, reverse_posterior, time_grid
from model import NTM, NTMConfig

TINY = dict(image_size=(4, 6), channels=1, patch_size=2, vocab_size=9, text_len=3, width=16, depth=1, heads=2,
            shift=1.0, transporter_blocks=0, parametrization="posterior", pairs=True, closed_form=True, rank=2)
MEAN, STD = 0.3, 0.4  # of Gaussian data


def make_model(scale=0.3, **config):
    return randomize(NTM(NTMConfig(**TINY | dict(first_noise=0.2) | config)), scale).double()


def make_text(batch):
    return torch.randint(2, 9, (batch, 3))


def drawn(model, x0, ts, text, noise=None):
    """A trajectory of q, x_1 included."""
    return model.coupled(forward_trajectory(x0, ts, noise=noise), ts, text)


def exact_velocity(u, t, s, steps, text):
    """noise - E[x_0 | x_t] of Gaussian data, and no correction to the scale."""
    t = t[:, None, None]
    x0 = MEAN + (1 - t) * STD**2 / ((1 - t) ** 2 * STD**2 + t**2) * (u - (1 - t) * MEAN)
    return (u - x0) / t, torch.zeros_like(u)


@pytest.fixture
def exact(monkeypatch):
    model = make_model(rank=0)
    monkeypatch.setattr(model.predictor, "forward", exact_velocity)
    return model


@pytest.mark.parametrize("level", [0.5, 0.75, 0.9])
def test_the_flow_carries_gaussian_data_to_its_noise(exact, level):
    """Where the velocity is exact, x_s = (1 - s) m + sqrt((1 - s)^2 v + s^2) z flows to z."""
    s, z = torch.full((5,), level).double(), torch.randn(5, 6, 4).double()
    x = (1 - level) * MEAN + math.hypot((1 - level) * STD, level) * z
    torch.testing.assert_close(exact.flowed_to_noise(x, s, make_text(5)), z, atol=0.003, rtol=0.003)
    levels, ts = torch.stack([x, torch.full_like(x, 10)], dim=1), torch.stack([s, torch.ones_like(s)], dim=1)
    x = exact.coupled(levels, ts, make_text(5))
    torch.testing.assert_close(x[:, 1], math.sqrt(1 - 0.2**2) * z + 0.2 * 10, atol=0.003, rtol=0.003)


def test_the_flow_is_the_estimates_of_each_level():
    """Two midpoint steps, of a velocity asked for as the model is trained on it: from t to s t."""
    model, x, text = make_model(), torch.randn(3, 6, 4).double(), make_text(3)
    s = torch.tensor([0.3, 0.5, 0.75]).double()

    def velocity(x, t):  # x_0 = x - t v is where the mean of Eq. (25) points
        A, B, _ = (a[:, None, None] for a in reverse_posterior(t, s * t))
        mean = model.predict(x, t, s * t, torch.full((3,), 4), text)[0]
        return (x - (mean - A * x) / B) / t[:, None, None]

    h, expected = ((1 - s) / 2)[:, None, None], x
    for t in (s, (1 + s) / 2):
        expected = expected + h * velocity(expected + h / 2 * velocity(expected, t), t + (1 - s) / 4)
    torch.testing.assert_close(model.flowed_to_noise(x, s, text), expected)


def test_only_a_last_level_of_pure_noise_is_coupled():
    model, x0, text = make_model(), torch.randn(4, 6, 4).double(), make_text(4)
    ts = torch.tensor([[0.5, 0.75], [0.75, 1], [0.25, 0.5], [0.75, 1]]).double()
    noise = torch.randn(4, 2, 6, 4).double()
    fresh, coupled = forward_trajectory(x0, ts, noise=noise), drawn(model, x0, ts, text, noise)
    assert torch.equal(coupled[:, 0], fresh[:, 0]) and torch.equal(coupled[::2], fresh[::2])
    correlations = [torch.corrcoef(torch.stack([levels[1::2, 1].flatten(), noise[1::2, 1].flatten()]))[0, 1]
                    for levels in (fresh, coupled)]
    assert correlations[0] > 0.999 and correlations[1] < 0.7
    plain = make_model(first_noise=1.0)
    assert torch.equal(drawn(plain, x0, ts, text, noise), fresh)


def test_the_bound_counts_what_the_last_level_tells(monkeypatch):
    """-log p(x_{t_0:T}) + log q(x_{t_1:T} | x_{t_0}), each factor by torch's own normal distribution."""
    model, text = make_model(), make_text(3)
    ts = time_grid(4, 0.02, 6, shift=1.0).double().expand(3, -1)
    fresh = forward_trajectory(torch.randn(3, 6, 4).double(), ts)
    x, (nll, bound) = model.coupled(fresh, ts, text), model.trajectory_bound(fresh, ts, text)
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
    x0, text = MEAN + STD * torch.randn(n, 6, 4).double(), make_text(n)
    ts = torch.tensor([[0.75, 1.0]]).double().expand(n, 2)
    x = forward_trajectory(x0, ts)
    scale = math.hypot(0.25 * STD, 0.75)
    truth = -Normal(0.25 * MEAN, scale).log_prob(x[:, 0]).sum(dim=(1, 2))

    def bound(std):
        def predict(u, *_):
            return 0.25 * MEAN + scale * math.sqrt(1 - c**2) * u, torch.full_like(u, math.log(std))
        exact.predict = predict
        return exact.trajectory_bound(x, ts, text)[1]

    torch.testing.assert_close(bound(scale * c), truth, atol=0.02, rtol=0)
    surplus = (bound(2 * scale * c) - truth).mean().item() / 24
    assert surplus == pytest.approx(math.log(2) - 0.5 * (1 - 1 / 4), abs=0.02)


def test_at_the_start_the_first_step_is_eulers():
    """Of a velocity that is not trained yet on it: x_s = x_1 - (1 - s) v, but for c."""
    model, c = make_model(), 0.2
    x, one, text = torch.randn(3, 6, 4).double(), torch.ones(3).double(), make_text(3)
    mean, log_std, _ = model.predict(x, one, one * 0.75, torch.full((3,), 4), text)
    v, delta, *_ = model.predictor(x, one, one * 0.75, torch.full((3,), 4), text)
    torch.testing.assert_close(mean, 0.75 * math.sqrt(1 - c**2) * x + 0.25 * (x - v))
    torch.testing.assert_close(log_std, math.log(c * 0.75) + delta * 0.5 * math.log(1 + (0.25 / (c * 0.75)) ** 2))


def test_a_batch_has_as_many_of_each_pair_and_of_the_flows():
    model = make_model(max_t_min=0.04)
    _, ts, noise = model.randomness(50, generator=torch.Generator().manual_seed(0))
    assert noise.shape == (50, 2, 6, 4)
    grid = [tuple(pair) for pair in ts.tolist() if pair[1] in (0.25, 0.5, 1.0) or pair == [0.5, 0.75]]
    flow = [tuple(pair) for pair in ts.tolist() if tuple(pair) not in grid]
    assert len(grid) == 40 and len(flow) == 10 and sum(t == 1 for _, t in grid) == 10
    assert {t for _, t in flow} == {0.75, 0.8125, 0.875, 0.9375} and all(s == 0.75 * t for s, t in flow)


@pytest.mark.parametrize("batch", [3, 23, 50])
def test_training_couples_every_example_that_ends_at_noise_and_no_other(batch):
    """Found without a look at the times, for that would wait for a GPU: as many as a batch may have."""
    model, images, text = make_model(), torch.rand(batch, 1, 4, 6).double(), make_text(batch)
    for seed in range(5):
        steps, ts, noise = model.randomness(batch, generator=torch.Generator().manual_seed(seed))
        ts, noise = ts.double(), noise.double()
        expected = drawn(model, model.patchify(images), ts, text, noise)[:, -1]
        expected, before = torch.where(ts[:, -1, None, None] == 1, expected, noise[:, -1]), noise[:, 0].clone()
        model.couple(images, text, (steps, ts, noise))
        torch.testing.assert_close(noise[:, -1], expected)
        assert torch.equal(noise[:, 0], before)


@pytest.mark.parametrize("rank", [0, 2])
def test_the_loss_of_the_first_step_is_of_levels_as_drawn(rank):
    """Elsewhere closed form; there -log p(x_s | x_1) itself."""
    model, images, text = make_model(rank=rank), torch.rand(6, 1, 4, 6).double(), make_text(6)
    ts = torch.tensor([[0.75, 1]]).double().expand(6, 2)
    x = drawn(model, model.patchify(images), ts, text)
    times, steps = ts[..., None, None], torch.full((6,), 4)
    noise = (x - (1 - times) * model.patchify(images)[:, None]) / times
    nll = model.step_nll(x[:, 0], x[:, 1], ts[:, 0], ts[:, 1], steps, text)
    torch.testing.assert_close(model(images, text, (steps, ts, noise)), nll.mean() / 24)


def test_captions_are_compared_with_levels_of_their_own(monkeypatch):
    model, x0 = make_model(), torch.randn(2, 6, 4).double()
    ts = time_grid(4, 0.02, 6, shift=1.0).double().expand(2, -1)
    x, candidates = forward_trajectory(x0, ts), torch.randint(2, 9, (2, 3, 3))
    found = evaluate.caption_log_likelihoods(model, x, ts, candidates)
    for k in range(3):
        torch.testing.assert_close(found[:, k], -model.trajectory_bound(x, ts, candidates[:, k])[1])
    assert (found[:, 0] - found[:, 1]).abs().min() > 1e-3


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """Of an NTM with a coupled first step, from a flow-matching model of 6 iterations."""
    base = tmp_path_factory.mktemp("base")
    run("train.py", *SHORT, *SMALL, "--shift=1", "--objective=fm", f"--out_dir={base}")
    return [*SHORT, *SMALL, "--shift=1", "--transporter_blocks=0", "--closed_form=True", "--aux_weight=0", "--rank=2",
            f"--init_from={base / 'ckpt.pt'}", "--first_noise=0.2"]


def test_training_sampling_and_likelihood(settings, tmp_path):
    run("train.py", *settings, "--velocity_weight=1", f"--out_dir={tmp_path}")
    assert contents(tmp_path / "ckpt.pt")["model_config"]["first_noise"] == 0.2
    first, *_, last = (line for line in read_log(tmp_path / "log.jsonl") if "val_bound" in line)
    assert last["val_step_3"] < first["val_step_3"] < 1 and math.isfinite(last["val_bound"])
    run("distill.py", *SHORT, *SMALL, f"--out_dir={tmp_path}")
    _, printed = run("sample.py", "--device=cpu", "--num_samples=4", f"--out_dir={tmp_path}", "--restarts=1")
    assert "learned denoising" in printed and "sampling in 5 steps" in printed
    _, printed = run("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", "--val_examples=20",
                     "--parts=likelihood,classifier")
    assert "bound of 4 trajectories" in printed and "accuracy" in printed
    load = evaluate.TrainedModel(tmp_path, "cpu")
    log_p = load.log_likelihood(torch.zeros(2, 1, 8, 8), ["the digit one", "the digit two"])
    assert log_p.nats.isfinite().all() and (log_p.nats[0] - log_p.nats[1]).abs() > 0


def test_restarts_leave_a_coupled_trajectory(settings, tmp_path):
    """They draw x_1 anew, and what reads the trajectory wants one that follows from the level before."""
    run("train.py", *settings, f"--out_dir={tmp_path}", "--max_iters=60", "--warmup_iters=5")
    model = evaluate.TrainedModel(tmp_path, "cpu", denoise="score")
    sampled = [model.sample_trajectories(["the digit one"] * 20, range(20), levels=True, restarts=n) for n in (0, 1)]
    (once, x, nll), (again, x_again, nll_again) = sampled
    assert not torch.equal(x_again[:, :2], x[:, :2]) and (nll_again - nll).abs().mean() < 20
    follows = model.network.flowed_to_noise(x_again[:, -2], torch.full((20,), model.ts[-2]), model.encode(["the digit one"] * 20))
    assert torch.corrcoef(torch.stack([x_again[:, -1].flatten(), follows.flatten()]))[0, 1] > 0.95


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_score_denoising_is_of_the_steps_before_a_coupled_one(steps):
    """As if x_1 were not there: E[x_0 | the other levels]; where it is all there is, the plain one."""
    model, x0, text = make_model(), torch.randn(3, 6, 4).double(), make_text(3)
    ts = time_grid(steps, 0.02, 6, shift=1.0).double().expand(3, -1)
    x = drawn(model, x0, ts, text).requires_grad_()
    T, last = torch.full((3,), steps), max(1, steps - 1)
    nll = sum(model.step_nll(x[:, k], x[:, k + 1], ts[:, k], ts[:, k + 1], T, text).sum() for k in range(last))
    g, = torch.autograd.grad(nll, x)
    weights = torch.tensor([0.02**2 * (1 - t) / (1 - 0.02) for t in ts[0].tolist()])
    expected = (x[:, 0] - torch.einsum("j,bjnd->bnd", weights.double(), g)) / (1 - 0.02)
    torch.testing.assert_close(model.score_denoise(x.detach(), ts, text), expected.detach(), rtol=1e-5, atol=1e-7)


def test_candidates_see_a_coupled_step_where_that_is_all_there_is():
    """Of two steps the first alone scores them: of an x_1 that follows from the level before."""
    model, x0, text, noise = make_model(), torch.randn(4, 6, 4).double(), make_text(4), torch.randn(2, 3, 6, 4).double()
    ts, T = time_grid(2, 0.02, 6, shift=1.0).double(), torch.full((4,), 2)
    levels = [drawn(model, x0, ts.expand(4, -1), text, one.expand(4, -1, -1, -1)) for one in noise]
    nll = sum(model.step_nll(x[:, 1], x[:, 2], *ts[1:, None].expand(2, 4), T, text) for x in levels) / 2
    torch.testing.assert_close(model.guided_score(x0, ts, text, 0.0, noise), -nll)


def test_it_resumes_bit_for_bit(settings, tmp_path):
    run("train.py", *settings, f"--out_dir={tmp_path / 'whole'}")
    interrupted_run(NTM, 3, "train.py", *settings, f"--out_dir={tmp_path / 'parts'}")
    run("train.py", *SHORT, f"--out_dir={tmp_path / 'parts'}", "--resume=yes")
    assert same_training(tmp_path / "parts" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")


def test_what_it_needs_is_said(settings, tmp_path):
    needs = "which needs a start from flow matching"
    for other in ["--pairs=False"], ["--closed_form=False", "--transporter_blocks=1"], ["--steps=2,4"]:
        assert f"first_noise is 0.2, {needs}" in fails("train.py", *settings, *other, f"--out_dir={tmp_path}")
    assert needs in fails("train.py", *TRAIN, "--first_noise=0.2", f"--out_dir={tmp_path}")
    line = fails("train.py", *settings, "--first_noise=0", f"--out_dir={tmp_path}")
    assert "first_noise is 0.0, but must be above 0" in line
