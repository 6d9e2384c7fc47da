"""A step's flow over pixels is a density, its expected loss the mean of the loss, and its samples its own."""
import math

import pytest
import torch
from conftest import randomize
from helpers import SHORT, SMALL, contents, fails, run
from torch.autograd.functional import jacobian
from torch.distributions import MultivariateNormal

from beyond import CoupledConfig, CoupledNTM, expected_nll
from model import NTM
from pixels import PixelConfig, PixelNTM, StepFlow, causal_mask, filtered, filtered_transposed, invert_pointwise, unfiltered
from predictor import null_caption

# 2 x 3 patches of 2 x 2 pixels of two channels: 6 tokens of 8 numbers
TINY = dict(image_size=(4, 6), channels=2, patch_size=2, vocab_size=9, text_len=3, width=16, depth=1, heads=2, shift=1.0,
            transporter_blocks=0, parametrization="posterior")
KINDS = [dict(filter_window=3, rank=2), dict(filter_window=5), dict(logistics=4, rank=2), dict(filter_window=3, logistics=3),
         dict(filter_window=5, logistics=4, rank=3)]


def make_model(kind=PixelNTM, scale=0.4, **config):
    model = randomize(kind(kind.config_class(**TINY | config)), scale).double()
    if config.get("logistics"):
        model.pixels["pointwise"].share.bias.data += 0.4
    return model


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


def residual_of(step, x):
    """K g(x) - K g(mean), flat."""
    images = [step.pointwise(step.images_of(a))[0] if step.pointwise else step.images_of(a) for a in (x, step.mean)]
    difference = images[0] - images[1]
    return step.model.patchify(filtered(difference, step.kernel) if step.kernel is not None else difference).flatten()


@pytest.mark.parametrize("config", KINDS)
def test_a_step_is_a_density(config):
    """The change of variables by autograd's full Jacobian, the Gaussian by its dense covariance."""
    step = a_step(make_model(**config))
    x = torch.randn(1, 6, 8).double()
    J = jacobian(lambda a: residual_of(step, a), x).view(48, 48)
    gaussian = MultivariateNormal(torch.zeros(48).double(), covariance_of(step))
    expected = -gaussian.log_prob(residual_of(step, x)) - torch.linalg.slogdet(J)[1]
    torch.testing.assert_close(step.nll(x)[0], expected, rtol=1e-8, atol=1e-8)
    assert (J - torch.eye(48)).abs().max() > 0.05  # it is no identity


@pytest.mark.parametrize("config", KINDS)
def test_the_expected_loss_is_the_mean_of_the_loss(config):
    step, many = a_step(make_model(**config)), 20_000
    mean, std = torch.randn(1, 6, 8).double(), torch.tensor([0.2]).double()
    x = mean + std * torch.randn(many, 6, 8).double()
    whole = step._replace(
        mean=step.mean.expand(many, -1, -1),
        log_std=step.log_std.expand(many, -1, -1),
        directions=None if step.directions is None else step.directions.expand(many, -1, -1, -1),
        kernel=None if step.kernel is None else step.kernel.expand(many, -1, -1, -1, -1))
    nll = whole.nll(x)
    found = expected_nll(step, mean, std)
    assert (nll.mean() - found[0]).abs() < 4 * nll.std() / math.sqrt(many)
    if step.pointwise is None:  # then it is exact
        K = jacobian(lambda a: residual_of(step, a), mean).view(48, 48)
        precision = covariance_of(step).inverse()
        exact = step.nll(mean)[0] + 0.5 * std[0] ** 2 * torch.trace(K.T @ precision @ K)
        torch.testing.assert_close(found[0], exact, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("config", KINDS)
def test_noise_along_directions_is_drawn_if_none_is_given(config):
    step = a_step(make_model(**config), batch=3)
    drawn, again = step.sample(torch.zeros_like(step.mean)), step.sample(torch.zeros_like(step.mean))
    assert drawn.shape == step.mean.shape and torch.equal(drawn, again) == (step.directions is None)


@pytest.mark.parametrize("config", KINDS)
def test_samples_are_the_gaussians_carried_back(config):
    model = make_model(**config)
    step, z, w = a_step(model, batch=3), torch.randn(3, 6, 8).double(), torch.randn(3, model.config.rank).double()
    x = step.sample(z, w)
    for b in range(3):
        one = StepFlow(*(part[b:b + 1] if torch.is_tensor(part) else part for part in step[:4]), None, model)
        if step.pointwise:
            s, steps = torch.full((1,), 0.25).double(), torch.full((1,), 4)
            condition = model.pixels["time"](torch.stack([s, 1 / steps], dim=1))
            one = one._replace(pointwise=model.pixels["pointwise"].at(s, condition))
        noise = torch.exp(one.log_std) * z[b:b + 1]
        if one.directions is not None:
            noise = noise + torch.exp(one.log_std) * torch.einsum("brnd,br->bnd", one.directions, w[b:b + 1])
        torch.testing.assert_close(residual_of(one, x[b:b + 1]), noise.flatten(), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("config", [dict(filter_window=3), dict(filter_window=3, logistics=3)])
def test_guidance_is_the_product_of_powers(config):
    """log p of the guided step differs from (1 + w) log p - w log p_u by the same number everywhere, where the caption
    leaves nothing less certain."""
    model = make_model(**config)
    conditional, unconditional = a_step(model, guided=True)
    unconditional = unconditional._replace(log_std=conditional.log_std + 0.3 * torch.rand(1, 6, 8).double())
    guided = conditional.guided(unconditional, 1.5)
    differences = []
    for _ in range(3):
        x = conditional.mean + 0.3 * torch.randn(1, 6, 8).double()
        slope = conditional.total(conditional.mapped(conditional.images_of(x))[1])
        powers = 2.5 * (conditional.nll(x) + slope) - 1.5 * (unconditional.nll(x) + slope)
        differences.append(guided.nll(x) + slope - powers)
    torch.testing.assert_close(differences[1], differences[0], rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(differences[2], differences[0], rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("window", [3, 5, 7])
def test_the_filter_sees_what_comes_before_and_is_undone_exactly(window):
    kernel = 0.3 * torch.randn(2, 3, 3, window, window).double() * causal_mask(3, window)
    kernel[:, :, :, window // 2, window // 2] += torch.eye(3)
    images = torch.randn(2, 3, 5, 4).double()
    J = jacobian(lambda a: filtered(a[None], kernel[:1])[0].permute(1, 2, 0), images[0]).view(60, 3, 20)
    J = J.permute(0, 2, 1).reshape(60, 60)  # numbers in raster order, channels of a pixel together
    assert (J.triu(1) == 0).all() and (J.diagonal() == 1).all() and (J.tril(-1) != 0).any()
    torch.testing.assert_close(unfiltered(filtered(images, kernel), kernel), images, rtol=1e-9, atol=1e-9)
    other = torch.randn(2, 3, 5, 4).double()  # <a, K b> = <K^T a, b>
    pairs = (other * filtered(images, kernel)).sum((1, 2, 3)), (filtered_transposed(other, kernel) * images).sum((1, 2, 3))
    torch.testing.assert_close(*pairs)


def test_the_pointwise_map_is_monotone_and_undone():
    model = make_model(logistics=5)
    s, steps = torch.tensor([0.02, 0.5]).double(), torch.full((2,), 4)
    pointwise = model.pixels["pointwise"].at(s, model.pixels["time"](torch.stack([s, 1 / steps], dim=1)))
    x = torch.linspace(-6, 6, 4001).double().expand(2, 2, 1, -1)
    y, log_slope = pointwise(x)
    assert (y.diff() > 0).all()
    slope = y.diff() / x.diff()
    torch.testing.assert_close(slope, (log_slope.exp()[..., 1:] + log_slope.exp()[..., :-1]) / 2, rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(invert_pointwise(pointwise, y), x, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("config", KINDS)
def test_at_first_it_is_the_gaussian(config):
    torch.manual_seed(3)
    model = PixelNTM(PixelConfig(**TINY | config))
    plain = NTM(PixelConfig(**TINY | config))
    plain.load_state_dict({name: value for name, value in model.state_dict().items() if not name.startswith("pixels.")})
    u, text, x = torch.randn(2, 6, 8), torch.randint(2, 9, (2, 3)), torch.randn(2, 6, 8)
    given = u, torch.full((2,), 0.5), torch.full((2,), 0.25), torch.full((2,), 4), text
    step, gaussian = model.predict(*given), plain.predict(*given)
    torch.testing.assert_close(step.nll(x), gaussian.nll(x))
    assert torch.equal(step[0], gaussian[0]) and torch.equal(step[1], gaussian[1])  # mean and log_std come first
    step.expected_nll(x, torch.full((2,), 0.1)).sum().backward()
    for name, parameter in model.pixels.named_parameters():
        if name.endswith(("filter.head.weight", "pointwise.share.weight")):
            assert (parameter.grad != 0).any(), name  # and it can leave from there


def test_without_map_and_filter_there_is_nothing_of_it():
    model = PixelNTM(PixelConfig(**TINY))
    assert not list(model.pixels.parameters())
    assert not isinstance(a_step(model.double()), StepFlow)


def test_a_coupled_model_has_it_too():
    model = make_model(CoupledNTM, filter_window=3, logistics=3, rank=2, first_noise=0.2)
    assert isinstance(model, PixelNTM) and issubclass(CoupledConfig, PixelConfig)
    text, ts = torch.randint(2, 9, (3, 3)), model.config.time_grid(0.02).double()
    u = model.sample(text, ts, 1.0, torch.Generator().manual_seed(0))
    nll, bound = model.trajectory_bound(u, ts.expand(3, -1), text)
    assert u.isfinite().all() and nll.isfinite().all() and bound.isfinite().all()
    assert model.score_denoise(u, ts, text).isfinite().all()


def test_an_even_window_is_refused():
    with pytest.raises(ValueError, match="filter_window is 4, but must be odd"):
        PixelConfig(**TINY | dict(filter_window=4))


@pytest.mark.slow
def test_the_scripts_train_sample_and_measure_with_it(tmp_path):
    base, out = tmp_path / "fm", tmp_path / "ntm"
    run("train.py", *SHORT, *SMALL, "--shift=1", "--objective=fm", f"--out_dir={base}")
    settings = [*SHORT, *SMALL, "--shift=1", "--transporter_blocks=0", "--aux_weight=0", "--rank=2", "--closed_form=True",
                "--velocity_weight=1", f"--init_from={base / 'ckpt.pt'}"]
    for name, kind, more in ("plain", "pixels", []), ("coupled", "coupled", ["--first_noise=0.5"]):
        out = tmp_path / name
        run("train.py", *settings, "--filter_window=3", "--logistics=3", *more, f"--out_dir={out}")
        held = contents(out / "ckpt.pt")
        assert held["kind"] == kind and held["model_config"]["filter_window"] == 3
        assert (held["model"]["pixels.filter.head.weight"] != 0).any()
        run("distill.py", *SHORT, *SMALL, f"--out_dir={out}")
        run("sample.py", "--device=cpu", "--num_samples=2", f"--out_dir={out}")
        _, printed = run("evaluate.py", "--device=cpu", f"--out_dir={out}", "--val_examples=10", "--parts=likelihood")
        assert "bound of 4 trajectories" in printed
    again = [setting for setting in settings if not setting.startswith("--init_from")]
    run("train.py", *again, f"--init_from={tmp_path / 'plain' / 'ckpt.pt'}", f"--out_dir={tmp_path / 'more'}")
    assert contents(tmp_path / "more" / "ckpt.pt")["model_config"]["logistics"] == 3  # what it starts from has them
    line = fails("train.py", *SHORT, "--objective=fm", "--filter_window=3", f"--out_dir={tmp_path / 'x'}")
    assert "filter_window 3 is for an NTM" in line
