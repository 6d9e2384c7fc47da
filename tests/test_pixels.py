"""A step's flow over pixels is a density, a mirrored pair has the mean of its loss, and its samples are its own."""
import json
import math
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import randomize
from helpers import SHORT, SMALL, contents, copies, fails, run
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

from beyond import CoupledConfig, CoupledNTM, known_step
from evidence import transporter
from flow import forward_trajectory
from losses import TrainingLoss
from model import NTM
from pixels import Filter, PixelConfig, PixelNTM, StepFlow, causal_mask, make_mixture, start_of_mixture
from predictor import null_caption
from start import take_weights

# 2 x 3 patches of 2 x 2 pixels of two channels: 6 tokens of 8 numbers
TINY = dict(image_size=(4, 6), channels=2, patch_size=2, vocab_size=9, text_len=3, width=16, depth=1, heads=2, shift=1.0,
            transporter_blocks=0, parametrization="posterior")
KINDS = [dict(filters=3, filter_window=3, rank=2), dict(filters=2), dict(logistics=4, rank=2), dict(logistics=1),
         dict(filters=2, filter_window=3, logistics=3), dict(filters=3, logistics=4, rank=3)]


def make_model(kind=PixelNTM, scale=0.4, **config):
    return randomize(kind(kind.config_class(**TINY | config)), scale).double()


def a_step(model, batch=1, guided=False):
    """The distribution of a step from random levels, and a caption's."""
    u, text = torch.randn(batch, 6, 8).double(), torch.randint(2, 9, (batch, 3))
    t, s, steps = torch.full((batch,), 0.5).double(), torch.full((batch,), 0.25).double(), torch.full((batch,), 4)
    step = model.predict(u, t, s, steps, text)
    return (step, model.predict(u, t, s, steps, null_caption(text))) if guided else step


def covariance_of(step):
    """Of the Gaussian of one step, dense."""
    std = torch.diag(torch.exp(step.log_std[0]).flatten())
    covariance = std @ std
    if step.directions is not None:
        V = step.directions[0].flatten(1) @ std
        covariance = covariance + V.T @ V
    return covariance


def drawn_for(step, x):
    """K sigma h((x - mean) / sigma), like x."""
    residual = x - step.mean
    if step.mixture:
        residual = step.mixture.map(residual / step.log_std.exp())[0] * step.log_std.exp()
    return step.filtered(residual)


@pytest.mark.parametrize("config", KINDS)
def test_a_step_is_a_density(config):
    """The change of variables by autograd's full Jacobian, the Gaussian by its dense covariance."""
    step = a_step(make_model(**config))
    x = torch.randn(1, 6, 8).double()
    J = jacobian(lambda a: drawn_for(step, a), x).view(48, 48)
    gaussian = MultivariateNormal(torch.zeros(48).double(), covariance_of(step))
    expected = -gaussian.log_prob(drawn_for(step, x).flatten()) - torch.linalg.slogdet(J)[1]
    torch.testing.assert_close(step.nll(x)[0], expected, rtol=1e-8, atol=1e-8)
    assert (J - torch.eye(48)).abs().max() > 0.05  # it is no identity


def test_no_two_logistics_start_alike():
    starts = start_of_mixture(5).view(3, 5)
    assert starts[2].tolist() == [0, -1, 1, -2, 2] and start_of_mixture(1).tolist() == [0, 0, 0]


def test_the_density_of_one_number_integrates_to_one():
    """Trapezoids on a grid, of a step whose image is a single number."""
    config = TINY | dict(image_size=(1, 1), patch_size=1, channels=1, logistics=4)
    model = randomize(PixelNTM(PixelConfig(**config)), 0.5).double()
    grid = torch.linspace(-40, 40, 80_001).double()
    count = len(grid)
    u, text = torch.zeros(count, 1, 1).double(), torch.full((count, 3), 2)
    t, s = torch.full((count,), 0.5).double(), torch.full((count,), 0.25).double()
    step = model.predict(u, t, s, torch.full((count,), 4), text)
    density = torch.exp(-step.nll(grid.view(-1, 1, 1)))
    assert abs(torch.trapezoid(density, grid) - 1) < 1e-6
    gaussian = torch.exp(-step._replace(mixture=None).nll(grid.view(-1, 1, 1)))
    assert (density - gaussian).abs().max() > 0.05 * gaussian.max()


@pytest.mark.parametrize("kind, blocks", [(PixelNTM, 0), (CoupledNTM, 0), (PixelNTM, 2)])
def test_a_mirrored_pair_has_the_mean_of_the_loss_and_less_noise(kind, blocks):
    """Over many draws of x_s for one x_t and x_0; a coupled first step has its x_s alone."""
    torch.manual_seed(3)
    many = 4_000
    flow = dict(filters=2, filter_window=3, logistics=3, rank=2)
    model = make_model(kind, scale=0.1 if blocks else 0.2, transporter_blocks=blocks, **flow)
    images = torch.randn(1, 2, 4, 6).double().expand(many, -1, -1, -1)
    text = torch.full((many, 3), 4)
    ts = torch.tensor([0.25, 0.5]).double().expand(many, -1)
    x0 = model.patchify(images)
    x_t = forward_trajectory(x0[:1], ts[:1, 1:])
    x = torch.stack([x0, x_t[:, 0].expand(many, -1, -1)], dim=1)
    mean, std = known_step(model, x, x0, ts)
    x[:, 0] = mean[:, 0] + std[..., None] * torch.randn(many, 6, 8).double()
    steps = torch.full((many,), 4)
    plain = model.transition_nll(x, ts, steps, text)[:, 0].detach() / 48
    config = dict(closed_form=False, mirrored=True, level_weight=0.0, velocity_weight=0.0, max_t_min=0.05)
    assert TrainingLoss(model, config).ours
    pairs = []
    for rows in torch.arange(many).split(40):
        drawn = steps[rows], ts[rows], x[rows]
        pairs.append(TrainingLoss(model, config)(images[rows], text[rows], drawn)["nll"].item())
    pairs = torch.tensor(pairs)
    error = math.sqrt(pairs.var() / len(pairs) + plain.var() / many)
    assert abs(pairs.mean() - plain.mean()) < 4 * error
    assert pairs.std() < 0.5 * plain.std() / math.sqrt(40)  # two independent draws: 0.71


@pytest.mark.parametrize("config", KINDS)
def test_noise_along_directions_is_drawn_if_none_is_given(config):
    step = a_step(make_model(**config), batch=3)
    drawn, again = step.sample(torch.zeros_like(step.mean)), step.sample(torch.zeros_like(step.mean))
    assert drawn.shape == step.mean.shape and torch.equal(drawn, again) == (step.directions is None)


@pytest.mark.parametrize("config", KINDS)
def test_samples_are_the_gaussians_carried_back(config):
    model = make_model(**config)
    step, z, xi = a_step(model, batch=3), torch.randn(3, 6, 8).double(), torch.randn(3, model.config.rank).double()
    noise = z if step.directions is None else z + torch.einsum("brnd,br->bnd", step.directions, xi)
    torch.testing.assert_close(drawn_for(step, step.sample(z, xi)), step.log_std.exp() * noise, rtol=1e-7, atol=1e-7)


def test_a_leak_leaves_out_a_share_of_the_sums_in_samples_alone():
    """Samples solve a triangular system of the dense filter; the density does not change."""
    model = make_model(filters=3, filter_window=3, rank=2, filter_leak=0.3)
    step, z, xi = a_step(model), torch.randn(1, 6, 8).double(), torch.randn(1, 2).double()
    K = jacobian(step.filtered, step.mean).view(48, 48)
    drawn = step.gaussian(torch.zeros_like(step.mean)).sample(z, xi).flatten()
    expected = torch.linalg.solve(0.3 * torch.eye(48).double() + 0.7 * K, drawn)
    torch.testing.assert_close((step.sample(z, xi) - step.mean).flatten(), expected, rtol=1e-9, atol=1e-9)
    nll = step.nll(step.mean + z)
    model.config.filter_leak = 0.0
    assert torch.equal(step.nll(step.mean + z), nll)
    assert not torch.allclose((step.sample(z, xi) - step.mean).flatten(), expected)
    with pytest.raises(ValueError, match="filter_leak is 1.5, but must be from 0 to 1"):
        PixelConfig(**TINY | dict(filter_leak=1.5))


def test_errors_of_a_filter_fade_with_a_leak():
    """A filter that takes the sum of two neighbours: without a leak, one error doubles from row to row."""
    model = make_model(filters=1, filter_window=3, filter_leak=0.0, image_size=(24, 2), channels=1, patch_size=1)
    model.filter_kernels.data.zero_()
    model.filter_kernels.data[0, 0, 0, 0] = -1  # the three pixels above
    shape = 1, 48, 1
    ones = torch.ones(1, 1, *shape[1:]).double()
    step = StepFlow(torch.zeros(shape).double(), torch.zeros(shape).double(), None, None, ones, model)
    error = torch.zeros(shape).double()
    error[0, 0] = 1
    assert step.sample(error)[0, -1] == 2**22
    model.config.filter_leak = 0.6
    assert 0 < step.sample(error)[0, -1] < 0.01


def test_guidance_moves_mean_and_deviation_as_without_a_flow():
    model = make_model(filters=2, filter_window=3, logistics=3, rank=2)
    conditional, unconditional = a_step(model, guided=True)
    guided = conditional.guided(unconditional, 1.5)
    plain = conditional.gaussian(conditional.mean).guided(unconditional.gaussian(unconditional.mean), 1.5)
    assert torch.equal(guided.mean, plain.mean) and torch.equal(guided.log_std, plain.log_std)
    assert (guided.mean - conditional.mean).abs().max() > 0.01
    assert guided.mixture is conditional.mixture and guided.weights is conditional.weights


@pytest.mark.parametrize("window", [3, 5, 7])
def test_the_filter_sees_what_comes_before_and_is_undone_exactly(window):
    kernels = 0.3 * torch.randn(2, 3, 3, window, window).double() * causal_mask(3, window)
    K = Filter(torch.randn(2, 2, 3, 5, 4).double(), kernels)
    images = torch.randn(2, 3, 5, 4).double()
    first = Filter(K.weights[:1], kernels)
    J = jacobian(lambda a: first.apply(a[None])[0].permute(1, 2, 0), images[0]).view(60, 3, 20)
    J = J.permute(0, 2, 1).reshape(60, 60)  # numbers in raster order, channels of a pixel together
    assert (J.triu(1) == 0).all() and (J.diagonal() == 1).all() and (J.tril(-1) != 0).any()
    torch.testing.assert_close(K.invert(K.apply(images)), images, rtol=1e-9, atol=1e-9)
    shifted = images.clone()
    shifted[:, :, 2, 1] += 1  # every number has weights of its own
    told = (first.apply(shifted[:1]) - first.apply(images[:1]))[0, :, 2:]
    assert told[:, 1].abs().max() > 0 and not torch.allclose(told[:, 1, 1], told[:, 1, 2])


def test_a_filter_sees_no_further_than_its_window():
    """What a number tells is within the window's radius of it, in rows and columns."""
    kernels = torch.ones(1, 1, 1, 5, 5).double() * causal_mask(1, 5)
    K = Filter(torch.ones(1, 1, 1, 8, 8).double(), kernels)
    single = torch.zeros(1, 1, 8, 8).double()
    single[..., 2, 4] = 1
    rows, columns = torch.nonzero(K.apply(single)[0, 0], as_tuple=True)
    assert rows.min() == 2 and rows.max() == 4 and columns.min() == 2 and columns.max() == 6


@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_the_pointwise_map_is_monotone_and_undone(dtype, tolerance):
    """Even where logistics are far apart and of very different widths."""
    torch.manual_seed(0)
    outputs = [1.5 * torch.randn(7, 1, 1, dtype=dtype) for _ in range(15)]
    whole = make_mixture(outputs, torch.zeros(7, 1, 1, dtype=dtype), torch.full((7,), 0.02, dtype=dtype))
    z = torch.linspace(-6, 6, 4001, dtype=dtype).view(1, -1, 1).expand(7, -1, -1)
    y, log_slope = whole.map(z)
    assert (y.diff(dim=1) > 0).all() or dtype == torch.float32
    if dtype == torch.float64:
        slope = torch.autograd.functional.jvp(lambda a: whole.map(a)[0], z, torch.ones_like(z))[1]
        torch.testing.assert_close(slope.log(), log_slope, rtol=1e-7, atol=1e-7)
    again, _ = whole.map(whole.invert(y))
    torch.testing.assert_close(again, y, rtol=tolerance, atol=tolerance)


def test_no_logistic_is_narrower_than_x_s_is_uncertain():
    narrow = [torch.zeros(2, 1, 1), torch.zeros(2, 1, 1), torch.full((2, 1, 1), -4.0)]
    log_std = torch.tensor([0.0, -2.0]).view(2, 1, 1)
    mixture = make_mixture(narrow, log_std, torch.tensor([0.5, 0.5]))
    scales = (mixture.log_scale.squeeze() + log_std.squeeze()).exp()
    assert 0.5 <= scales[0] < 0.51 and torch.isclose(scales[1], torch.tensor(-2.0).exp())  # sigma below C: sigma


@pytest.mark.parametrize("config", KINDS)
def test_at_first_it_is_nearly_the_gaussian(config):
    """A filter is exactly the identity, and a mixture all but 2% a single logistic of the Gaussian's variance."""
    torch.manual_seed(3)
    model = PixelNTM(PixelConfig(**TINY | config))
    plain = NTM(PixelConfig(**TINY | config | dict(filters=0, logistics=0)))
    of_flow = "filter_kernels", "predictor.flow_heads."
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith(of_flow)})
    u, text, x = torch.randn(2, 6, 8), torch.randint(2, 9, (2, 3)), torch.randn(2, 6, 8)
    given = u, torch.full((2,), 0.5), torch.full((2,), 0.25), torch.full((2,), 4), text
    step, gaussian = model.predict(*given), plain.predict(*given)
    assert torch.equal(step[0], gaussian[0]) and torch.equal(step[1], gaussian[1])  # mean and log_std come first
    if config.get("logistics", 0) < 2:
        torch.testing.assert_close(step.nll(x), gaussian.nll(x))
    near = step.mean + 2 * step.log_std.exp()
    assert (step.nll(near) - gaussian.nll(near)).abs().max() < 0.1 * 48
    step.nll(x).sum().backward()
    for name, head in model.predictor.flow_heads.items():
        assert (head.weight.grad != 0).any(), name  # and it can leave from there


def test_without_map_and_filter_there_is_nothing_of_it():
    model = PixelNTM(PixelConfig(**TINY))
    assert model.state_dict().keys() == NTM(PixelConfig(**TINY)).state_dict().keys()
    assert not isinstance(a_step(model.double()), StepFlow)


def test_a_coupled_model_has_it_too():
    model = make_model(CoupledNTM, filters=2, filter_window=3, logistics=3, rank=2, first_noise=0.2)
    assert isinstance(model, PixelNTM) and issubclass(CoupledConfig, PixelConfig)
    text, ts = torch.randint(2, 9, (3, 3)), model.config.time_grid(0.02).double()
    u = model.sample(text, ts, 1.0, torch.Generator().manual_seed(0))
    nll, bound = model.trajectory_bound(u, ts.expand(3, -1), text)
    assert u.isfinite().all() and nll.isfinite().all() and bound.isfinite().all()
    assert model.score_denoise(u, ts, text).isfinite().all()


def test_map_or_filter_may_be_added_to_a_trained_model():
    torch.manual_seed(5)
    trained = randomize(PixelNTM(PixelConfig(**TINY | dict(filters=2))), 0.3)
    model = PixelNTM(PixelConfig(**TINY | dict(filters=2, logistics=1, rank=3)))
    take_weights(model, trained)
    u, text, x = torch.randn(2, 6, 8), torch.randint(2, 9, (2, 3)), torch.randn(2, 6, 8)
    given = u, torch.full((2,), 0.5), torch.full((2,), 0.25), torch.full((2,), 4), text
    model.predictor.head.weight.data[16:] = 0  # directions start small, not at zero
    torch.testing.assert_close(model.predict(*given).nll(x), trained.predict(*given).nll(x))


@pytest.mark.parametrize("window", [4, 1])
def test_a_window_without_a_centre_or_without_neighbours_is_refused(window):
    with pytest.raises(ValueError, match=f"filter_window is {window}, but must be odd and at least 3"):
        PixelConfig(**TINY | dict(filter_window=window))


@pytest.mark.slow
def test_the_scripts_train_sample_and_measure_with_it(tmp_path):
    base, out = tmp_path / "fm", tmp_path / "ntm"
    run("train.py", *SHORT, *SMALL, "--shift=1", "--objective=fm", f"--out_dir={base}")
    settings = [*SHORT, *SMALL, "--shift=1", "--transporter_blocks=0", "--aux_weight=0", "--rank=2", "--mirrored=True",
                "--velocity_weight=1", f"--init_from={base / 'ckpt.pt'}"]  # the last is left out for a run from scratch
    flow = ["--filters=2", "--filter_window=3", "--logistics=3", "--filter_leak=0.1"]
    for name, kind, more in ("plain", "pixels", []), ("coupled", "coupled", ["--first_noise=0.5"]):
        out = tmp_path / name
        run("train.py", *settings, *flow, *more, f"--out_dir={out}")
        held = contents(out / "ckpt.pt")
        assert held["kind"] == kind and held["model_config"]["filters"] == 2
        for purpose in "filter", "mixture":
            assert (held["model"][f"predictor.flow_heads.{purpose}.weight"] != 0).any()
        run("distill.py", *SHORT, *SMALL, f"--out_dir={out}")
        run("sample.py", "--device=cpu", "--num_samples=2", f"--out_dir={out}")
        _, printed = run("evaluate.py", "--device=cpu", f"--out_dir={out}", "--val_examples=10", "--parts=likelihood")
        assert "bound of 4 trajectories" in printed
    again = [setting for setting in settings if not setting.startswith("--init_from")]
    again.append(f"--init_from={tmp_path / 'plain' / 'ckpt.pt'}")
    run("train.py", *again, f"--out_dir={tmp_path / 'more'}")
    config = contents(tmp_path / "more" / "ckpt.pt")["model_config"]
    assert (config["filters"], config["filter_window"], config["logistics"]) == (2, 3, 3)  # what it starts from has them
    assert config["filter_leak"] == 0.1
    run("train.py", f"--out_dir={tmp_path / 'more'}", "--resume=yes", "--filter_leak=0.2", "--device=cpu", "--max_iters=8")
    assert contents(tmp_path / "more" / "ckpt.pt")["model_config"]["filter_leak"] == 0.2  # it changes samples alone
    line = fails("train.py", *again, "--filters=4", f"--out_dir={tmp_path / 'x'}")
    assert "filters is 4" in line and "fixes it at 2" in line
    line = fails("train.py", *settings, *flow, "--closed_form=True", "--mirrored=False", f"--out_dir={tmp_path / 'x'}")
    assert "closed_form is True" in line and "use mirrored" in line
    scratch = [*settings[:-1], *flow, "--parametrization=posterior", f"--out_dir={tmp_path / 'scratch'}"]
    run("train.py", *scratch, "--aux_weight=2.5")  # which has nothing to stay close to
    run("train.py", *scratch, "--resume=yes", "--max_iters=8")
    held = contents(tmp_path / "scratch" / "ckpt.pt")
    assert held["iter"] == 8 and held["model_config"]["parametrization"] == "posterior" and "frozen" not in held
    line = fails("train.py", *SHORT, "--objective=fm", "--filters=3", f"--out_dir={tmp_path / 'x'}")
    assert "filters 3 is for an NTM" in line


@pytest.mark.slow
def test_what_the_flow_buys_is_measured(tmp_path, monkeypatch):
    """Two variants, in copies of this process, by a clock on which a run takes 5 s and each of its updates 0.01 s."""
    clock = [0.0]
    base, out = tmp_path / "fm", tmp_path / "out"
    run("train.py", *SHORT, *SMALL, "--shift=1", "--objective=fm", f"--out_dir={base}")

    def run_copy(command, **_):
        (status, _, errors), = copies([{}], *command[1:])
        clock[0] += 5 + 0.01 * int(command[-2].removeprefix("--max_iters="))
        return subprocess.CompletedProcess(command, status, stderr=errors)

    monkeypatch.setattr(subprocess, "run", run_copy)
    monkeypatch.setattr(transporter, "TRIAL", 12)
    monkeypatch.setattr(os, "times", lambda: SimpleNamespace(children_user=clock[0], children_system=0.0))
    command = ["transporter", "config/digits_tune.py", "--minutes=0.003", f"--out={out}", "--only=gaussian,all",
               "--device=cpu", f"--init_from={base / 'ckpt.pt'}", "--val_examples=8", "--num_samples=1",
               "--level_weight=1", "--rank=2", "--transporter_blocks=0", "--aux_weight=0"]
    monkeypatch.setattr(sys, "argv", command)
    transporter.main()
    panels = json.loads((out / "transporter.json").read_text())
    assert list(panels) == ["digits_tune"] and list(panels["digits_tune"]) == ["gaussian", "all"]
    assert (out / "transporter.png").exists()
    for curve in panels["digits_tune"].values():
        minutes, bounds = zip(*curve)
        assert minutes == pytest.approx([i * 0.01 / 60 for i in (3, 6, 9, 12, 15, 18)])
        assert all(math.isfinite(bound) for bound in bounds)
    with pytest.raises(ValueError, match="train.py .* failed"):  # there is a run in its folder
        transporter.main()
    monkeypatch.setattr(sys, "argv", [*command, "--only=magic"])
    with pytest.raises(ValueError, match="variant 'magic' is unknown"):
        transporter.main()
