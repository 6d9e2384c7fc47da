"""toy2d.py: its data sets, the true conditional, the models' densities, and the script from end to end."""
import contextlib
import copy
import io
import itertools
import math
import signal
import subprocess
import sys
from threading import Event
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomize
from helpers import ROOT, run, start
from PIL import Image

import toy2d
from flow import forward_trajectory, reverse_posterior, time_grid

SHORT = ["--max_iters=3", "--batch_size=32", "--num_samples=300", "--width=8", "--transporter_width=8",
         "--transporter_blocks=2", "--panel=40"]
TS = time_grid(4, 0.02, 2, shift=2.0)


@pytest.fixture(scope="module", params=[2, 4])
def ran(request, tmp_path_factory):
    """A short run on either checkerboard: its models and their updates, what it printed, and the path of its figure.

    The settings stay those of the run as long as tests use it.
    """
    path, printed = tmp_path_factory.mktemp("toy2d") / "made" / "toy2d.png", io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["toy2d.py", *SHORT, f"--squares={request.param}", f"--figure={path}"])
        before = dict(vars(toy2d))
        config = toy2d.configure(vars(toy2d))
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(io.StringIO()):
            models, updates = toy2d.main(config)
        yield models, updates, printed.getvalue(), path
    vars(toy2d).update({name: before[name] for name in config})


def axis_of(half, count):
    """Pixel centres on [-half, half], and the area of a pixel of the square."""
    return half * ((2 * torch.arange(count) + 1) / count - 1), (2 * half / count) ** 2


def test_flow_matching_estimates_in_few_steps_are_no_bound():
    """In many steps they are the density, here of five points in noise; in four, far below the entropy."""
    x0 = torch.tensor([[-0.8, 0.3], [0.1, 0.5], [0.9, -0.2], [0.0, -0.9], [-0.3, -0.1]])
    x = torch.tensor([[0.2, 0.1], [-0.6, 0.7]])
    exact = -torch.distributions.Normal(0.7 * x0, 0.3).log_prob(x[:, None]).sum(2).logsumexp(1) + math.log(5)
    many = toy2d.euler_estimate(x, torch.linspace(0.3, 1, 3000), x0)
    torch.testing.assert_close(many, exact, atol=2e-3, rtol=0)
    generator = torch.Generator().manual_seed(0)
    clean = toy2d.sample_data(3000, generator)[..., 0]
    noisy = 0.98 * clean[:500] + 0.02 * torch.randn(500, 2, generator=generator)
    assert toy2d.euler_estimate(noisy, torch.linspace(0.02, 1, 5), clean).mean() < math.log(2) - 0.5


def points_of(axis):
    """The points (P, P, 2) of axis x axis, second coordinate first, by rows."""
    return torch.stack([axis[None, :].expand(len(axis), -1), axis[:, None].expand(-1, len(axis))], dim=-1)


# ---------------------------------------------------------------------------------------------------------------
# The data


def test_data_lie_on_their_support(ran):
    x = toy2d.sample_data(100_000, torch.Generator().manual_seed(0))
    assert x.shape == (100_000, 2, 1) and x.abs().max() < 1.1
    assert toy2d.proportion_inside(x) == pytest.approx(1, abs=2e-3)
    assert x.mean(dim=0).abs().max() < 0.01


def test_entropy_is_log_area_where_the_density_is_uniform(ran):
    axis, pixel = axis_of(1, 2000)
    area = toy2d.inside(points_of(axis)).sum().item() * pixel
    assert math.log(area) == pytest.approx(toy2d.ENTROPY, abs=2e-3)
    counts, _, _ = np.histogram2d(*toy2d.sample_data(400_000, torch.Generator().manual_seed(0))[..., 0].T.numpy(),
                                  bins=40, range=[(-1, 1)] * 2)
    density = counts / 400_000 / 0.05**2
    assert np.allclose(density[density > 0], 1 / area, rtol=0.2)  # uniform, and every dark square is drawn
    assert (density > 0).mean() * 4 == pytest.approx(area, abs=2e-3)


# ---------------------------------------------------------------------------------------------------------------
# Densities


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize("ran", [4], indirect=True)
def test_true_density_is_that_of_many_real_trajectories(ran, k):
    """Against Monte Carlo that knows neither posterior nor weights: x_s of the trajectories that passed near x_t."""
    generator, ts = torch.Generator().manual_seed(1), TS[k:k + 2]
    data = toy2d.sample_data(500_000, generator)
    x_t = (1 - ts[1]) * torch.tensor([0.2, -0.1]) + torch.tensor([0.1, 0.05])
    x = forward_trajectory(data, ts.expand(len(data), 2), generator)[..., 0]
    x_s = x[((x[:, 1] - x_t).abs() < 0.05).all(dim=1), 0]
    axis, pixel = axis_of(4.5 * float(ts[0]) + 1.2 * (1 - float(ts[0])), 250)
    density = toy2d.true_density(x_t, *ts, data[:20_000, :, 0], axis)
    assert density.sum() * pixel == pytest.approx(1, abs=2e-3)
    points = points_of(axis)
    for f in (lambda x: x[..., 0], lambda x: x[..., 1], lambda x: x[..., 0] ** 2, lambda x: x[..., 0] * x[..., 1],
              lambda x: (x[..., 0] > 0.1).float(), lambda x: (x[..., 0] * x[..., 1] > 0).float()):
        expected, error = f(x_s).mean().item(), f(x_s).std().item() / len(x_s) ** 0.5
        assert (density * f(points)).sum().item() * pixel == pytest.approx(expected, abs=4 * error + 0.01)


def test_densities_of_the_models_integrate_to_one(ran):
    axis, pixel = axis_of(6, 150)
    with torch.no_grad():
        for model in ran[0]:
            model = randomize(copy.deepcopy(model), 0.3)  # three updates leave it nearly the identity
            for k in (0, 3):
                density = toy2d.model_density(model, torch.tensor([0.3, -0.2]), *TS[k:k + 2], axis)
                assert density.sum() * pixel == pytest.approx(1, abs=0.01)


def test_second_coordinate_runs_along_rows(ran):
    """model_density and true_density put the same x_s at the same place: a density evaluated point by point."""
    axis, x_t, s, t = torch.tensor([-0.4, 0.1, 0.7]), torch.tensor([0.3, -0.2]), *TS[1:3]
    model = randomize(copy.deepcopy(ran[0][1]), 0.3)
    x0 = toy2d.sample_data(50, torch.Generator().manual_seed(0))[..., 0]
    with torch.no_grad():
        ours, true = toy2d.model_density(model, x_t, s, t, axis), toy2d.true_density(x_t, s, t, x0, axis)
        A, B, C = reverse_posterior(t, s)
        weights = torch.exp(-((x_t - (1 - t) * x0) ** 2).sum(dim=1) / (2 * t**2))
        for row, second in enumerate(axis):
            for column, first in enumerate(axis):
                x_s = torch.stack([first, second])
                nll = model.step_nll(x_s[None, :, None], x_t[None, :, None], s[None], t[None], torch.tensor([4]),
                                     torch.tensor([[1]]))
                assert torch.allclose(ours[row, column], torch.exp(-nll), rtol=1e-4)
                square = ((x_s - A * x_t - B * x0) ** 2).sum(dim=1) / C**2
                expected = (weights * torch.exp(-square / 2)).sum() / weights.sum() / (2 * math.pi * C**2)
                assert torch.allclose(true[row, column], expected, rtol=1e-3, atol=1e-6)


def test_best_gaussian_bound_is_the_density_where_the_data_are_a_gaussian(ran, monkeypatch):
    """Its steps are Gaussian, so that nothing is lost; the data sets' are not."""
    monkeypatch.setattr(toy2d, "num_samples", 3000)
    best = toy2d.best_gaussian_bound(TS, toy2d.grid_inside(60), torch.Generator().manual_seed(0))
    assert toy2d.ENTROPY + 0.4 < best < toy2d.ENTROPY + 2
    mixed = torch.tensor([[0.4, 0.0], [0.35, 0.15]])  # of two pixels that are alike: independent ones would not do
    monkeypatch.setattr(toy2d, "sample_data", lambda n, generator: mixed @ torch.randn(n, 2, 1, generator=generator))
    covariance = 0.98**2 * mixed @ mixed.T + 0.02**2 * torch.eye(2)
    exact = math.log(2 * math.pi * math.e) + 0.5 * covariance.logdet().item()
    x0 = (mixed @ torch.randn(3000, 2, 1, generator=torch.Generator().manual_seed(1)))[..., 0]
    assert toy2d.best_gaussian_bound(TS, x0, torch.Generator().manual_seed(0)) == pytest.approx(exact, abs=0.1)


# ---------------------------------------------------------------------------------------------------------------
# The script


def test_prints_its_numbers_and_leaves_the_figure(ran):
    models, updates, printed, path = ran
    first, *estimates, gaussian, ntm, last = printed.strip().splitlines()
    assert first.startswith(f"Checkerboard: entropy {toy2d.ENTROPY:.3f} nats")
    assert gaussian.startswith("Gaussian: 3 updates, bound ") and ntm.startswith("NTM: 3 updates, bound ")
    assert len(estimates) == 3 and estimates[0].startswith("Flow matching's estimate in 4 Euler steps")
    shorter = path.with_name(f"{path.stem}_last.png")
    assert last == f"wrote {path}, and its last step alone, {shorter}"
    assert updates == (3, 3)
    assert len(models[0].transporter.blocks) == 0 and len(models[1].transporter.blocks) == 2
    with Image.open(path) as image:
        assert image.width > 6 * 40 and image.height > 6 * 40
        assert len(image.getcolors(1 << 24)) > 100
        height = image.height
        below = image.crop((0, height - 60, image.width, height))
    with Image.open(shorter) as image:  # three rows of panels less
        assert image.height == height - 3 * (40 + toy2d.GAP)
        assert image.crop((0, image.height - 60, image.width, image.height)).tobytes() == below.tobytes()


@pytest.mark.parametrize("ran", [2], indirect=True)
def test_the_same_updates_give_the_same_numbers_and_figure(ran, tmp_path):
    path = tmp_path / "toy2d.png"
    again = run("toy2d.py", *SHORT, f"--figure={path}")[1]
    stems = [str(figure.with_suffix("")) for figure in (path, ran[3])]
    assert again.replace(*stems) == ran[2] and path.read_bytes() == ran[3].read_bytes()


@pytest.mark.parametrize("ran", [2], indirect=True)
def test_training_stops_by_the_clock_and_learns(ran, monkeypatch):
    monkeypatch.setattr(toy2d, "max_iters", 0)
    monkeypatch.setattr(toy2d, "seconds", 0.5)
    clock = (i / 64 for i in itertools.count())  # on which an update takes a 64th of a second
    monkeypatch.setattr(toy2d, "time", SimpleNamespace(thread_time=lambda: next(clock)))
    model, updates = toy2d.train("NTM", toy2d.build(2), TS, Event())
    assert updates == 32
    before, after = (toy2d.bound(network, TS, 2000, torch.Generator().manual_seed(0)).mean()
                     for network in (toy2d.build(2), model))
    assert after < before - 0.1


INTERRUPTIBLE = """
import runpy, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
sys.argv = ["toy2d.py", "--figure=" + sys.argv[1]]
runpy.run_path("toy2d.py", run_name="__main__")
"""


@pytest.mark.slow
def test_ctrl_c_ends_both_trainings(tmp_path):
    """Long before the 150 seconds that each would take."""
    process = start("-c", INTERRUPTIBLE, tmp_path / "toy2d.png")
    bars = ""
    while "NTM" not in bars or "Gaussian" not in bars:
        seen = process.stderr.read(1)
        assert seen, bars  # it has ended
        bars += seen
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and "KeyboardInterrupt" in err and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_importing_it_runs_nothing():
    printed = subprocess.run([sys.executable, "-c", "import toy2d, bench, evaluate"], cwd=ROOT, capture_output=True,
                             text=True, check=True)
    assert printed.stdout == printed.stderr == ""


@pytest.mark.parametrize("argument, message", [
    ("--squares=3", "squares is 3, but must be even"),
    ("--steps=0", "config key steps is 0, but must be at least 1"),
    ("--transporter_blocks=0", "transporter_blocks is 0, but must be at least 1"),
    ("--t_min=0.5", "t_min is 0.5, but the grid of 4 steps starts at 0.4000"),
    ("--t_min=0", "t_min is 0.0, but must be at least 0.0001"),
    ("--seconds=0", "config key seconds is 0.0, but must be above 0"),
    ("--batch_size=0", "config key batch_size is 0, but must be at least 1"),
    ("--panel=0", "config key panel is 0, but must be at least 1"),
    ("--num_samples=1", "num_samples is 1, but must be at least 2")])
def test_errors_are_one_line(argument, message):
    with pytest.raises(SystemExit) as error:
        run("toy2d.py", argument)
    assert str(error.value).startswith(message) and "\n" not in str(error.value)


def test_a_figure_with_nowhere_to_go_is_one_line_before_training(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit, match="deeper. cannot be written to .Not a directory"):
        run("toy2d.py", f"--figure={tmp_path / 'file' / 'deeper' / 'toy2d.png'}")
    with pytest.raises(SystemExit, match=f"{tmp_path} is a folder: name a file in it"):
        run("toy2d.py", f"--figure={tmp_path}")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
def test_a_warm_up_of_nothing(tmp_path):
    _, printed = run("toy2d.py", "--warmup_iters=0", "--max_iters=1", "--panel=20", "--num_samples=100",
                     f"--figure={tmp_path / 'toy2d.png'}")
    assert "NTM: 1 updates" in printed
