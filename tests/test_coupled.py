"""The scripts with a first step that keeps its noise: training, sampling, likelihood, and what they refuse."""
import math

import pytest
import torch
from helpers import SHORT, SMALL, TRAIN, contents, fails, interrupted_run, read_log, run, same_training
from tiny import make_coupled

import evaluate
from beyond import CoupledNTM
from flow import forward_trajectory, time_grid
from model import NTM
from plumbing import optim

pytestmark = pytest.mark.slow


def test_captions_are_compared_with_levels_of_their_own(monkeypatch):
    model, x0 = make_coupled(), torch.randn(2, 6, 4).double()
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
    assert "draws 4 images on cpu" in printed
    assert "learned denoising" in printed and "sampling in 5 steps" in printed
    _, printed = run("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", "--val_examples=20",
                     "--parts=likelihood,classifier")
    assert "bound of 4 trajectories" in printed and "accuracy" in printed
    load = evaluate.TrainedModel(tmp_path, "cpu")
    log_p = load.log_likelihood(torch.zeros(2, 1, 8, 8), ["the digit one", "the digit two"])
    assert log_p.nats.isfinite().all() and (log_p.nats[0] - log_p.nats[1]).abs() > 0


def test_training_couples_by_the_averaged_weights(settings, tmp_path, monkeypatch):
    """As they are after the update before; the model's own weights are others."""
    average, couple, after, coupled_by = optim.update_average, CoupledNTM.couple, [], []

    def average_and_keep(ema, model, *args):
        average(ema, model, *args)
        after.append([network.predictor.head.weight.clone() for network in (ema, model)])

    def couple_and_keep(network, *args):
        coupled_by.append(network.predictor.head.weight.clone())
        return couple(network, *args)

    monkeypatch.setattr(optim, "update_average", average_and_keep)
    monkeypatch.setattr(CoupledNTM, "couple", couple_and_keep)
    run("train.py", *settings, f"--out_dir={tmp_path}", "--val_interval=100", "--max_iters=4")
    for (averaged, own), used in zip(after[:3], coupled_by[1:4], strict=True):
        assert torch.equal(used, averaged)
    assert not torch.equal(averaged, own)


def test_restarts_leave_a_coupled_trajectory(settings, tmp_path):
    """They draw x_1 anew, and what reads the trajectory wants one that follows from the level before."""
    run("train.py", *settings, f"--out_dir={tmp_path}", "--max_iters=60", "--warmup_iters=5")
    model = evaluate.TrainedModel(tmp_path, "cpu", denoise="score")
    sampled = [model.sample_trajectories(["the digit one"] * 20, range(20), in_x_space=True, restarts=n) for n in (0, 1)]
    (once, x, nll), (again, x_again, nll_again) = sampled
    assert not torch.equal(x_again[:, :2], x[:, :2]) and (nll_again - nll).abs().mean() < 20
    text = model.encode(["the digit one"] * 20)
    follows = model.network.flowed_to_noise(x_again[:, -2], model.ts[-2].expand(20), text)
    assert torch.corrcoef(torch.stack([x_again[:, -1].flatten(), follows.flatten()]))[0, 1] > 0.95


def test_it_resumes_bit_for_bit(settings, tmp_path):
    run("train.py", *settings, f"--out_dir={tmp_path / 'whole'}")
    interrupted_run(NTM, 3, "train.py", *settings, f"--out_dir={tmp_path / 'parts'}")
    run("train.py", *SHORT, f"--out_dir={tmp_path / 'parts'}", "--resume=yes")
    assert same_training(tmp_path / "parts" / "ckpt.pt", tmp_path / "whole" / "ckpt.pt")


def test_what_it_needs_is_said(settings, tmp_path):
    needs = "which needs a start from flow matching"
    for other in ["--closed_form=False", "--transporter_blocks=1"], ["--steps=2,4"]:
        assert f"first_noise is 0.2, {needs}" in fails("train.py", *settings, *other, f"--out_dir={tmp_path}")
    line = fails("train.py", *settings, "--pairs=False", f"--out_dir={tmp_path}")
    assert "first_noise is 0.2, which needs pairs True, not False" in line
    assert needs in fails("train.py", *TRAIN, "--first_noise=0.2", f"--out_dir={tmp_path}")
    line = fails("train.py", *settings, "--first_noise=0", f"--out_dir={tmp_path}")
    assert "first_noise is 0.0, but must be above 0" in line


def test_an_uncoupled_run_is_not_coupled_on_the_way(settings, tmp_path):
    plain = [setting for setting in settings if not setting.startswith("--first_noise")]
    run("train.py", *plain, f"--out_dir={tmp_path}")
    line = fails("train.py", f"--out_dir={tmp_path}", "--resume=yes", "--first_noise=0.5", "--max_iters=8", "--device=cpu")
    assert "first_noise is 1.0, the settings say 0.5" in line
    tarflow = [*SHORT, *SMALL, "--objective=tarflow", "--steps=1", f"--out_dir={tmp_path / 'tarflow'}"]
    assert "first_noise is 0.5, but a TarFlow has no step to couple" in fails("train.py", *tarflow, "--first_noise=0.5")
    for run_of_no_flow in tarflow, [f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=8", "--device=cpu"]:
        assert "logistics is 2, but neither a TarFlow nor" in fails("train.py", *run_of_no_flow, "--logistics=2")


def test_a_tarflow_is_no_start(tmp_path):
    run("train.py", *SHORT, *SMALL, "--objective=tarflow", "--steps=1", "--transporter_blocks=1", f"--out_dir={tmp_path / 'flow'}")
    line = fails("train.py", *SHORT, *SMALL, f"--init_from={tmp_path / 'flow' / 'ckpt.pt'}", f"--out_dir={tmp_path / 'ntm'}")
    assert "is a TarFlow, which has no predictor to start an NTM from" in line
