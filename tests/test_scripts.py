"""The scripts from end to end: train, distill, sample; interrupted, resumed, in two processes, and used wrongly."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiktoken
import torch
from helpers import (DISTILL, ENVIRONMENT, ROOT, SAMPLE, SMALL, TRAIN, contents, fails, latent_shard,
                     load, pixels, png, read_log, read_log_without_speed, run, same, same_training, start,
                     training_lines)
from PIL import Image, ImageSequence
from tiny import write_idx
from torch.distributions import Normal

import distill
from pipeline import TrainedModel
from pipeline import load as load_model
from plumbing import checkpoint
from predictor import Gaussian
from plumbing.images import GAP
from data import DIGITS, get_dataset, get_tokenizer
from evidence.detector import follows, task_prompts
from evidence.emoji import PACKAGES
from flow import forward_trajectory, time_grid
from losses import TrainingLoss
from model import NTM, NTMConfig
from plumbing.loader import validation_batches
from plumbing.shards import write_shard

# ---------------------------------------------------------------------------------------------------------------
# Train and distill


@pytest.mark.parametrize("name, kind, iterations", [("ckpt.pt", "ntm", 100), ("denoiser.pt", "denoiser", 40)])
def test_checkpoint_holds_what_a_resumption_needs(trained, name, kind, iterations):
    held = contents(trained / name)
    assert held.keys() == {"kind", "model_config", "settings", "model", "ema", "optimizers", "iter", "job", "counts",
                           "vocabulary"} | ({"teacher", "teacher_sha256"} if kind == "denoiser" else {"words"})
    assert (held["kind"], held["iter"], held["settings"]["max_iters"]) == (kind, iterations, iterations)
    assert held["settings"]["out_dir"] == str(trained) and held["model_config"]["width"] == 16
    assert held["model"].keys() == held["ema"].keys()
    assert not any(same(held["model"][key], held["ema"][key]) for key in held["model"] if key.endswith("weight"))
    assert all(state["step"] == iterations for state in held["optimizers"][0]["state"].values())
    assert len(held["optimizers"][0]["state"]) == len(held["model"])


@pytest.mark.parametrize("name, iterations, names", [
    ("log.jsonl", 100, {"val_loss", "val_bound", *(f"val_step_{k}" for k in range(4))}),
    ("denoiser_log.jsonl", 40, {"val_mse", "val_psnr"})])
def test_log_has_every_iteration_and_validation(trained, name, iterations, names):
    lines = read_log(trained / name)
    training = training_lines(trained / name)
    assert [line["iter"] for line in training] == list(range(1, iterations + 1))
    assert all(line.keys() >= {"iter", "loss", "lr", "grad_norm", "images_per_s", "skipped"} for line in training)
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert all(line["grad_norm"] > 0 and line["images_per_s"] > 0 for line in training)
    first, second = (line for line in lines if line not in training)
    assert first.keys() == second.keys() == {"iter", *names}
    assert (first["iter"], second["iter"]) == (iterations // 2, iterations)
    losses = [line["loss"] for line in training]
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])  # it learns
    key = "val_loss" if "val_loss" in names else "val_mse"
    assert second[key] < first[key]


def step_by_step_nll(model, x, ts, text):
    """-log p in nats of every step of trajectories x (B, T+1, N, D), cleanest first, and of the prior: (B, T+1)."""
    B, T = len(x), len(ts) - 1
    nll = [model.step_nll(x[:, k], x[:, k + 1], ts[k].expand(B), ts[k + 1].expand(B), torch.full((B,), T), text)
           for k in range(T)]
    return torch.stack(nll + [-Normal(0, 1).log_prob(x[:, T]).sum((1, 2))], dim=1)


def held_out(model, ts):
    """The first 16 held-out digits along a trajectory, x (16, T+1, 16, 4), and their captions' ids."""
    batches = validation_batches(get_dataset("digits", "val", 8, 1), get_tokenizer(), 4, 16, "cpu")
    images, text, _, generator = next(batches)
    return forward_trajectory(model.patchify(images), ts.expand(16, -1), generator), text


@torch.no_grad()
def test_validation_of_the_model_is_its_likelihood(trained):
    ts, model = time_grid(4, 0.02, 16), load(trained, "ntm")
    x, text = held_out(model, ts)
    nll = step_by_step_nll(model, x, ts, text)
    noising = 0
    for s, t, x_s, x_t in zip(ts, ts[1:], x.unbind(1), x.unbind(1)[1:]):  # q(x_t | x_s), by its definition
        alpha = (1 - t) / (1 - s)
        noising += Normal(alpha * x_s, (t**2 - alpha**2 * s**2).sqrt()).log_prob(x_t).sum((1, 2)).mean()
    logged = read_log(trained / "log.jsonl")[-1]
    assert [logged[f"val_step_{k}"] for k in range(4)] == pytest.approx((nll.mean(0)[:4] / 64).tolist(), rel=1e-4)
    assert logged["val_loss"] == pytest.approx((nll[:, :4].mean() / 64).item(), rel=1e-4)
    assert logged["val_bound"] == pytest.approx((nll.sum(1).mean() + noising).item() / 64, rel=1e-4)


@torch.no_grad()
def test_validation_of_the_denoiser_is_its_distance_from_the_score(trained):
    ts, model = time_grid(4, 0.03, 16), load(trained, "ntm")
    x, text = held_out(model, ts)
    u0, _ = model.transporter(x[:, 0], ts[:1].expand(16), torch.full((16,), 4))
    mse = (load(trained, "denoiser")(u0, text) - model.score_denoise(x, ts, text)).square().mean().item()
    logged = read_log(trained / "denoiser_log.jsonl")[-1]
    assert logged["val_mse"] == pytest.approx(mse, rel=1e-4)
    assert logged["val_psnr"] == pytest.approx(10 * math.log10(4 / mse), rel=1e-4)


@pytest.mark.slow
def test_compiled_training_is_training(tmp_path, monkeypatch):
    """Captured as torch.compile does by default on CUDA, forward and backward, but run by PyTorch's own kernels: to
    build those of a model even this small takes a C++ compiler a minute and a half."""
    settings, losses = [*TRAIN, "--transporter_blocks=1", "--max_iters=3", "--val_interval=5", "--val_examples=2"], []
    backend, compiled = "aot_eager_decomp_partition", []
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: compiled.append(type(model)) or original(model, backend=backend))
    for name in ("True", "False"):
        run("train.py", *settings, f"--compile={name}", f"--out_dir={tmp_path / name}")
        losses.append([line["loss"] for line in training_lines(tmp_path / name / "log.jsonl")])
    torch._dynamo.reset()
    assert compiled == [TrainingLoss] and len(set(losses[0])) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert contents(tmp_path / "True" / "ckpt.pt")["model"].keys() == NTM(NTMConfig(
        **contents(tmp_path / "True" / "ckpt.pt")["model_config"])).state_dict().keys()  # no name of what compiled it


class OfCaptions(NTM):
    """The exact reverse step of data N(m, 0.3^2), each number on its own, whose mean m is a caption's first id / 10."""

    def predict(self, u, t, s, steps, text):
        t, s, m = t[:, None, None], s[:, None, None], text[:, :1, None] / 10
        variance_s, variance_t = ((1 - a)**2 * 0.09 + a**2 for a in (s, t))
        shared = (1 - t) / (1 - s) * variance_s  # the covariance of x_s and x_t
        log_std = 0.5 * torch.log(variance_s - shared**2 / variance_t)
        return Gaussian((1 - s) * m + shared / variance_t * (u - (1 - t) * m), log_std.expand_as(u))


def test_what_the_denoiser_learns_from():
    """E[x_0 | x_{t_0}, caption]: levels above t_0 say nothing more, and the transporter is still the identity."""
    teacher = OfCaptions(NTMConfig(image_size=4, patch_size=2, width=8, depth=1, heads=2, transporter_width=8))
    images, noise, ts = torch.rand(3, 1, 4, 4), torch.randn(3, 5, 4, 4), time_grid(4, 0.1, 4)
    text = torch.tensor([[3, 0], [7, 2], [1, 0]])
    u0, target = distill.input_and_target(teacher, images, text, ts, noise)
    x = 0.9 * teacher.patchify(images) + 0.1 * noise[:, 0]
    torch.testing.assert_close(u0, x)
    m = torch.tensor([0.3, 0.7, 0.1])[:, None, None]
    torch.testing.assert_close(target, m + 0.9 * 0.09 / (0.81 * 0.09 + 0.01) * (x - 0.9 * m), rtol=1e-3, atol=1e-4)


def test_validation_of_a_denoiser_weighs_all_numbers_alike():
    """In batches of two and of one; targets as above for m = 0.5, of which 0.5 is too little and x_{t_0} too much."""
    teacher = OfCaptions(NTMConfig(image_size=4, patch_size=2, width=8, depth=1, heads=2, transporter_width=8))
    images, text, ts = torch.rand(3, 1, 4, 4), torch.full((3, 2), 5), time_grid(4, 0.1, 4)
    noise = torch.cat([torch.randn(n, 5, 4, 4, generator=torch.Generator().manual_seed(n)) for n in (2, 1)])
    x = 0.9 * teacher.patchify(images) + 0.1 * noise[:, 0]
    target = 0.5 + 0.9 * 0.09 / (0.81 * 0.09 + 0.01) * (x - 0.45)
    for denoiser, estimate in ((lambda u0, text: u0, x), (lambda u0, text: text[:, :1, None] / 10, 0.5)):
        batches = [(images[rows], text[rows], None, torch.Generator().manual_seed(n))
                   for rows, n in ((slice(2), 2), (slice(2, 3), 1))]
        found, mse = distill.validate(denoiser, teacher, batches, ts), (target - estimate).square().mean().item()
        assert found == pytest.approx({"val_mse": mse, "val_psnr": 10 * math.log10(4 / mse)}, rel=1e-3)


def test_every_validation_leaves_a_grid(trained):
    names = {"000050.png", "000100.png", "denoiser_000020.png", "denoiser_000040.png"}
    assert set(os.listdir(trained / "samples")) == names
    bare = 2 * (96 + GAP) + GAP  # 2x2 pictures without captions
    for name in names:
        height, width, _ = pixels(trained / "samples" / name).shape
        assert width == bare and bare < height < 2 * bare


@pytest.mark.parametrize("script, settings, name, log", [
    ("train.py", TRAIN, "ckpt.pt", "log.jsonl"), ("distill.py", DISTILL, "denoiser.pt", "denoiser_log.jsonl")])
def test_validation_of_the_same_weights_gives_the_same_numbers(copied, script, settings, name, log):
    """Resumed where its last validation is missing, so that this is all that is left to do."""
    before = read_log(copied / log)
    sheet = copied / "samples" / ("000100.png" if name == "ckpt.pt" else "denoiser_000040.png")
    shown = pixels(sheet)
    sheet.unlink()
    (copied / log).write_text("".join(json.dumps(line) + "\n" for line in before[:-1]))
    run(script, *settings, f"--out_dir={copied}", "--resume=yes", f"--max_iters={before[-1]['iter']}", "--lr=1e-2")
    assert read_log(copied / log) == before
    assert (pixels(sheet) == shown).all()


@pytest.mark.parametrize("script, settings, log, name", [
    ("train.py", TRAIN, "log.jsonl", "000100"), ("distill.py", DISTILL, "denoiser_log.jsonl", "denoiser_000040")])
def test_a_sheet_has_as_many_samples_as_asked_for(copied, script, settings, log, name):
    """Also more than a batch of validation: 101 are eleven a row, the last row two."""
    lines = read_log(copied / log)[:-1]
    (copied / log).write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(script, *settings, f"--out_dir={copied}", "--resume=yes", f"--max_iters={lines[-1]['iter']}", "--lr=1e-2",
        "--num_samples=101")
    sheet = pixels(copied / "samples" / f"{name}.png")
    assert sheet.shape[1] == 11 * (96 + GAP) + GAP
    bottom = sheet[-90:]
    assert (bottom[:, 96 + GAP: 96 + 2 * GAP + 90] < 200).any() and (bottom[:, 2 * (96 + GAP) + GAP:] == 255).all()


def test_every_run_leaves_its_curves(trained):
    for name, panels in (("log.png", 2), ("denoiser_log.png", 2)):
        height, width, _ = pixels(trained / name).shape
        assert width > panels * 400 and (pixels(trained / name) == (31, 119, 180)).all(axis=2).any()  # a curve's colour


def test_a_denoiser_begins_with_a_similar_models(copied, tmp_path):
    first = contents(copied / "denoiser.pt")
    other = tmp_path / "earlier.pt"
    (copied / "denoiser.pt").rename(other)
    begin = [*DISTILL, f"--out_dir={copied}", f"--init_from={other}"]
    run("distill.py", *begin, "--max_iters=1", "--lr=0", "--min_lr=0", "--weight_decay=0")
    found = contents(copied / "denoiser.pt")
    assert found["iter"] == 1 and all(torch.allclose(found["ema"][name], first["ema"][name]) for name in first["ema"])
    (copied / "denoiser.pt").unlink()
    assert "is of another architecture" in fails("distill.py", *begin, "--depth=2")
    assert "has residual 0.0, the settings make it 0.03: set --residual=False" in fails(
        "distill.py", *begin, "--residual=True")


@pytest.mark.slow
@pytest.mark.parametrize("blocks, residual", [(0, 0.03), (1, 0.0)])
def test_a_denoiser_adds_to_its_input_where_that_is_almost_the_image(tmp_path, blocks, residual):
    run("train.py", *TRAIN, f"--transporter_blocks={blocks}", "--max_iters=1", f"--out_dir={tmp_path}")
    run("distill.py", *DISTILL, "--max_iters=1", f"--out_dir={tmp_path}")
    assert contents(tmp_path / "denoiser.pt")["model_config"]["residual"] == residual
    run("distill.py", "--resume=yes", "--max_iters=2", f"--out_dir={tmp_path}")
    assert load(tmp_path, "denoiser").config.residual == residual


def test_a_denoiser_from_before_there_was_a_residual_is_resumed_without(copied):
    saved = contents(copied / "denoiser.pt")
    del saved["model_config"]["residual"], saved["settings"]["residual"]
    torch.save(saved, copied / "denoiser.pt")
    run("distill.py", f"--out_dir={copied}", "--resume=yes", f"--max_iters={saved['iter'] + 1}")
    assert contents(copied / "denoiser.pt")["model_config"]["residual"] == 0


@pytest.mark.parametrize("script, name", [("train.py", "ckpt.pt"), ("distill.py", "denoiser.pt")])
def test_a_resumed_run_reads_its_settings_from_the_checkpoint(trained, copied, script, name):
    """No more is given than the folder; then more iterations, which the command line may change."""
    before = contents(copied / name)
    _, printed = run(script, f"--out_dir={copied}", "--resume=yes")
    assert (copied / name).read_bytes() == (trained / name).read_bytes()  # it was at its end
    run(script, f"--out_dir={copied}", "--resume=yes", f"--max_iters={before['iter'] + 2}", "--batch_size=4")
    held = contents(copied / name)
    assert held["iter"] == before["iter"] + 2 and held["settings"]["batch_size"] == 4
    changed = {key for key in before["settings"] if before["settings"][key] != held["settings"][key]}
    assert changed <= {"max_iters", "batch_size", "out_dir", "resume", "device"}
    line = fails(script, f"--out_dir={copied}", "--resume=yes", "--width=24")
    assert "width is 16, the settings say 24" in line and "depth" not in line


@pytest.mark.slow
def test_a_checkpoint_carries_the_words_of_its_captions(tmp_path):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--max_iters=2", "--val_interval=1")  # of 16 captions
    first = contents(tmp_path / "ckpt.pt")["words"]
    assert first == sorted(first) and {"digit", "the"} <= set(first) and "circle" not in first
    run("train.py", f"--out_dir={tmp_path}", "--resume=yes", "--max_iters=40")
    known = set(contents(tmp_path / "ckpt.pt")["words"])
    assert set(first) < known == {"a", "an", "digit", "handwritten", "the", *DIGITS}


def test_a_denoiser_does_not_go_on_with_another_teacher(copied):
    before = (copied / "denoiser.pt").read_bytes()
    run("train.py", f"--out_dir={copied}", "--resume=yes", "--max_iters=101")
    line = fails("distill.py", f"--out_dir={copied}", "--resume=auto", "--max_iters=50")
    assert "denoiser.pt learned from iteration 100, but the model is at 101: remove it" in line
    assert (copied / "denoiser.pt").read_bytes() == before


@pytest.mark.slow
def test_a_checkpoint_carries_its_vocabulary(tmp_path, monkeypatch):
    """Trained with a vocabulary at a relative path, it resumes, distils and samples elsewhere, the file being gone."""
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
    monkeypatch.chdir(tmp_path / "here")
    shutil.copy(ROOT / "assets" / "captions.tiktoken", "mine.tiktoken")
    run("train.py", *TRAIN, "--out_dir=run", "--tokenizer=mine.tiktoken", "--max_iters=2")
    (tmp_path / "here" / "mine.tiktoken").unlink()
    monkeypatch.chdir(tmp_path / "there")
    out = tmp_path / "here" / "run"
    run("train.py", f"--out_dir={out}", "--resume=yes", "--max_iters=3")
    run("distill.py", *DISTILL, f"--out_dir={out}", "--max_iters=1")
    singles, _, _ = sampled(out, "--prompt=the digit one", "--num_samples=2")
    assert contents(out / "ckpt.pt")["iter"] == 3 and singles.shape == (2, 8, 8, 3)


def test_distillation_leaves_the_model_alone(trained, tmp_path):
    shutil.copy(trained / "ckpt.pt", tmp_path)
    run("distill.py", *DISTILL, f"--out_dir={tmp_path}")
    assert (tmp_path / "ckpt.pt").read_bytes() == (trained / "ckpt.pt").read_bytes()


# ---------------------------------------------------------------------------------------------------------------
# Sample


def sampled(out, *settings):
    """What sample.py draws and prints: single pictures (B, H, W, 3), the grid, and the text."""
    _, text = run("sample.py", *SAMPLE, f"--out_dir={out}", *settings)
    names = sorted(path for path in (out / "images").iterdir() if re.fullmatch(r"\d{4}\.png", path.name))
    return np.stack([pixels(name) for name in names]), pixels(out / "images" / "sheet.png"), text


def by_hand(out, captions, denoise, guidance=1.0):
    """The pictures that sample.py should draw, (B, H, W, C), and the NLL of each one's trajectory in nats."""
    model, denoiser = load(out, "ntm"), load(out, "denoiser")
    ts, text = time_grid(4, 0.03 if denoise == "learned" else 0.02, 16), get_tokenizer().encode(captions, 4)
    noise = torch.stack([torch.randn(5, 16, 4, generator=torch.Generator().manual_seed(i))
                         for i in range(len(captions))])
    u = model.sample(text, ts, guidance, randn=lambda *shape: noise if shape[0] == 5 else torch.zeros(len(text), *shape))
    x = model.invert(u, ts)
    tokens = {"learned": denoiser(u[:, 0], text), "score": model.score_denoise(x, ts, text), "none": x[:, 0]}[denoise]
    images = ((model.unpatchify(tokens) + 1) * 128).clamp(0, 255).long().permute(0, 2, 3, 1).numpy()
    return images, step_by_step_nll(model, x, ts, text).sum(1)


@pytest.mark.parametrize("denoise, stages, strips", [
    ("learned", ["sampling in 4 steps", "learned denoising"], False),
    ("learned", ["sampling in 4 steps", "learned denoising", "inversion"], True),
    ("score", ["sampling in 4 steps", "inversion", "score denoising"], True),
    ("none", ["sampling in 4 steps", "inversion"], False)])
def test_pictures_and_their_likelihood(copied, denoise, stages, strips):
    singles, sheet, text = sampled(copied, f"--denoise={denoise}", f"--show_trajectory={strips}")
    expected, nll = by_hand(copied, [f"the digit {word}" for word in DIGITS[:5]], denoise)
    assert singles.shape == (5, 8, 8, 3)
    assert abs(singles - expected).max() <= 1

    speeds = dict(re.findall(r"^(.+): ([\d.]+) images/s", text, re.MULTILINE))
    assert list(speeds) == stages + ["all together"] and all(float(speed) > 0 for speed in speeds.values())
    if "inversion" in stages:
        line = re.search(r"NLL: (-?[\d.]+) nats, (-?[\d.]+) for each of its (\d+) numbers", text)
        total, each, numbers = line.groups()
        assert float(total) == pytest.approx(nll.mean().item(), abs=0.02)
        assert int(numbers) == 5 * 64 and float(each) == pytest.approx(nll.mean().item() / 320, abs=2e-4)
    else:
        assert "NLL" not in text

    cell = 96 + GAP
    shown = sheet[GAP:][:96:12, GAP:][:, :96:12]
    assert np.array_equal(shown, singles[0]) and sheet.shape[1] == 5 * cell + GAP
    assert (copied / "images" / "0004_trajectory.png").exists() == strips
    for i in range(5 * strips):
        strip = pixels(copied / "images" / f"{i:04d}_trajectory.png")
        assert strip.shape[1] == 6 * cell + GAP  # five levels and the picture, which comes last
        assert np.array_equal(strip[GAP:][:96:12, 5 * cell + GAP:][:, :96:12], singles[i])
        with Image.open(copied / "images" / f"{i:04d}_trajectory.gif") as film:
            frames = [np.asarray(frame.convert("RGB")) for frame in ImageSequence.Iterator(film)]
        assert len(frames) == 6 and frames[0].shape == (96, 96, 3)
        assert abs(frames[-1][::12, ::12].astype(int) - singles[i]).max() <= 2  # a GIF has 256 colours


def test_single_images_can_be_enlarged(copied):
    run("sample.py", *SAMPLE, f"--out_dir={copied}", "--num_samples=2")
    plain, sheet = pixels(copied / "images" / "0001.png"), pixels(copied / "images" / "sheet.png")
    run("sample.py", *SAMPLE, f"--out_dir={copied}", "--num_samples=2", "--scale=8")
    assert np.array_equal(pixels(copied / "images" / "0001.png"), plain.repeat(8, axis=0).repeat(8, axis=1))
    assert np.array_equal(pixels(copied / "images" / "sheet.png"), sheet)
    assert "scale is 0, but must be at least 1" in fails("sample.py", *SAMPLE, f"--out_dir={copied}", "--scale=0")


def test_prompts_from_a_file_are_drawn_in_order_and_written_underneath(copied, tmp_path):
    prompts = ["a handwritten seven", "", "the digit one"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    singles, sheet, _ = sampled(copied, f"--prompts={tmp_path / 'prompts.txt'}", "--num_samples=2", "--guidance=2")
    expected, _ = by_hand(copied, [prompt for prompt in prompts for _ in range(2)], "learned", guidance=2.0)
    assert singles.shape == (6, 8, 8, 3) and abs(singles - expected).max() <= 1

    cell_w, cell_h = (sheet.shape[1] - GAP) // 3, (sheet.shape[0] - GAP) // 2
    assert cell_w == 96 + GAP and cell_h > 96 + GAP + 10

    def ink(row, column):
        top, left = GAP + row * cell_h + 96, GAP + column * cell_w
        return (sheet[top:top + cell_h - 96 - GAP, left:left + 96] < 128).any()

    assert [ink(i // 3, i % 3) for i in range(6)] == [True, True, False, False, True, True]


@pytest.mark.parametrize("denoise", ["learned", "score"])
def test_batch_size_does_not_change_the_pictures(copied, denoise):
    whole, _, text = sampled(copied, f"--denoise={denoise}", "--seed=3")
    parts, _, same_text = sampled(copied, f"--denoise={denoise}", "--seed=3", "--batch_size=2")
    assert abs(whole - parts).max() <= 1
    if denoise == "score":
        line = re.compile("NLL: (.+) nats")
        assert float(line.search(text)[1]) == pytest.approx(float(line.search(same_text)[1]), abs=0.02)


def test_seed_prompt_guidance_and_steps_change_the_pictures(copied):
    def drawn(*settings):
        return sampled(copied, "--prompt=the digit one", "--num_samples=2", "--denoise=none", *settings)[0]

    first = drawn()
    assert np.array_equal(first, drawn()) and not np.array_equal(first[0], first[1])
    for setting in ("--seed=1", "--prompt=the digit eight", "--guidance=4", "--guidance=0", "--steps=2", "--t_min=0.1"):
        assert abs(first - drawn(setting)).max() > 1, setting


@pytest.mark.slow
def test_captions_of_a_data_set_without_classes(tmp_path):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--dataset=shapes", "--channels=3", "--text_len=8",
        "--max_iters=1")
    singles, _, _ = sampled(tmp_path, "--denoise=none", "--num_samples=2")
    assert singles.shape == (2, 8, 8, 3) and (singles[..., 0] != singles[..., 1]).any()


@pytest.mark.slow
@pytest.mark.parametrize("setting", ["--pairs=False", "--steps=(2,4)", "--transporter_blocks=0", "--bfloat16=True",
                                     "--optimizer=muon", "--channels=3", "--shift=1"])
def test_other_settings_train_and_sample(tmp_path, setting):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", setting)
    losses = [line["loss"] for line in training_lines(tmp_path / "log.jsonl")]
    assert len(losses) == 6 and all(map(math.isfinite, losses))
    assert sampled(tmp_path, "--denoise=score")[0].shape == (5, 8, 8, 3)


# ---------------------------------------------------------------------------------------------------------------
# From Python


@torch.no_grad()
def test_log_likelihood_is_the_bound_averaged_over_trajectories(trained):
    model = load_model(trained, device="cpu")
    dataset = get_dataset("digits", "val", 8, 1)
    images, captions = zip(*(dataset[i] for i in range(3)))
    found = model.log_likelihood(torch.stack(images), list(captions), trajectories=2, seed=5)
    generator, ts = torch.Generator().manual_seed(-6), time_grid(4, 0.02, 16).expand(3, -1)
    x0, text = model.network.patchify(torch.stack(images)), get_tokenizer().encode(captions, 4)
    bounds = []
    for _ in range(2):
        x = forward_trajectory(x0, ts, noise=torch.randn(1, 5, 16, 4, generator=generator).expand(3, -1, -1, -1))
        noising = sum(Normal((1 - t) / (1 - s) * x[:, k], (t**2 - ((1 - t) / (1 - s) * s)**2).sqrt()).log_prob(
            x[:, k + 1]).sum((1, 2)) for k, (s, t) in enumerate(zip(ts[0], ts[0, 1:])))
        bounds.append(step_by_step_nll(model.network, x, ts[0], text).sum(1) + noising)
    bounds = torch.stack(bounds)
    torch.testing.assert_close(found.nats, -bounds.mean(0), rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(found.standard_error, (bounds[0] - bounds[1]).abs() / 2, rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(found.bits_per_dim, bounds.mean(0) / 64 / math.log(2) + 7, rtol=1e-4, atol=1e-4)


def test_samples_from_python_are_those_of_the_script(copied):
    captions = [f"the digit {word}" for word in DIGITS[:5]]
    images = load_model(copied, device="cpu").sample(captions, guidance=2.0, seed=3)
    singles, _, _ = sampled(copied, "--guidance=2", "--seed=3")
    assert images.shape == (5, 1, 8, 8)
    assert abs(((images + 1) * 128).clamp(0, 255).long().permute(0, 2, 3, 1).numpy() - singles).max() <= 1


def test_mistakes_from_python_are_named(trained, tmp_path):
    model = load_model(trained, device="cpu")
    with pytest.raises(ValueError, match="captions is 'a 3': give a list"):
        model.sample("a 3")
    with pytest.raises(ValueError, match="there is no checkpoint .*nowhere"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="there is no checkpoint .*README.md"):
        load_model(ROOT / "README.md")  # a file, not a folder
    with pytest.raises(ValueError, match="captions is \\[\\]: give a list of at least one"):
        model.sample([])
    with pytest.raises(ValueError, match="images reach 200, but must be in"):
        model.log_likelihood(torch.full((1, 1, 8, 8), 200.0), ["a 3"])
    with pytest.raises(ValueError, match="trajectories is 1, but"):
        model.log_likelihood(torch.zeros(1, 1, 8, 8), ["a 3"], trajectories=1)
    with pytest.raises(ValueError, match="2 images, but 1 captions"):
        model.log_likelihood(torch.zeros(2, 1, 8, 8), ["a 3"])
    with pytest.raises(ValueError, match=r"images are \(3, 8, 8\), but the model's are \(1, 8, 8\)"):
        model.log_likelihood(torch.zeros(1, 3, 8, 8), ["a 3"])


# ---------------------------------------------------------------------------------------------------------------
# Interruption


@pytest.mark.slow
@pytest.mark.parametrize("number, settings", [(signal.SIGINT, ["--workers=0", "--optimizer=adamw"]),
                                              (signal.SIGTERM, ["--workers=1", "--optimizer=muon"])])
def test_interrupted_and_resumed_training_is_the_uninterrupted(tmp_path, number, settings):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = TRAIN + settings + ["--max_iters=200", "--val_interval=150"]  # seconds for the signal to arrive in
    run("train.py", *settings, f"--out_dir={whole}")
    process = start("train.py", *settings, f"--out_dir={parts}")
    log = parts / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text().count("\n") >= 3):
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()[1]
    os.killpg(process.pid, number)  # as a terminal or a job scheduler does: to the workers, too
    out, err = process.communicate(timeout=600)
    assert process.returncode == (130 if number == signal.SIGINT else 0), err  # after Ctrl-C `make demo` ends as well
    assert "Traceback" not in err
    iteration = contents(parts / "ckpt.pt")["iter"]
    assert 3 <= iteration < 200
    assert f"{parts / 'ckpt.pt'} holds iteration {iteration}; continue with --resume=yes" in out
    assert training_lines(log)[-1]["iter"] == iteration
    run("train.py", *settings, f"--out_dir={parts}", "--resume=yes")
    assert same_training(parts / "ckpt.pt", whole / "ckpt.pt")
    assert read_log_without_speed(log) == read_log_without_speed(whole / "log.jsonl")


def test_interrupted_and_resumed_distillation_is_the_uninterrupted(trained, tmp_path, monkeypatch):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for folder in (whole, parts):
        folder.mkdir()
        shutil.copy(trained / "ckpt.pt", folder)
    run("distill.py", *DISTILL, f"--out_dir={whole}")

    def dying(contents, file, save=torch.save):
        if contents["iter"] == 6:
            raise OSError("No space left on device")
        save(contents, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", dying)
        assert "No space left" in fails("distill.py", *DISTILL, f"--out_dir={parts}")
    assert contents(parts / "denoiser.pt")["iter"] == 3 and read_log(parts / "denoiser_log.jsonl")[-1]["iter"] == 6
    line = fails("distill.py", *DISTILL, f"--out_dir={parts}")
    assert line.endswith("denoiser.pt is there already: continue it with --resume=yes, or remove it to distil anew")
    run("distill.py", *DISTILL, f"--out_dir={parts}", "--resume=auto")
    assert same_training(parts / "denoiser.pt", whole / "denoiser.pt")
    assert (read_log_without_speed(parts / "denoiser_log.jsonl")
            == read_log_without_speed(whole / "denoiser_log.jsonl"))


# ---------------------------------------------------------------------------------------------------------------
# What a user can get wrong


TRAIN_MISTAKES = {
    "--bacth_size=8": ["'bacth_size' is unknown", "'batch_size'"],
    "--lr=fast": ["'lr'", "'fast'", "float"],
    "--bfloat16=maybe": ["'bfloat16'", "'maybe'", "bool"],
    "config/nothing.py": ["config/nothing.py"],
    "--init_from=gpt2": ["init_from 'gpt2'", "scratch", "--resume=yes"],
    "--resume=yes": ["no checkpoint", "ckpt.pt", "train.py"],
    "--optimizer=sgd": ["optimizer 'sgd'", "adamw", "muon"],
    "--batch_size=9 --grad_accum=2": ["batch_size 9", "2"],
    "--device=nonsense": ["device 'nonsense'", "cpu"],
    "--device=gpu": ["device 'gpu' is unknown: choose cuda, mps or cpu"],
    "--device=meta": ["device 'meta' is not available", "cpu"],  # it has shapes, and no values
    "--patch_size=3": ["8x8", "patch_size 3"],
    "--image_size=9": ["digits has no 9x9", "8x8"],
    "--image_size=(8,8,8)": ["image_size is (8, 8, 8)", "height and width"],
    "--image_size=(8,16)": ["digits has no 8x16", "8x8"],
    "--channels=2": ["2 channels", "1 or 3"],
    "--dataset=imagenet": ["'imagenet'", "shapes", "fashion", "digits"],
    "--tokenizer=bpe": ["'bpe'", "captions", "gpt2"],
    "--steps=0": ["steps is 0", "at least 1"],
    "--heads=3": ["width 16", "3 heads"],
    "--transporter_heads=3": ["width 16", "3 heads"],
    "--max_t_min=0.5": ["t_min is 0.5", "0.3454"],
    "--t_min=0.5": ["t_min is 0.5", "0.3454"],
    "--dataset=fashion --image_size=28 --data_dir={out}": ["train-images-idx3-ubyte.gz", "apt-get", "data_dir"],
    "--num_samples=0": ["num_samples", "0"],
    "--val_examples=0": ["val_examples", "0"],
    "--val_interval=0": ["val_interval", "0"],
    "--log_interval=0": ["log_interval", "0"],
    "--grad_accum=0": ["grad_accum", "0"],
    "--batch_size=0": ["batch_size", "0"],
}


@pytest.mark.parametrize("mistake", TRAIN_MISTAKES)
def test_mistake_in_training(tmp_path, mistake):
    arguments = [argument.format(out=tmp_path) for argument in mistake.split()]
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'out'}", *arguments)
    for part in TRAIN_MISTAKES[mistake]:
        assert part in line
    assert not (tmp_path / "out" / "ckpt.pt").exists()


@pytest.mark.parametrize("script", ["train.py", "distill.py", "sample.py"])
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_device_that_is_absent(tmp_path, script):
    assert "device 'cuda' is not available" in fails(script, f"--out_dir={tmp_path}", "--device=cuda")


def test_gpt2_tokenizer_offline(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "cache"))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")  # nothing listens there
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tiktoken.registry, "ENCODINGS", {})
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path}", "--tokenizer=gpt2")
    assert "'gpt2'" in line and "network" in line and "TIKTOKEN_CACHE_DIR" in line


@pytest.mark.slow
@pytest.mark.parametrize("command, parts", [
    (["train.py", "--bacth_size=8"], ["'bacth_size' is unknown"]),  # from the settings,
    (["train.py", "--device=cpu", "--image_size=9"], ["9x9"]),  # from the script,
    (["sample.py", "--device=cpu", "--out_dir=nowhere"], ["no checkpoint"])])  # and from a checkpoint
def test_mistake_is_one_line_and_exit_status_1(command, parts):
    process = start(*command)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 1 and out == ""
    assert err.count("\n") == 1 and all(part in err for part in parts)


@pytest.mark.parametrize("script, settings, name", [
    ("train.py", TRAIN, "ckpt.pt"), ("distill.py", DISTILL, "denoiser.pt")])
def test_checkpoint_is_not_overwritten(copied, script, settings, name):
    before = (copied / name).read_bytes()
    line = fails(script, *settings, f"--out_dir={copied}")
    remedy = "choose another --out_dir" if name == "ckpt.pt" else "remove it to distil anew"
    assert str(copied / name) in line and "--resume=yes" in line and remedy in line
    assert (copied / name).read_bytes() == before


def test_resumption_with_other_settings(copied):
    line = fails("train.py", *TRAIN, f"--out_dir={copied}", "--resume=yes", "--width=32", "--steps=8")
    assert str(copied / "ckpt.pt") in line
    assert "width is 16, the settings say 32" in line and "steps is (4,), the settings say (8,)" in line
    assert "depth" not in line
    line = fails("train.py", *TRAIN, f"--out_dir={copied}", "--resume=yes", "--optimizer=muon")
    assert "optimizer is adamw, the settings say muon" in line
    line = fails("distill.py", *DISTILL, f"--out_dir={copied}", "--resume=yes", "--depth=2")
    assert str(copied / "denoiser.pt") in line and "depth is 1, the settings say 2" in line


def test_checkpoint_whose_tensors_do_not_fit(copied):
    held = contents(copied / "ckpt.pt")
    held["model_config"]["transporter_width"] = 32
    torch.save(held, copied / "ckpt.pt")
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}")
    assert "another architecture" in line
    for name in ("transporter.blocks.0.", "transporter.blocks.1."):
        assert name in line
    assert "predictor" not in line


def truncate(path):
    path.write_bytes(path.read_bytes()[:path.stat().st_size // 2])


def write_text(path):
    path.write_text("question")


def copy_denoiser(path):
    shutil.copy(path.with_name("denoiser.pt"), path)


@pytest.mark.parametrize("script", ["train.py", "distill.py", "sample.py"])
@pytest.mark.parametrize("spoil, part", [(os.remove, "no checkpoint"), (truncate, "truncated"),
                                         (write_text, "not a checkpoint"), (copy_denoiser, "its kind is 'denoiser'")])
def test_model_that_cannot_be_read(copied, script, spoil, part):
    spoil(copied / "ckpt.pt")
    settings = {"train.py": TRAIN + ["--resume=yes"], "distill.py": DISTILL, "sample.py": SAMPLE}[script]
    line = fails(script, *settings, f"--out_dir={copied}")
    assert part in line and str(copied / "ckpt.pt") in line


SAMPLE_MISTAKES = {
    "--denoise=magic": ["'magic'", "learned", "score", "none"],
    "--prompts={out}/none.txt": ["none.txt"],
    "--prompts={out}/empty.txt": ["empty.txt holds no prompts"],
    "--num_samples=0": ["num_samples is 0"],
    "--batch_size=0": ["batch_size is 0"],
    "--guidance=-1": ["guidance is -1"],
    "--denoise=score --t_min=0.5": ["t_min is 0.5", "0.3454"],
    "--steps=64 --t_min=0.03": ["t_min is 0.03", "64 steps"],
    "--promt=x": ["'promt' is unknown", "'prompt"],
}


@pytest.mark.parametrize("mistake", SAMPLE_MISTAKES)
def test_mistake_in_sampling(copied, mistake):
    (copied / "empty.txt").touch()
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}", *mistake.format(out=copied).split())
    for part in SAMPLE_MISTAKES[mistake]:
        assert part in line


@pytest.mark.slow
def test_samples_of_flow_matching_that_are_not_finite_are_an_error(tmp_path):
    run("train.py", *TRAIN, "--objective=fm", f"--out_dir={tmp_path}", "--max_iters=1")
    held = contents(tmp_path / "ckpt.pt")
    held["ema"]["head.bias"][0] = math.nan
    torch.save(held, tmp_path / "ckpt.pt")
    assert "samples are not finite" in fails("sample.py", *SAMPLE, f"--out_dir={tmp_path}", "--steps=2")


def test_a_denoiser_of_an_earlier_iteration_is_refused(copied):
    run("train.py", f"--out_dir={copied}", "--resume=yes", "--max_iters=101")
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}")
    assert "learned from iteration 100, but the model is at 101" in line and "--denoise=score" in line
    sampled(copied, "--denoise=score")


def test_a_denoiser_of_another_model_of_as_many_iterations_is_refused(copied, tmp_path):
    """Whether it is sampled, evaluated or distilled further; and in the form for sampling only, too."""
    run("train.py", *TRAIN, f"--out_dir={tmp_path / 'other'}", "--max_iters=100", "--val_interval=50", "--seed=1")
    shutil.copy(copied / "denoiser.pt", tmp_path / "other")
    before = (tmp_path / "other" / "denoiser.pt").read_bytes()
    for folder in (copied, tmp_path / "other"):
        slimmed = [sys.executable, "-m", "plumbing.checkpoint", folder, tmp_path / f"slim_{folder.name}"]
        subprocess.run(slimmed, check=True, env=ENVIRONMENT, cwd=ROOT)
    for folder in (tmp_path / "other", tmp_path / "slim_other"):
        line = fails("sample.py", *SAMPLE, f"--out_dir={folder}")
        assert "denoiser.pt learned from another model" in line and "--denoise=score" in line
        line = fails("evaluate.py", "--device=cpu", f"--out_dir={folder}", "--num_samples=4", "--val_examples=4")
        assert "denoiser.pt learned from another model" in line
    line = fails("distill.py", f"--out_dir={tmp_path / 'other'}", "--resume=auto", "--max_iters=50")
    assert "denoiser.pt learned from another model" in line and "remove it" in line
    assert (tmp_path / "other" / "denoiser.pt").read_bytes() == before
    for folder in (copied, tmp_path / "slim_copy"):
        sampled(folder)

    held = contents(copied / "denoiser.pt")  # as an older version left it, which knew the iteration alone
    del held["teacher_sha256"]
    torch.save(held, tmp_path / "other" / "denoiser.pt")
    sampled(tmp_path / "other")


def test_samples_that_are_not_finite_are_an_error(copied):
    held = contents(copied / "ckpt.pt")
    held["ema"]["predictor.head.bias"][0] = math.inf
    torch.save(held, copied / "ckpt.pt")
    assert "samples are not finite" in fails("sample.py", *SAMPLE, f"--out_dir={copied}", "--denoise=none")


@pytest.mark.parametrize("mistake, parts", [
    ("--t_min=0.5", ["t_min is 0.5", "0.3454"]), ("--heads=3", ["width 16", "3 heads"]),
    ("--num_samples=0", ["num_samples", "0"]),
    ("--init_from=resume", ["init_from 'resume' is now a setting of its own", "--resume=yes"]),  # as it was written once
    ("--init_from=nowhere.pt", ["there is no", "nowhere.pt"])])
def test_mistake_in_distillation(copied, mistake, parts):
    os.remove(copied / "denoiser.pt")
    line = fails("distill.py", *DISTILL, f"--out_dir={copied}", mistake)
    assert all(part in line for part in parts)


def test_a_denoiser_without_noise_to_remove_is_refused(tmp_path):
    run("train.py", *TRAIN, "--transporter_blocks=0", "--max_iters=1", f"--out_dir={tmp_path}")
    assert "t_min is 0, but" in fails("distill.py", *DISTILL, "--t_min=0", f"--out_dir={tmp_path}")


# ---------------------------------------------------------------------------------------------------------------
# config/


def test_there_are_configs():
    assert list((ROOT / "config").glob("*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "config").glob("*.py")))
def test_config_runs(tmp_path, config):
    for part in ("train", "t10k"):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", np.arange(4 * 28 * 28, dtype=np.uint8).reshape(4, 28, 28))
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte.gz", np.arange(4, dtype=np.uint8))
    small = TRAIN + ["--transporter_heads=2", "--max_iters=1", "--batch_size=2", "--grad_accum=1", "--val_examples=2",
                     "--num_samples=1", "--workers=0", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}"]
    if config.startswith(("sit", "t2i")):
        for split in ("train", "val"):
            size = 8 if config == "sit.py" else 16 if config.startswith("t2i_tiny") else 32
            latent_shard(tmp_path / split / "0.tar", np.ones((2, 4, size, size)), ["class 1", "class 2"])
    if config.startswith(("emoji", "mine")):
        for split in ("train", "val"):
            write_shard(tmp_path / split / "0.tar", [(str(i), {"png": png(), "txt": b"a red apple"}) for i in range(2)])
    if config.startswith("t2i"):
        small += ["--tokenizer=captions", "--bad_captions=1", "--max_iters=2"]  # GPT-2's vocabulary is not on every machine
    if config == "mine_fm.py" or config == "mine.py":
        small += ["--tokenizer=captions"]
    if config == "sit.py":
        torch.save(contents(ROOT / "tests" / "sit_tiny.pt")["state_dict"], tmp_path / "sit.pt")
        small = [setting for setting in small if setting not in SMALL] + ["--heads=4", f"--init_from=sit:{tmp_path / 'sit.pt'}"]
    text = (ROOT / "config" / config).read_text()
    if "transporter_blocks = 0" in text:
        small = [setting for setting in small if "transporter_blocks" not in setting]
    if "_fm/ckpt.pt" in text:
        start = re.search(r"out/(\w+_fm)/ckpt\.pt", text)[1]
        run("train.py", str(ROOT / "config" / f"{start}.py"), *small, f"--out_dir={tmp_path / 'fm'}")
        small += [f"--init_from={tmp_path / 'fm' / 'ckpt.pt'}"]
    run("train.py", str(ROOT / "config" / config), *small)
    assert contents(tmp_path / "ckpt.pt")["settings"]["dataset"] in (config.split("_")[0].removesuffix(".py").removesuffix("32"), "shards")
    iterations = 2 if config.startswith("t2i") else 1
    assert contents(tmp_path / "ckpt.pt")["iter"] == iterations
    assert read_log(tmp_path / "log.jsonl")[-1]["iter"] == iterations


def test_denoiser_of_another_model_is_named(copied):
    held = contents(copied / "denoiser.pt")
    checkpoint.save(copied / "denoiser.pt", **held | {"model_config": held["model_config"] | {"text_len": 2}})
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}")
    assert "its text_len is 2, the model's 4" in line


def test_prompts_that_are_not_text_are_named(copied):
    (copied / "prompts.txt").write_bytes(b"\xff\xfe a bag")
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}", f"--prompts={copied / 'prompts.txt'}")
    assert "prompts.txt" in line and "cannot be read" in line


# ---------------------------------------------------------------------------------------------------------------
# Layouts for judges of many pictures, and checkpoints for sampling only


def layout(copied, tmp_path, *settings):
    return run("sample.py", "--device=cpu", f"--out_dir={copied}", f"--folder={tmp_path / 'drawn'}", "--num_samples=2",
               *settings)


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def test_geneval_layout_continues_where_it_stopped(copied, tmp_path):
    entries = [{"tag": "single_object", "include": [{"class": "seven", "count": 1}], "prompt": "the digit seven"},
               {"tag": "counting", "prompt": "a 3"}]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    settings = [f"--prompts={tmp_path / 'p.jsonl'}", "--layout=geneval"]
    layout(copied, tmp_path, *settings)
    drawn = tmp_path / "drawn"
    assert files(drawn) == [f"{n:05d}/{name}" for n in range(2)
                            for name in ("grid.png", "metadata.jsonl", "samples/0000.png", "samples/0001.png")]
    assert [json.loads((drawn / f"{n:05d}" / "metadata.jsonl").read_text()) for n in range(2)] == entries
    assert pixels(drawn / "00001" / "samples" / "0001.png").shape == (8, 8, 3)
    before = {name: (drawn / name).read_bytes() for name in files(drawn)}
    old = drawn / "00000" / "samples" / "0000.png"
    stamp = old.stat().st_mtime_ns

    for name in ("00000/samples/0001.png", "00001/grid.png", "00001/samples/0000.png"):  # as if interrupted
        (drawn / name).unlink()
    _, printed = layout(copied, tmp_path, *settings, "--batch_size=1")
    assert "2 of 4 images" in printed
    assert {name: (drawn / name).read_bytes() for name in files(drawn)} == before
    assert old.stat().st_mtime_ns == stamp

    with pytest.raises(SystemExit, match="images of other settings: choose another --folder"):
        layout(copied, tmp_path, *settings, "--seed=1")


def test_flat_layout_is_nothing_but_pictures(copied, tmp_path):
    layout(copied, tmp_path, "--layout=flat")
    assert files(tmp_path / "drawn") == ["0000.png", "0001.png"]


@pytest.mark.parametrize("settings, line, part", [
    (["--layout=tree"], "", "'tree'"), (["--layout=geneval"], None, "--prompts"),
    (["--layout=flat", "--show_trajectory=True"], None, "no place for strips"),
    (["--layout=geneval"], '{"prompt": 3}', "line 2"),
    (["--layout=geneval"], "not json", 'no JSON object with a "prompt"'),
])
def test_mistakes_in_layouts(copied, tmp_path, settings, line, part):
    if line is not None:
        (tmp_path / "p.jsonl").write_text('{"prompt": "a 3"}\n' + line)
        settings = [*settings, f"--prompts={tmp_path / 'p.jsonl'}"]
    with pytest.raises(SystemExit) as stop:
        layout(copied, tmp_path, *settings)
    assert part in stop.value.code and "\n" not in stop.value.code


def test_checkpoint_for_sampling_only(copied, tmp_path):
    subprocess.run([sys.executable, "-m", "plumbing.checkpoint", copied, tmp_path / "slim"], check=True, env=ENVIRONMENT, cwd=ROOT)
    for name in ("ckpt.pt", "denoiser.pt"):
        assert (tmp_path / "slim" / name).stat().st_size < 0.25 * (copied / name).stat().st_size
        assert str(copied) not in str(contents(tmp_path / "slim" / name)["settings"])
    for folder in (copied, tmp_path / "slim"):
        run("sample.py", *SAMPLE, f"--out_dir={folder}", "--seed=3")
    difference = pixels(copied / "images" / "0000.png") - pixels(tmp_path / "slim" / "images" / "0000.png")
    assert np.abs(difference).max() <= 3  # half precision
    (copied / "denoiser.pt").unlink()  # as flow matching has none
    subprocess.run([sys.executable, "-m", "plumbing.checkpoint", copied, tmp_path / "alone"], check=True, env=ENVIRONMENT, cwd=ROOT)
    assert [path.name for path in (tmp_path / "alone").iterdir()] == ["ckpt.pt"]
    command = [sys.executable, "-m", "plumbing.checkpoint", copied, copied / ".." / copied.name]
    refused = subprocess.run(command, env=ENVIRONMENT, cwd=ROOT, text=True, stderr=subprocess.PIPE)
    assert refused.returncode == 1 and "would lose what resuming needs" in refused.stderr
    assert "optimizers" in contents(copied / "ckpt.pt")
    line = fails("train.py", *TRAIN, f"--out_dir={tmp_path / 'slim'}", "--resume=yes")
    assert "holds only what sampling needs" in line

# ---------------------------------------------------------------------------------------------------------------
# The model that comes with the repository


@pytest.mark.slow
def test_the_shipped_model_of_shapes_follows_prompts():
    """Its score is at most four standard errors below the one that was measured of it."""
    folder, names = ROOT / "assets" / "shapes", ("ckpt.pt", "denoiser.pt")
    assert sum((folder / name).stat().st_size for name in names) < 8e6
    model = TrainedModel(folder, torch.device("cpu"))
    prompts = task_prompts(20)
    captions = [caption for _, caption in prompts]
    images, _, _ = model.sample_trajectories(captions, range(len(captions)), guidance=1.0)
    hits = [follows(image, caption, task) for image, (task, caption) in zip(images, prompts)]
    score = sum(hits) / len(hits)
    measured = 0.917  # of more prompts, by evaluate.py
    assert score > measured - 4 * math.sqrt(measured * (1 - measured) / len(hits))


@pytest.mark.slow
@pytest.mark.parametrize("name, size", [("emoji", 25e6), ("emoji64", 42e6)])
def test_the_shipped_models_of_emoji_know_colours(name, size):
    """Hearts in all styles have the colour asked for: what is not white is nearest to it."""
    folder, colours = ROOT / "assets" / name, {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1)}
    assert sum((folder / name).stat().st_size for name in ("ckpt.pt", "denoiser.pt")) < size
    model = TrainedModel(folder, torch.device("cpu"))
    captions = [f"a {colour} heart, {style} style" for style in PACKAGES for colour in colours]
    images = model.sample(captions) / 2 + 0.5
    ink = (1 - images.amin(dim=1, keepdim=True)).clamp(min=0)
    mean = (images * ink).sum(dim=(2, 3)) / ink.sum(dim=(2, 3))
    nearest = (mean @ torch.tensor(list(colours.values()), dtype=mean.dtype).T).argmax(dim=1)
    assert (nearest == torch.arange(3).repeat(len(PACKAGES))).sum() >= 11


@pytest.mark.slow
def test_sample_without_a_model_takes_the_shipped_one(tmp_path):
    _, printed = run("sample.py", "--device=cpu", "--num_samples=3", f"--folder={tmp_path}")
    assert "learned denoising" in printed and pixels(tmp_path / "0001.png").shape == (64, 64, 3)


@pytest.mark.parametrize("name", ["emoji", "emoji64", "shapes"])
def test_a_shipped_denoiser_knows_its_model(name):
    folder = ROOT / "assets" / name
    assert contents(folder / "denoiser.pt")["teacher_sha256"] == checkpoint.fingerprint(load(folder, "coupled"))


@pytest.mark.slow
def test_images_of_a_shipped_model_go_into_a_folder_of_its_own_outside_assets(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run("sample.py", "--device=cpu", "--prompt=a red circle", "--num_samples=1", f"--out_dir={ROOT / 'assets/shapes'}/")
    run("sample.py", "--device=cpu", "--prompt=a red heart", "--num_samples=1")
    assert sorted(path.parts[-2:] for path in (tmp_path / "out").glob("**/0000.png")) == [
        ("emoji64", "0000.png"), ("shapes", "0000.png")]
