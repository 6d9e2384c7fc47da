"""Flow matching, and an NTM that starts from it: at first it is the Gaussian reverse step, to rounding."""
import copy
import math
import re
import shutil

import pytest
import torch
from conftest import randomize
from helpers import (DISTILL, SAMPLE, SHORT, SMALL, TRAIN, assert_close_training, contents, fails, interrupted_run,
                     load, on_ranks, pixels, read_log, read_log_without_speed, run, run_with_notes, same,
                     same_training, training_lines)
from tiny import TINY as SMALLEST
from tiny import levels_of, noise_of

import start
from plumbing import checkpoint
from flow import forward_trajectory, time_grid
from fm import FlowMatching
from losses import TrainingLoss, losses_of_batch
from model import NTM, NTMConfig
from predictor import null_caption

TINY = SMALLEST | dict(vocab_size=20, shift=None)
TEXT = torch.tensor([[2, 3, 0], [4, 0, 0], [1, 0, 0]])


@pytest.fixture
def network():
    """A velocity network at random weights, in float64."""
    return randomize(FlowMatching(NTMConfig(**TINY)).double(), 0.5)


@pytest.fixture
def model(network):
    """The NTM that starts from it."""
    model = NTM(NTMConfig(**TINY, parametrization="posterior")).double()
    network.hand_over(model.predictor)
    return model


# ---------------------------------------------------------------------------------------------------------------
# The flow-matching model


def test_loss_is_the_error_of_the_velocity(network):
    images, noise = torch.rand(3, 1, 4, 6).double(), torch.randn(3, 6, 4).double()
    t = torch.tensor([0.1, 0.5, 0.9]).double()
    loss = network(images, TEXT, (t, noise))
    x0 = network.patchify(images)
    errors = [network.velocity((1 - t[i]) * x0[i:i + 1] + t[i] * noise[i:i + 1], t[i:i + 1], TEXT[i:i + 1])
              - (noise[i] - x0[i]) for i in range(3)]
    torch.testing.assert_close(loss, torch.cat(errors).square().mean())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_loss_draws_times_and_noise_anew(network, dtype):
    network, images = network.to(dtype), torch.rand(3, 1, 4, 6, dtype=dtype)
    one, other = network(images, TEXT), network(images, TEXT)
    assert one != other and one.dtype == dtype and one.shape == ()


def test_a_velocity_starts_at_zero():
    """Where the loss is that of the data's and the noise's mean."""
    assert (FlowMatching(NTMConfig(**TINY)).velocity(torch.randn(3, 6, 4), torch.rand(3), TEXT) == 0).all()


def test_a_velocity_is_float32_under_bfloat16(network):
    network, x, t = network.float(), torch.randn(3, 6, 4), torch.rand(3)
    exact = network.velocity(x, t, TEXT)
    with torch.autocast("cpu", torch.bfloat16):
        rough = network.velocity(x, t, TEXT)
    assert rough.dtype == torch.float32 and not torch.equal(rough, exact)
    torch.testing.assert_close(rough, exact, atol=0.1, rtol=0.1)


def test_times_are_logit_normal():
    t = FlowMatching(NTMConfig(**TINY)).draw_times(20_000, generator=torch.Generator().manual_seed(0))
    assert t.shape == (20_000,)
    logits = t.logit()
    assert logits.mean() == pytest.approx(0, abs=0.03) and logits.std() == pytest.approx(1, abs=0.03)


def test_euler_on_gaussian_data_reaches_it_with_many_steps(network, monkeypatch):
    """For x_0 ~ N(m, v I) the velocity is known: v(x, t) = E[eps - x_0 | x_t], linear in x."""
    mean, variance = 0.3, 0.25

    def velocity(x, t, text):
        t = t[:, None, None]
        spread = (1 - t)**2 * variance + t**2
        return (t - (1 - t) * variance) / spread * (x - (1 - t) * mean) - mean

    monkeypatch.setattr(network, "velocity", velocity)
    noise = torch.randn(3, 6, 4).double()
    errors = [(network.sample(TEXT, torch.linspace(0, 1, steps + 1), randn=lambda *shape: noise)[:, 0]
               - (mean + math.sqrt(variance) * noise)).abs().max().item() for steps in (10, 100, 1000)]
    assert errors[2] < 2e-3
    assert errors[1] == pytest.approx(10 * errors[2], rel=0.2)  # Euler's method is of first order


def test_euler_steps_and_guidance(network):
    noise = torch.randn(3, 6, 4).double()
    x = network.sample(TEXT, torch.tensor([0, 0.7, 1]), guidance=1.5, randn=lambda *shape: noise)
    assert x.shape == (3, 3, 6, 4) and torch.equal(x[:, 2], noise)
    for k, t, s in ((2, 1.0, 0.7), (1, 0.7, 0.0)):
        t, s = torch.full((3,), t).double(), torch.tensor(s).double()
        conditional = network.velocity(x[:, k], t, TEXT)
        unconditional = network.velocity(x[:, k], t, null_caption(TEXT))
        torch.testing.assert_close(x[:, k - 1], x[:, k] - (t[0] - s) * (2.5 * conditional - 1.5 * unconditional))


@pytest.mark.parametrize("restarts", [0, 1, 2])
def test_steps_taken_again_leave_exact_levels_as_they_are(network, monkeypatch, restarts):
    """Of images that are all the same, 0.3, Euler's steps are exact: x_t is N(0.3 (1 - t), t^2) at every level."""
    monkeypatch.setattr(network, "velocity", lambda x, t, text: (x - 0.3) / t[:, None, None])
    draws, drawn = 1 + restarts, []

    def randn(*shape):  # sampling is affine in the noise: example k has unit noise in draw k only, the last none
        noise = torch.zeros(draws + 1, *shape).double()
        noise[len(drawn)] = 1
        drawn.append(shape)
        return noise

    x = network.sample(TEXT[:1].expand(draws + 1, -1), torch.linspace(0, 1, 5), restarts=restarts, randn=randn)
    assert drawn == [(6, 4)] * draws and x.shape == (draws + 1, 5, 6, 4)
    t, x = torch.linspace(0, 1, 5).double(), x[..., 0, 0]
    torch.testing.assert_close(x[-1], 0.3 * (1 - t))
    torch.testing.assert_close((x[:-1] - x[-1]).square().sum(dim=0), t**2)


def test_euler_by_default_has_fifty_steps_and_no_guidance(network):
    def draw(**settings):
        return network.sample(TEXT, generator=torch.Generator().manual_seed(0), **settings)

    assert draw().shape == (3, 51, 6, 4) and draw().dtype == torch.float64
    assert torch.equal(draw(), draw(ts=torch.linspace(0, 1, 51), guidance=0.0))
    assert not torch.equal(draw(), draw(guidance=1.0))


# ---------------------------------------------------------------------------------------------------------------
# An NTM that starts from it


def ancestral(network, x, t, s):
    """Mean and standard deviation of the Gaussian reverse step from t to s < t, METHOD's formulas in plain numbers."""
    A = s**2 * (1 - t) / (t**2 * (1 - s))
    B = (t - s) * (t + s - 2 * t * s) / (t**2 * (1 - s))
    C = math.sqrt(s**2 * (t - s) * (t + s - 2 * t * s) / (t**2 * (1 - s)**2))
    v = network.velocity(x, torch.full((len(x),), t).double(), TEXT)
    return A * x + B * (x - t * v), C


@pytest.mark.parametrize("steps", [1, 4, 16])
def test_at_first_the_ntm_is_the_gaussian_reverse_step(network, model, steps):
    ts = time_grid(steps, 0.02, 6, shift=1.0).double()
    noise = torch.randn(3, steps + 1, 6, 4).double()
    u = model.sample(TEXT, ts, randn=noise_of(noise))
    x = noise[:, steps]
    for k in reversed(range(steps)):
        t, s = ts[k + 1].item(), ts[k].item()
        mean, std = ancestral(network, x, t, s)
        own_mean, own_log_std = model.predict(x, ts[k + 1].expand(3), ts[k].expand(3), torch.full((3,), steps), TEXT)
        torch.testing.assert_close(own_mean, mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(own_log_std.exp(), torch.full_like(mean, std), rtol=1e-12, atol=0)
        x = mean + std * noise[:, k]
        torch.testing.assert_close(u[:, k], x, rtol=1e-11, atol=1e-11)
    assert torch.equal(model.invert(u, ts), u)  # the transporter is the identity


def test_first_step_from_pure_noise():
    """At t = 1: A = 0, B = 1 - s, C = s, and the velocity of pure noise says what the data's mean is."""
    model = NTM(NTMConfig(**TINY, parametrization="posterior")).double()
    model.predictor.head.bias.data[:4] = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()  # v, of every token
    u, s = torch.randn(3, 6, 4).double(), torch.tensor([0.1, 0.4, 0.8]).double()
    mean, log_std = model.predict(u, torch.ones(3).double(), s, torch.full((3,), 4), TEXT)
    torch.testing.assert_close(mean, (1 - s)[:, None, None] * (u - model.predictor.head.bias[:4]))
    torch.testing.assert_close(log_std.exp(), s[:, None, None].expand_as(u))


def test_likelihood_of_the_start_is_that_of_the_gaussians(network, model):
    ts = time_grid(4, 0.02, 6, shift=1.0).double()
    x = forward_trajectory(torch.randn(3, 6, 4).double(), ts.expand(3, 5))
    nll = model.trajectory_nll(x, ts.expand(3, 5), TEXT)
    for k in range(4):
        mean, std = ancestral(network, x[:, k + 1], ts[k + 1].item(), ts[k].item())
        density = torch.distributions.Normal(mean, std).log_prob(x[:, k]).sum(dim=(1, 2))
        torch.testing.assert_close(nll[:, k], -density)


def test_what_starts_at_zero_learns(model):
    images = torch.rand(3, 1, 4, 6).double()
    model(images, TEXT, levels_of(model, images, TEXT, *model.draw_trajectories(3))).backward()
    heads, times = model.predictor.head.weight.grad, model.predictor.trunk.time.mlp[0].weight.grad
    assert heads[4:].abs().min() > 0  # the scale
    assert times[:, 64:].abs().sum(dim=0).min() > 0  # s and 1/T


def test_target_adds_the_distance_of_the_means(model):
    images = torch.rand(3, 1, 4, 6)
    levels = levels_of(model.float(), images, TEXT, *model.draw_trajectories(3))
    steps, ts, x = levels
    means = model.predict_all(x, ts, steps, TEXT).mean  # the transporter is the identity: u = x
    settings = dict(closed_form=False, mirrored=False, level_weight=0.0, velocity_weight=0.0, pairs=False)
    parts = TrainingLoss(model, settings)(images, TEXT, levels, means + 0.5)
    assert parts["minimised"] == parts["nll"]
    torch.testing.assert_close(parts["nll"], model(images, TEXT, levels))
    assert parts["aux"].item() == pytest.approx(0.25, rel=1e-5)
    frozen = copy.deepcopy(model).requires_grad_(False)
    losses = losses_of_batch(TrainingLoss(model, settings), frozen, 3.0, images, TEXT, *levels)
    assert losses["aux"] == 0 and losses["loss"] == losses["minimised"] == parts["nll"]


# ---------------------------------------------------------------------------------------------------------------
# The scripts


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A folder after train.py --objective=fm. Not to be written to."""
    out = tmp_path_factory.mktemp("fm")
    run("train.py", *TRAIN, "--objective=fm", f"--out_dir={out}", "--max_iters=100", "--val_interval=50", "--lr=1e-2")
    return out


@pytest.fixture
def tune(base, tmp_path):
    """The settings of a run that starts from it."""
    return [*TRAIN, f"--init_from={base / 'ckpt.pt'}", f"--out_dir={tmp_path}"]


def test_flow_matching_learns_and_draws(base, tmp_path):
    held = contents(base / "ckpt.pt")
    assert held["kind"] == "fm" and held["iter"] == 100
    first, last = [line["val_loss"] for line in read_log(base / "log.jsonl") if "val_loss" in line]
    assert last < first < 1.5  # it starts at the mean of (noise - x_0)^2, about 1.4
    assert pixels(base / "samples" / "000100.png").shape[2] == 3

    _, printed = run("sample.py", *SAMPLE, f"--out_dir={base}", "--steps=12", "--show_trajectory=True")
    assert "sampling in 12 steps" in printed and "NLL" not in printed
    folder = base / "images"
    assert len(list(folder.glob("0???.png"))) == len(list(folder.glob("????_trajectory.png"))) == 5
    assert pixels(folder / "0000_trajectory.png").shape[1] < 10 * 110  # not all of the 13 levels
    whole = pixels(folder / "0004.png")
    run("sample.py", *SAMPLE, f"--out_dir={base}", "--steps=12", "--batch_size=2")
    assert (pixels(folder / "0004.png") == whole).all()
    _, printed = run("sample.py", *SAMPLE, f"--out_dir={base}")
    assert "sampling in 50 steps" in printed


@pytest.mark.slow
def test_flow_matching_resumes_bit_for_bit(tmp_path):
    settings = [*TRAIN, "--objective=fm"]
    run("train.py", *settings, f"--out_dir={tmp_path / 'whole'}")
    interrupted_run(TrainingLoss, 3, "train.py", *settings, f"--out_dir={tmp_path / 'parts'}")
    assert contents(tmp_path / "parts" / "ckpt.pt")["iter"] == 3
    run("train.py", *settings, f"--out_dir={tmp_path / 'parts'}", "--resume=yes")
    assert same_training(tmp_path / "parts" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")


def test_the_model_to_stay_close_to_has_no_transporter(tune, monkeypatch):
    """Its means do not need one, so the device has no room for it."""
    built, build = [], start.build_model
    monkeypatch.setattr(start, "build_model", lambda *args: built.append(build(*args)) or built[-1])
    run("train.py", *tune, "--max_iters=1")
    (model, frozen), = built
    assert len(model.transporter.blocks) == 2 and len(frozen.transporter.blocks) == 0


def test_a_preemptible_fine_tuning_run_is_one_command_that_is_sent_again(base, tmp_path):
    """With a config file, as config/digits_tune.py is: bit for bit the uninterrupted run, and from the same start."""
    config = tmp_path / "tune.py"
    config.write_text(f"init_from = {str(base / 'ckpt.pt')!r}\ntransporter_blocks = 0\nrank = 3\nlevel_weight = 1.0\n"
                      "closed_form = True\naux_weight = 0.0\n")
    of_the_start = ("--width", "--depth", "--heads", "--transporter")  # what the start decides
    command = ["train.py", *(setting for setting in TRAIN if not setting.startswith(of_the_start)), str(config)]
    run(*command, f"--out_dir={tmp_path / 'whole'}")
    command += [f"--out_dir={tmp_path / 'parts'}", "--resume=auto"]
    _, printed = interrupted_run(TrainingLoss, 2, *command)
    assert f"starts from {base / 'ckpt.pt'}: " in printed
    _, printed = interrupted_run(TrainingLoss, 2, *command)
    assert "starts from" not in printed and "at iteration 2" in printed
    run(*command)
    parts, whole = (tmp_path / name for name in ("parts", "whole"))
    assert same_training(parts / "ckpt.pt", whole / "ckpt.pt")
    assert read_log_without_speed(parts / "log.jsonl") == read_log_without_speed(whole / "log.jsonl")
    held = contents(parts / "ckpt.pt")
    assert held["settings"]["init_from"] == str(base / "ckpt.pt") and held["model_config"]["rank"] == 3
    assert held["model_config"]["parametrization"] == "posterior"


def test_a_run_that_continues_says_where_it_started_if_that_is_not_what_is_asked_for(tune, base, trained, tmp_path):
    run("train.py", *tune, "--max_iters=1")
    _, _, notes = run_with_notes("train.py", *tune, "--max_iters=2", "--resume=yes")
    assert notes == []
    other = trained / "ckpt.pt"
    _, _, notes = run_with_notes("train.py", *tune, f"--init_from={other}", "--max_iters=3", "--resume=yes")
    path, origin = tmp_path / "ckpt.pt", base / "ckpt.pt"
    assert notes == [f"init_from {other} is ignored: {path} is resumed, and it started from {origin}"]
    held = contents(tmp_path / "ckpt.pt")
    assert held["iter"] == 3 and held["settings"]["init_from"] == str(base / "ckpt.pt")


@pytest.mark.slow
def test_fine_tuning_logs_both_losses_and_anneals(tune, tmp_path):
    run("train.py", *tune, "--max_iters=8")
    lines = training_lines(tmp_path / "log.jsonl")
    weights = [1.25 * (1 + math.cos(math.pi * i / 8)) for i in range(8)]
    assert [line["aux_weight"] for line in lines] == pytest.approx(weights, rel=1e-5)
    for line in lines:
        assert line["loss"] == pytest.approx(line["nll"] + line["aux_weight"] * line["aux"], rel=1e-4)
    assert lines[0]["aux"] < 1e-10 < lines[-1]["aux"]  # it starts where the frozen copy is
    assert load(tmp_path, "ntm").config.parametrization == "posterior"
    assert all(line["skipped"] == 0 for line in lines)


def test_fine_tuning_starts_with_the_averaged_weights(tune, base, tmp_path):
    run("train.py", *tune, "--max_iters=1", "--lr=0", "--min_lr=0", "--weight_decay=0")
    network, model = load(base, "fm"), load(tmp_path, "ntm")
    x, text = torch.randn(2, 16, 4), torch.tensor([[5, 6, 0, 0], [1, 0, 0, 0]])
    t, s = torch.tensor([0.7, 1.0]), torch.tensor([0.3, 0.5])
    v, delta = model.predictor(x, t, s, torch.tensor([4, 4]), text)
    torch.testing.assert_close(v, network.velocity(x, t, text))
    assert (delta == 0).all()


def test_fine_tuning_resumes_bit_for_bit_without_its_base(tune, base, tmp_path):
    """The frozen copy is in the checkpoint: the file one started from may be gone."""
    run("train.py", *tune, f"--out_dir={tmp_path / 'whole'}")
    interrupted_run(TrainingLoss, 3, "train.py", *tune, f"--out_dir={tmp_path / 'parts'}")
    run("train.py", *TRAIN, f"--out_dir={tmp_path / 'parts'}", "--resume=yes")
    assert same_training(tmp_path / "parts" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")
    assert same(*(contents(tmp_path / run / "ckpt.pt")["frozen"] for run in ("parts", "whole")))
    logs = [read_log_without_speed(tmp_path / run / "log.jsonl") for run in ("parts", "whole")]
    assert logs[0] == logs[1]
    _, printed = run("sample.py", *SAMPLE, f"--out_dir={tmp_path / 'whole'}", "--denoise=none")
    assert "trajectory NLL" in printed
    run("distill.py", *DISTILL, f"--out_dir={tmp_path / 'whole'}")


@pytest.mark.slow
def test_two_processes_do_as_one(tune, tmp_path):
    for name, settings in {"fm": [*TRAIN, "--objective=fm"], "tune": tune}.items():
        alone, both = tmp_path / f"{name}_alone", tmp_path / f"{name}_both"
        run("train.py", *settings, f"--out_dir={alone}", "--max_iters=3")
        on_ranks(2, "train.py", *settings, f"--out_dir={both}", "--max_iters=3")
        assert_close_training(both, alone, "ckpt.pt", "log.jsonl")


@pytest.mark.slow
def test_fine_tuning_without_the_auxiliary_loss(tune, tmp_path):
    run("train.py", *tune, "--aux_weight=0")
    assert "frozen" not in contents(tmp_path / "ckpt.pt")
    assert "aux" not in training_lines(tmp_path / "log.jsonl")[0]
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes", "--aux_weight=2")
    assert "resume it with --aux_weight=0" in line
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes")  # as the checkpoint says


@pytest.mark.slow
def test_the_base_decides_about_the_network(tune, tmp_path):
    line = fails("train.py", *tune, "--max_iters=1", "--width=24", "--depth=3")
    assert re.search(r"(width is 24|depth is 3), but .*ckpt.pt fixes it at (16|1): leave it out", line)
    _, printed = run("train.py", *[setting for setting in tune if "--width" not in setting], "--max_iters=1")
    assert contents(tmp_path / "ckpt.pt")["model_config"]["width"] == 16  # and not the default
    assert "width 16, depth 1, heads 2" in printed


def test_an_ntm_goes_on_from_another_on_other_terms(trained, tmp_path):
    """It starts with all of the averaged weights; the time grid is a new one."""
    settings = [*TRAIN, f"--init_from={trained / 'ckpt.pt'}", "--shift=2"]
    assert "transporter_blocks is 1, but" in fails("train.py", *settings, f"--out_dir={tmp_path}", "--transporter_blocks=1")
    still = ["--max_iters=1", "--lr=0", "--min_lr=0", "--weight_decay=0"]
    run("train.py", *settings, *still, f"--out_dir={tmp_path / 'still'}")
    base, goes_on = contents(trained / "ckpt.pt"), contents(tmp_path / "still" / "ckpt.pt")
    assert same(goes_on["model"], base["ema"])
    assert goes_on["model_config"] == base["model_config"] | {"shift": 2.0}
    run("train.py", *settings, f"--out_dir={tmp_path / 'whole'}")
    assert "aux" not in training_lines(tmp_path / "whole" / "log.jsonl")[0]
    interrupted_run(TrainingLoss, 3, "train.py", *settings, f"--out_dir={tmp_path / 'parts'}")
    run("train.py", *TRAIN, "--shift=2", f"--out_dir={tmp_path / 'parts'}", "--resume=yes")
    assert same_training(tmp_path / "parts" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")


def test_directions_may_be_added_and_not_taken_away(trained, tmp_path):
    still = [*TRAIN, "--max_iters=1", "--lr=0", "--min_lr=0", "--weight_decay=0"]
    run("train.py", *still, f"--init_from={trained / 'ckpt.pt'}", f"--out_dir={tmp_path / 'two'}", "--rank=2")
    from_two = [*still, f"--init_from={tmp_path / 'two' / 'ckpt.pt'}"]
    for name, settings in {"same": [], "five": ["--rank=5"]}.items():
        run("train.py", *from_two, *settings, f"--out_dir={tmp_path / name}")
    two, same_rank, five = (contents(tmp_path / name / "ckpt.pt") for name in ("two", "same", "five"))
    assert [held["model_config"]["rank"] for held in (two, same_rank, five)] == [2, 2, 5]
    head, added = two["ema"]["predictor.head.weight"], five["model"]["predictor.head.weight"]
    assert torch.equal(added[:len(head)], head) and len(added) == len(head) / 4 * 7
    assert "rank is 1, but" in fails("train.py", *from_two, "--rank=1", f"--out_dir={tmp_path / 'one'}")


def test_scale_much_too_small_is_taken_in_its_stride(base, tmp_path):
    """At t_min far below the data's spread the first losses are in the thousands; no update is lost over it."""
    run("train.py", *TRAIN, f"--init_from={base / 'ckpt.pt'}", f"--out_dir={tmp_path}", "--max_t_min=0.002",
        "--t_min=0.001", "--max_iters=60", "--warmup_iters=10", "--val_interval=60", "--lr=5e-3")
    losses = [line["loss"] for line in training_lines(tmp_path / "log.jsonl")]
    assert training_lines(tmp_path / "log.jsonl")[-1]["skipped"] == 0
    assert losses[0] > 1000 and max(losses[-10:]) < 10


@pytest.mark.parametrize("setting", ["--t_min=0", "--max_t_min=0"])
def test_no_density_at_zero_is_refused_before_training(tune, tmp_path, setting):
    line = fails("train.py", *tune, setting)
    assert "t_min" in line and "is 0" in line and "choose t_min > 0" in line
    assert not (tmp_path / "ckpt.pt").exists() and not (tmp_path / "log.jsonl").exists()


@pytest.mark.slow
def test_one_model_for_several_step_counts(tmp_path):
    (tmp_path / "several.py").write_text("steps = (4, 8, 16)\n")
    run("train.py", str(tmp_path / "several.py"), *TRAIN, f"--out_dir={tmp_path}", "--max_iters=30")
    model = load(tmp_path, "ntm")
    assert model.config.steps == (4, 8, 16)
    drawn = {int(model.draw_trajectories(2, generator=torch.Generator().manual_seed(i))[0][0]) for i in range(50)}
    assert drawn == {4, 8, 16}
    for steps in (4, 8, 16):
        _, printed = run("sample.py", *SAMPLE, f"--out_dir={tmp_path}", f"--steps={steps}", "--denoise=none")
        assert f"sampling in {steps} steps" in printed and f"of its {(steps + 1) * 64} numbers" in printed


# ---------------------------------------------------------------------------------------------------------------
# What a user can get wrong


@pytest.mark.parametrize("settings, parts", [
    (["--objective=gan"], ["'gan'", "'ntm', 'fm' or 'tarflow'"]),
    (["--init_from=nowhere.pt"], ["'nowhere.pt'", "'scratch'", "sit:PATH", "--resume=yes"]),
    (["--init_from=resume"], ["init_from 'resume'", "write --resume=yes"]),  # as it was written once
    (["--init_from=auto"], ["init_from 'auto'", "write --resume=auto"]),
    (["--init_from=auto", "--resume=auto"], ["init_from 'auto'", "write --resume=auto"]),
    (["--resume=True"], ["resume 'True' is unknown", "'no', 'yes', 'auto'"]),
    (["--init_from=sit:nowhere.pt"], ["there is no SiT checkpoint nowhere.pt"]),
])
def test_wrong_start_is_named(tmp_path, settings, parts):
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", *settings)
    assert all(part in line for part in parts)


FOR_AN_NTM = ["--level_weight=1", "--closed_form=True", "--velocity_weight=1", "--first_noise=0.5", "--rank=3",
              "--aux_weight=2", "--closed_form=True --transporter_blocks=0", "--level_weight=0.5 --aux_weight=0"]


@pytest.mark.parametrize("settings", FOR_AN_NTM)
@pytest.mark.parametrize("resume", ["no", "yes"])
def test_what_flow_matching_does_not_learn_by_is_refused(base, tmp_path, settings, resume):
    if resume == "yes":
        shutil.copy(base / "ckpt.pt", tmp_path)
    name, value = settings.split()[0].removeprefix("--").split("=")
    line = fails("train.py", *TRAIN, "--objective=fm", f"--out_dir={tmp_path}", f"--resume={resume}", *settings.split())
    assert line.startswith(f"objective is 'fm', and {name} {value}") and line.endswith(" is for an NTM: leave it out")


@pytest.mark.slow
def test_what_flow_matching_does_not_use_is_noted(tmp_path):
    """One config file does for both objectives: what sizes an NTM alone does not stop flow matching."""
    short = [*SHORT, *SMALL, "--objective=fm", "--max_iters=1"]
    _, _, notes = run_with_notes("train.py", *short, f"--out_dir={tmp_path / 'a'}")
    assert notes == []
    same_as_default = ["--rank=0", "--level_weight=0", "--aux_weight=0", "--closed_form=False", "--first_noise=1"]
    _, _, notes = run_with_notes("train.py", *short, *same_as_default, f"--out_dir={tmp_path / 'b'}")
    assert notes == []
    sizes = ["--transporter_blocks=2", "--transporter_width=16", "--steps=32", "--pairs=False", "--chunk=3",
             "--parametrization=posterior", "--t_min=0"]
    _, _, notes = run_with_notes("train.py", *short, *sizes, f"--out_dir={tmp_path / 'c'}")
    note, = notes
    assert note == ("flow matching does not use parametrization, transporter_width, transporter_blocks, steps, pairs, "
                    "t_min, chunk: only an NTM does")
    assert same_training(*(tmp_path / name / "ckpt.pt" for name in "ac"))


@pytest.mark.slow
def test_settings_that_have_no_effect_are_noted(tmp_path):
    short = [*SHORT, *SMALL, "--max_iters=1"]
    unused = ["--flip=True", "--crop=random", "--filter_leak=0.06"]
    _, _, notes = run_with_notes("train.py", *short, *unused, f"--out_dir={tmp_path}")
    assert notes == ["crop, flip: not used, as only shards are flipped, cropped or scaled",
                     "filter_leak is not used: filters is 0"]


def test_a_resumed_run_keeps_its_parametrization(trained, tmp_path):
    shutil.copy(trained / "ckpt.pt", tmp_path)
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--resume=yes", "--parametrization=posterior")
    assert line == (f"parametrization is 'posterior', but the run of {tmp_path / 'ckpt.pt'} has 'direct': "
                    "leave it out to resume it")


def test_an_ntm_of_nothing_is_refused(tmp_path):
    for objective in "ntm", "fm":
        line = fails("train.py", *TRAIN, "--depth=0", f"--objective={objective}", f"--out_dir={tmp_path}")
        assert line == "depth is 0, but must be at least 1"
    line = fails("train.py", *TRAIN, "--objective=tarflow", "--steps=1", "--transporter_blocks=0", f"--out_dir={tmp_path}")
    assert line == "transporter_blocks is 0, which leaves a TarFlow nothing to train: choose at least 1"


def test_wrong_kind_of_checkpoint_is_named(base, tmp_path):
    assert "is no checkpoint of an NTM of" in fails("distill.py", *DISTILL, f"--out_dir={base}")
    line = fails("train.py", *TRAIN, "--objective=fm", f"--init_from={base / 'ckpt.pt'}", f"--out_dir={tmp_path}")
    assert "only an NTM starts from" in line
    checkpoint.save(tmp_path / "x.pt", kind="denoiser")
    line = fails("train.py", *TRAIN, f"--init_from={tmp_path / 'x.pt'}", f"--out_dir={tmp_path}")
    assert "is no checkpoint of flow matching or an NTM of" in line
