"""evaluate.py: its numbers against closed forms, and the script on a small trained model."""
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import randomize
from helpers import DISTILL, TRAIN, contents, fails, load, on_ranks, pixels, png, read_log, run, run_with_notes
from torch.distributions import MultivariateNormal

import evaluate
import train
from data import get_dataset, get_tokenizer
from evidence.detector import parse
from evidence.judge import frechet_distance, nearest_labels
from flow import forward_trajectory, reverse_posterior, time_grid
from model import NTM, NTMConfig, forward_log_prob
from pipeline import TrainedModel
from plumbing import plots, shapes
from plumbing.images import to_pixels
from plumbing.loader import validation_batches
from plumbing.shards import write_shard
from predictor import Gaussian

MEAN, STD = 0.4, 0.5  # of Gaussian data, every number on its own
TINY = dict(image_size=(4, 6), channels=1, patch_size=2, vocab_size=20, text_len=3, width=16, depth=1, heads=2,
            transporter_width=8, transporter_blocks=2, transporter_layers=1, transporter_heads=2)
TEXT = torch.tensor([[2, 3, 0]])


class ExactReverse(NTM):
    """For data N(MEAN, STD^2) the reverse step is a Gaussian: A x_t + B E[x_0 | x_t], C^2 + B^2 Var[x_0 | x_t]."""

    def predict(self, u, t, s, steps, text):
        A, B, C = (a[:, None, None] for a in reverse_posterior(t, s))
        t = t[:, None, None]
        marginal = (1 - t)**2 * STD**2 + t**2  # variance of x_t
        x0 = MEAN + (1 - t) * STD**2 / marginal * (u - (1 - t) * MEAN)
        variance = C**2 + B**2 * STD**2 * t**2 / marginal
        return Gaussian(A * u + B * x0, 0.5 * variance.log() * torch.ones_like(u))


def bound_of(model, t_min, count=2_000):
    """The bounds (count,) of Gaussian data, and its exact -log p(x_{t_min}), each a mean over the same trajectories."""
    ts = time_grid(4, t_min, 6, shift=1.0).double().expand(count, -1)
    x0 = MEAN + STD * torch.randn(count, 6, 4).double()
    x = forward_trajectory(x0, ts)
    _, bound = model.trajectory_bound(x, ts, TEXT.expand(count, -1))
    std = math.sqrt((1 - t_min)**2 * STD**2 + t_min**2)
    truth = -torch.distributions.Normal((1 - t_min) * MEAN, std).log_prob(x[:, 0]).sum(dim=(1, 2))
    return bound, truth


@pytest.mark.parametrize("t_min", [0.0, 0.02])
def test_bound_with_the_exact_reverse_is_the_truth(t_min):
    bound, truth = bound_of(ExactReverse(NTMConfig(**TINY)).double(), t_min)
    torch.testing.assert_close(bound, truth, rtol=1e-6, atol=1e-6)  # for every trajectory: q's own reverse is exact


@pytest.mark.parametrize("t_min", [0.0, 0.02])
def test_bound_of_a_wrong_model_is_above_the_truth(t_min):
    bound, truth = bound_of(NTM(NTMConfig(**TINY)).double(), t_min)
    gap = bound - truth
    assert gap.mean() > 10 * gap.std() / math.sqrt(len(gap))


def test_bits_per_dimension_of_uniform_bytes_are_eight():
    """Dequantised uniform bytes are uniform on [-1, 1]: log 2 nats for each number."""
    assert evaluate.bits_per_dim(torch.tensor(math.log(2) * 10), 10).item() == pytest.approx(8)


def test_bits_per_dimension_are_of_images_without_noise():
    """A model of the exact reverse: whatever the trajectory, its bound is -log N(image; MEAN, STD^2)."""
    cpu, tokenizer = torch.device("cpu"), get_tokenizer()
    config = NTMConfig(**TINY | dict(image_size=8, text_len=4, vocab_size=tokenizer.vocab_size, shift=1.0))
    model = SimpleNamespace(network=ExactReverse(config), tokenizer=tokenizer, device=cpu, ts=config.time_grid(0.02))
    dataset = get_dataset("digits", "val", 8, 1)
    found = evaluate.evaluate_likelihood(model, dataset)
    nats = []
    for images, *_ in validation_batches(dataset, tokenizer, 4, 500, cpu):
        z = (images.double() - MEAN) / STD
        nats.append((0.5 * z**2 + 0.5 * math.log(2 * math.pi) + math.log(STD)).sum(dim=(1, 2, 3)))
    assert found["bound of 4 trajectories"]["mean"] == pytest.approx(found["bound"]["mean"], rel=1e-4)  # no slack
    bits = torch.cat(nats) / 64 / math.log(2) - math.log2(2 / 256)  # bins are 2/256 wide
    assert len(bits) == 297
    expected = {"mean": bits.mean().item(), "standard_error": bits.std().item() / 297**0.5}
    assert found["bits per dimension"] == pytest.approx(expected, rel=1e-4)
    # at t_min = 0.02 images are (1 - 0.02) x_0 + 0.02 noise: their density is higher by log(1 / 0.98), but for the noise
    shifted = (bits.mean().item() - 7) * math.log(2) + math.log(0.98)
    assert found["bound"]["per_dimension"] == pytest.approx(shifted, abs=0.005)


def test_more_trajectories_make_a_tighter_bound():
    """From the same x_{t_0}: nearer to -log p, which no number of them falls below. The first is the bound's own."""
    model = SimpleNamespace(network=randomize(NTM(NTMConfig(**TINY)), 0.3))
    x0, ts = torch.rand(200, 6, 4), time_grid(4, 0.02, 6, shift=1.0)
    batch = x0, TEXT.expand(200, -1), None
    one, found = (evaluate.nats_of(model, [(*batch, torch.Generator().manual_seed(0))], ts, several=several)
                  for several in (1, 16))
    noise = torch.randn(1, 200, 5, 6, 4, generator=torch.Generator().manual_seed(0))[0]
    x, times = forward_trajectory(x0, ts.expand(200, -1), noise=noise), ts.expand(200, -1)
    torch.testing.assert_close(one["bound"], model.network.trajectory_bound(x, times, TEXT.expand(200, -1))[1])
    assert len(one) == 6  # four steps, the trajectory, the bound: one trajectory makes nothing tighter
    gain = found["bound"] - found["bound of 16 trajectories"]
    assert gain.mean() > 5 * gain.std() / math.sqrt(200)


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["ntm", "fm"])
def test_validation_in_bfloat16_is_measured_in_float32(tmp_path, objective):
    """What the log of a run in bfloat16 says is what evaluate.py finds on the same examples, and what a validation in
    float32 would have said."""
    run("train.py", *TRAIN, f"--objective={objective}", f"--out_dir={tmp_path}", "--bfloat16=True", "--val_examples=150",
        "--max_iters=20", "--lr=1e-2")
    logged = read_log(tmp_path / "log.jsonl")[-1]
    network, cpu = load(tmp_path, objective), torch.device("cpu")
    batches = [*validation_batches(get_dataset("digits", "val", 8, 1), get_tokenizer(), 4, 150, cpu)]
    ts = network.config.time_grid(0.02)
    config = {"bfloat16": True, "chunk": 0}
    with torch.autocast("cpu", dtype=torch.bfloat16):  # whatever is around it
        found = train.validate(network, restarted(batches), ts, config)
    assert found == pytest.approx({name: logged[name] for name in found}, rel=1e-6)
    assert found == train.validate(network, restarted(batches), ts, config | {"bfloat16": False})
    if objective == "fm":
        return
    results, _ = evaluated(f"--out_dir={tmp_path}", "--parts=likelihood", "--val_examples=150", "--trajectories=3")
    likelihood = {name: value["per_dimension"] for name, value in results["likelihood"].items() if "step" in name
                  or name == "bound"}
    assert likelihood["bound"] == pytest.approx(logged["val_bound"], rel=1e-6)
    for k in range(4):
        assert likelihood[f"step {k}"] == pytest.approx(logged[f"val_step_{k}"], rel=1e-6, abs=1e-6)
    assert sum(likelihood[f"step {k}"] for k in range(4)) / 4 == pytest.approx(logged["val_loss"], rel=1e-6)


def restarted(batches):
    """Batches of validation_batches, as if drawn anew: their generators where they were when they began."""
    for images, text, captions, generator in batches:
        yield images, text, captions, generator.clone_state()


def test_samples_are_judged_as_their_files_would_show_them(trained, tmp_path):
    """Clipped to [-1, 1], which what the model draws is not; otherwise unchanged."""
    model, captions = TrainedModel(trained, "cpu", denoise="none"), ["the digit one", "a 3"] * 4
    drawn, *_ = model.sample_trajectories(captions, range(8), 1.0)
    assert drawn.abs().max() > 1
    torch.testing.assert_close(evaluate.draw_samples(model, captions, 1.0, tmp_path), drawn.clamp(-1, 1))


def test_likelihoods_are_in_float32_whatever_is_around_them(trained):
    """From Python under autocast: those of given images and of samples, of captions, and the true ones' gaps."""
    found = []
    for bfloat16 in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bfloat16):
            model, captions = TrainedModel(trained, "cpu", denoise="score"), ["the digit one", "a 3"]
            images = torch.linspace(-1, 1, 128).view(2, 1, 8, 8)
            samples, _, nll = model.sample_trajectories(captions, range(2), 1.0, best_of=2)
            x0, text = model.network.patchify(images), model.encode(captions)
            ts = model.ts.expand(2, -1)
            x = forward_trajectory(x0, ts, torch.Generator().manual_seed(0))
            batch = x0, text, captions, torch.Generator().manual_seed(0)
            found.append([*model.log_likelihood(images, captions), samples, nll,
                          evaluate.caption_log_likelihoods(model.network, x, ts, text[:, None]),
                          *evaluate.nats_of(model, [batch], model.ts, several=2).values()])
    for inside, outside in zip(*found, strict=True):
        assert inside.dtype == torch.float32 and torch.equal(inside, outside)


def test_caption_likelihoods_are_those_of_trajectories():
    model = NTM(NTMConfig(**TINY)).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    ts = time_grid(4, 0.02, 6, shift=1.0).double().expand(2, -1)
    x = forward_trajectory(torch.randn(2, 6, 4).double(), ts)
    candidates = torch.tensor([[[2, 3, 0], [4, 0, 0], [1, 0, 0]], [[5, 6, 7], [2, 3, 0], [8, 0, 0]]])
    found = evaluate.caption_log_likelihoods(model, x, ts, candidates)
    for k in range(3):
        log_p = -model.trajectory_nll(x, ts, candidates[:, k]).sum(dim=1)
        torch.testing.assert_close(found[:, k], log_p - forward_log_prob(x, ts))


def test_frechet_distance_of_gaussians():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50_000, 1, 1, 2, generator=generator)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a, 2 * a + 3) == pytest.approx(2 * 9 + 2 * 1, rel=0.02)  # |3|^2 + (2 - 1)^2 each
    S = torch.tensor([[1.0, 0.6], [0.6, 0.5]])
    b = MultivariateNormal(torch.zeros(2), S).sample((50_000,))[:, None, None]
    root = torch.linalg.eigvals(S).real.sqrt().sum().item()  # against N(0, I): tr(I + S - 2 S^(1/2))
    assert frechet_distance(a, b) == pytest.approx(2 + 1.5 - 2 * root, abs=0.02)


def test_nearest_labels():
    examples = torch.tensor([0.0, 1.0, 5.0])[:, None, None, None].expand(3, 1, 2, 2)
    found = nearest_labels(examples[[1, 2, 0]] + 0.3, examples, torch.tensor([7, 8, 9]))
    assert found.tolist() == [8, 9, 7]


def test_frechet_distance_of_few_images_of_many_pixels_is_that_of_their_covariances():
    a, b = torch.randn(6, 1, 4, 4).double(), torch.randn(9, 1, 4, 4).double() + 1
    (mean_a, S_a), (mean_b, S_b) = ((x.mean(0), x.T.cov()) for x in (a.flatten(1), b.flatten(1)))
    root = torch.linalg.eigvals(S_a @ S_b).real.clamp(min=0).sqrt().sum()
    expected = (mean_a - mean_b).square().sum() + S_a.trace() + S_b.trace() - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-4)


def test_large_images_are_shrunk_before_their_distance_is_measured():
    images = torch.randn(3, 1, 16, 64)
    torch.testing.assert_close(evaluate.shrunk(images), images.unflatten(3, (32, 2)).mean(dim=4))
    assert torch.equal(evaluate.shrunk(images[..., :28]), images[..., :28])


def test_credits_of_ties():
    """The true caption first: alone at the top, one of two there, cut to the ids of the best, and beaten."""
    text = torch.arange(4)[None, :, None].repeat(5, 1, 2)
    text[2, 1] = text[2, 0]
    text[4, 2] = text[4, 3]
    log_p = torch.tensor([[5.0, 1, 2, 3], [5, 5, 2, 3], [4.9999, 5, 2, 3], [4, 5, 5, 5], [5, 1, 5, 4.9999]])
    assert evaluate.credits(log_p, text, torch.zeros(5, dtype=torch.long)) == pytest.approx([1, 1 / 2, 1 / 2, 0, 1 / 3])


def test_standard_errors_of_one_value_and_of_none_or_all():
    assert evaluate.mean_and_error(torch.tensor([2.0])) == {"mean": 2.0}
    for hits, mean in ([True] * 9, 1), ([False] * 9, 0):
        found = evaluate.proportion(hits)
        assert found == {"mean": mean, "standard_error": pytest.approx(math.sqrt(0.05 * 0.95 / 10))}
    assert evaluate.proportion([True])["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 2))


def test_standard_errors():
    assert evaluate.proportion([True] * 3 + [False]) == {"mean": 0.75, "standard_error": math.sqrt(0.75 * 0.25 / 4)}
    values = torch.tensor([1.0, 2.0, 3.0])
    assert evaluate.mean_and_error(values) == pytest.approx({"mean": 2.0, "standard_error": 1 / math.sqrt(3)})


# ---------------------------------------------------------------------------------------------------------------
# The script


def evaluated(*settings):
    _, printed = run("evaluate.py", "--device=cpu", *settings)
    folder = next(setting for setting in settings if setting.startswith("--out_dir=")).removeprefix("--out_dir=")
    return json.loads(open(f"{folder}/evaluate.json").read()), printed


def test_digits_in_all_parts(copied):
    results, printed = evaluated(f"--out_dir={copied}", "--val_examples=60", "--num_samples=40", "--steps=4,3",
                                 "--batch_size=25", "--trajectories=2")
    assert results["iteration"] == 100
    likelihood = results["likelihood"]
    for name in ("step 0", "step 1", "step 2", "step 3", "trajectory", "bound"):
        assert likelihood[name]["per_dimension"] == pytest.approx(likelihood[name]["mean"] / 64)
    assert 0 < likelihood["bits per dimension"]["mean"] < 12
    assert {name for name in results if name.startswith("samples")} == {
        f"samples, {count} steps, {way}" for count in (4, 3) for way in ("none", "score", "learned")
        if (count, way) != (3, "learned")}  # for which nothing was distilled
    assert {(row["curve"], row["passes"]) for row in results["curves"]} == {
        ("NTM, none", 4), ("NTM, score", 4), ("NTM, learned", 5), ("NTM, none", 3), ("NTM, score", 3)}
    learned = results["samples, 4 steps, learned"]
    assert learned["frechet_distance"] > 0 and learned["images_per_s"] > 0
    assert 0 <= learned["nearest_is_of_the_class"]["mean"] <= 1
    assert results["classifier"]["accuracy"].keys() == {"mean", "standard_error"}
    assert pixels(copied / "evaluate" / "ntm_4_learned.png").shape[1] > 900
    assert pixels(copied / "evaluate" / "quality.png").shape[1] > 900  # two panels
    for word in ("bits per dimension", "accuracy", "±", "wrote"):
        assert word in printed


def test_parts_are_printed_as_they_finish(trained, monkeypatch, capsys):
    for name, value in {"out_dir": str(trained), "parts": "likelihood,classifier", "val_examples": 20,
                        "device": "cpu"}.items():
        monkeypatch.setattr(evaluate, name, value)

    def broken(*_):
        raise ValueError("no classifier today")

    monkeypatch.setitem(evaluate.PARTS, "classifier", broken)
    with pytest.raises(SystemExit, match="no classifier today"):
        evaluate.main(vars(evaluate))
    printed = capsys.readouterr().out
    assert "likelihood" in printed and "bits per dimension" in printed and "wrote" not in printed


def test_what_json_does_not_have_is_not_written(copied, monkeypatch):
    for name, value in {"out_dir": str(copied), "parts": "classifier", "device": "cpu"}.items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setitem(evaluate.PARTS, "classifier", lambda *_: {"accuracy": math.nan})
    with pytest.raises(SystemExit, match="JSON"):
        evaluate.main({"device": "cpu"})
    assert not (copied / "evaluate.json").exists()


def quality_of(curve, passes, images_per_s, guidance=1.0, **measured):
    return {"curve": curve, "passes": passes, "guidance": guidance, "images_per_s": images_per_s, **measured}


def test_quality_is_plotted_against_passes_and_seconds(monkeypatch):
    seen = {}
    monkeypatch.setattr(plots, "plot", lambda panels, x_label, log_x: seen.update(panels, log_x=log_x) or "image")
    assert plots.plot_quality([quality_of("NTM", 8, 10.0, overall={"mean": 0.9}),
                                quality_of("NTM", 4, 20.0, overall={"mean": 0.8}),
                                quality_of("flow matching", 4, 40.0, overall={"mean": 0.3})]) == "image"
    assert seen == {
        "overall score against network passes": {"NTM": [(4, 0.8), (8, 0.9)], "flow matching": [(4, 0.3)]},
        "overall score against seconds an image": {"NTM": [(0.05, 0.8), (0.1, 0.9)], "flow matching": [(0.025, 0.3)]},
        "log_x": True}
    seen.clear()
    plots.plot_quality([quality_of("NTM", passes, 5.0, frechet_distance=9 - passes) for passes in (8, 4)])
    assert seen["Frechet distance against network passes"] == {"NTM": [(4, 5), (8, 1)]}
    assert plots.plot_quality([quality_of("NTM", 4, 9.0, w, frechet_distance=1 + w) for w in (2.0, 0.0)]) is None
    assert plots.plot_quality([quality_of("NTM", passes, 1.0) for passes in (4, 8)]) is None


def test_logarithmic_axes_have_round_ticks(monkeypatch):
    written = []
    monkeypatch.setattr(plots.ImageDraw.ImageDraw, "text", lambda self, place, text, **_: written.append(text))
    plots.plot({"": {"": [(0.013, 7.0), (0.3, 7.5)]}}, "", log_x=True)
    assert {"0.02", "0.05", "0.1", "0.2"} <= set(written) and not {"0.01", "0.5", "0.013", "0.3"} & set(written)
    plots.plot({"": {"": [(1, 7.0), (50, 7.5), (3, 7.2)]}}, "", log_x=True)
    assert {"1", "3", "50"} <= set(written)


@pytest.mark.parametrize("log_x, middle", [(False, 50.5), (True, 10.0)])
def test_curves_stand_where_their_axes_say(log_x, middle):
    width, height = plots.PANEL
    panel = plots.Panel([(1, 3.0), (100, 5.0)], 40, log_x, shown=1)
    assert [panel.across(x) for x in (1, middle, 100)] == pytest.approx([40, 40 + width / 2, 40 + width])
    assert panel.down(4.0) == pytest.approx(plots.TOP + height / 2) and panel.down(5.0) < panel.down(3.0)


def test_captions_of_a_data_set_without_classes_are_those_of_its_examples_by_turns(monkeypatch):
    monkeypatch.setattr(evaluate, "num_samples", 5)
    dataset = [(None, "a cat"), (None, "a dog")]
    captions, tasks = evaluate.captions_of_samples(SimpleNamespace(settings={"dataset": "shards"}), dataset)
    assert captions == ["a cat", "a dog", "a cat", "a dog", "a cat"] and tasks == ()


def test_several_guidances_are_measured_side_by_side(copied):
    results, _ = evaluated(f"--out_dir={copied}", "--parts=samples", "--num_samples=10", "--guidance=0,2.5",
                           "--denoise=none", "--restarts=2")
    assert {title for title in results if title.startswith("samples")} == {
        "samples, 4 steps, none, guidance 0", "samples, 4 steps, none, guidance 2.5"}
    assert [row["passes"] for row in results["curves"]] == [6, 6]  # four, and the second twice again
    assert not (copied / "evaluate" / "quality.png").exists()  # of one number of steps
    sheets = [pixels(copied / "evaluate" / f"ntm_4_none_guidance_{strength}.png") for strength in ("0", "2.5")]
    assert not np.array_equal(*sheets)
    assert "vary one at a time" in fails("evaluate.py", f"--out_dir={copied}", "--guidance=0,1", "--steps=2,4")


def test_three_ranks_measure_what_one_does(copied):
    """Of three batches of images and two of samples, so that a rank has nothing to sample."""
    settings = [f"--out_dir={copied}", "--device=cpu", "--val_examples=60", "--num_samples=40", "--batch_size=25",
                "--trajectories=1", "--denoise=none,learned"]
    alone, _ = evaluated(*settings)
    printed = on_ranks(3, "evaluate.py", *settings)
    together = json.loads((copied / "evaluate.json").read_text())
    assert printed.count("wrote") == 1 and alone.keys() == together.keys()
    for part, measured in alone.items():
        for name, value in measured.items() if part not in ("config", "iteration", "curves") else ():
            if name != "images_per_s":
                assert together[part][name] == pytest.approx(value, rel=1e-4), (part, name)


def test_classifier_counts_the_true_class(trained, monkeypatch):
    for name, value in {"val_examples": 60, "batch_size": 25, "trajectories": 1}.items():
        monkeypatch.setattr(evaluate, name, value)
    monkeypatch.setattr(evaluate, "caption_log_likelihoods", lambda model, x, *_: torch.eye(10)[[3] * len(x)])
    dataset = get_dataset("digits", "val", 8, 1)
    found = evaluate.evaluate_classifier(TrainedModel(trained, torch.device("cpu"), 0, "none"), dataset)
    assert found["accuracy"]["mean"] == sum(dataset.labels[i] == 3 for i in range(60)) / 60 > 0


@pytest.mark.slow
def test_a_model_that_ignores_captions_scores_one_in_ten(tmp_path):
    """One whose words all have the same embedding; the true caption stands first of ten."""
    run("train.py", *TRAIN, "--dataset=shapes", "--image_size=16", "--channels=3", "--text_len=8", "--max_iters=1",
        f"--out_dir={tmp_path}")
    held = contents(tmp_path / "ckpt.pt")
    held["ema"]["predictor.trunk.embed.weight"].zero_()
    torch.save(held, tmp_path / "ckpt.pt")
    results, _ = evaluated(f"--out_dir={tmp_path}", "--parts=classifier", "--val_examples=20", "--trajectories=1")
    assert results["classifier"]["accuracy"]["mean"] == pytest.approx(0.1)


def test_one_example_and_one_sample(copied, recwarn):
    results, printed = evaluated(f"--out_dir={copied}", "--val_examples=1", "--num_samples=1", "--denoise=learned")
    text = (copied / "evaluate.json").read_text()
    assert "NaN" not in text and "null" not in text and "± nan" not in printed
    assert [str(warning.message) for warning in recwarn if "degrees of freedom" in str(warning.message)] == []
    assert results["likelihood"]["bound"].keys() == {"mean", "per_dimension"}
    assert "frechet_distance" not in results["samples, 4 steps, learned"]
    assert results["classifier"]["accuracy"]["standard_error"] == pytest.approx(math.sqrt(0.75 * 0.25 / 2))


def test_what_is_left_out_is_said(copied, tmp_path):
    _, _, notes = run_with_notes("evaluate.py", "--device=cpu", f"--out_dir={copied}", "--parts=samples", "--steps=4,3",
                                 "--num_samples=10")
    assert len(notes) == 2 and all(part in notes[0] for part in ("trained for 4 steps", "with 3"))
    assert all(part in notes[1] for part in ("denoiser.pt", "for 4 steps, not 3", "left out"))
    (copied / "denoiser.pt").unlink()
    _, printed, notes = run_with_notes("evaluate.py", "--device=cpu", f"--out_dir={copied}", "--parts=samples",
                                       "--num_samples=9")
    assert "samples, 4 steps, score" in printed and "learned" not in printed
    assert "there is no" in notes[0] and "denoiser.pt" in notes[0] and "left out" in notes[0]
    assert "needs 10" in notes[1] and "there are 9 and 297" in notes[1]
    assert "no samples to measure" in fails("evaluate.py", "--device=cpu", f"--out_dir={copied}", "--denoise=learned")


def test_networks_are_loaded_once(copied, monkeypatch):
    loaded, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda path, **kwargs: loaded.append(path.name) or load(path, **kwargs))
    evaluated(f"--out_dir={copied}", "--parts=samples", "--guidance=0,1,2", "--num_samples=10", "--denoise=learned,none")
    assert sorted(loaded) == ["ckpt.pt", "denoiser.pt"]


@pytest.mark.slow
def test_shards_have_a_distance_and_captions_that_are_cut_are_told(tmp_path):
    for split in ("train", "val"):
        write_shard(tmp_path / split / "0.tar", [
            (f"{i:02d}", {"png": png((10 * i, 100, 50), (40, 40)), "txt": f"a very, very fine apple {i % 3}".encode()})
            for i in range(12)])
    run("train.py", *TRAIN, "--bad_captions=1", "--dataset=shards", f"--data_dir={tmp_path}", f"--out_dir={tmp_path}", "--image_size=40",
        "--patch_size=8", "--channels=3", "--max_iters=1")
    _, _, notes = run_with_notes("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", "--parts=samples,classifier",
                                 "--num_samples=12", "--denoise=none", "--trajectories=1")
    results = json.loads((tmp_path / "evaluate.json").read_text())
    assert results["samples, 4 steps, none"]["frechet_distance"] > 0
    assert results["classifier"]["accuracy"]["mean"] == pytest.approx(1 / 3)  # cut to 4 tokens, they are all the same
    assert len(notes) == 2 and "only 3 held-out captions" in notes[0] and "cut to 4 tokens" in notes[1]


def shapes_classifier(monkeypatch, log_p, trajectories):
    """The accuracy on 30 scenes of a model that knows them: log_p(is_true (B, 10), k) (B, 10) of trajectory k."""
    for name, value in {"val_examples": 30, "batch_size": 20, "trajectories": trajectories}.items():
        monkeypatch.setattr(evaluate, name, value)
    dataset, tokenizer = get_dataset("shapes", "val", 8, 3), get_tokenizer()
    network = NTM(NTMConfig(image_size=8, channels=3, width=8, depth=1, heads=2, transporter_width=8))
    images, captions = zip(*dataset.__getitems__(range(30)))
    tokens, text = network.patchify(torch.stack(images)).flatten(1), tokenizer.encode(captions, 8)
    calls = {}  # of each batch so far

    def known(network, x, ts, candidates):
        rows = torch.cdist(x[:, 0].flatten(1), tokens).argmin(dim=1)
        true = (candidates == text[rows][:, None]).all(dim=2)
        assert candidates.shape[1:] == (10, 8) and (true.sum(dim=1) == 1).all()  # nine others
        assert all(len(ten.unique(dim=0)) == 10 for ten in candidates)
        k = calls[rows[0].item()] = calls.get(rows[0].item(), -1) + 1
        return log_p(true, k)

    monkeypatch.setattr(evaluate, "caption_log_likelihoods", known)
    model = SimpleNamespace(network=network, tokenizer=tokenizer, device=torch.device("cpu"),
                            settings={"dataset": "shapes"}, ts=network.config.time_grid(0.02),
                            encode=lambda captions: tokenizer.encode(captions, 8), warn_about_captions=lambda captions: None)
    return evaluate.evaluate_classifier(model, dataset)["accuracy"]["mean"]


@pytest.mark.slow
def test_classifier_knows_which_caption_is_true(monkeypatch):
    assert shapes_classifier(monkeypatch, lambda true, k: 5.0 * true - 100, trajectories=1) == 1
    assert shapes_classifier(monkeypatch, lambda true, k: -5.0 * true - 100, trajectories=1) == 0


@pytest.mark.slow
def test_classifier_adds_its_trajectories(monkeypatch):
    assert shapes_classifier(monkeypatch, lambda true, k: (9.0, -2, -2, -2)[k] * true, trajectories=4) == 1
    assert shapes_classifier(monkeypatch, lambda true, k: (2.0, 2, -9, 2)[k] * true, trajectories=4) == 0


def fake_model(dataset, images_of):
    """A model whose sample of a caption and number is images_of(caption, number)."""
    def sample_trajectories(captions, numbers, *_, **__):
        return torch.stack([images_of(caption, i) for caption, i in zip(captions, numbers)]), None, None

    settings = {"dataset": dataset, "image_size": 8, "channels": 1, "seed": 0, "data_dir": ""}
    return SimpleNamespace(settings=settings, kind="ntm", denoise="none", ts=torch.zeros(5), seconds={"sampling": 4.0},
                           sample_trajectories=sample_trajectories, clipped=lambda images: images.clamp(-1, 1))


def measured_samples(monkeypatch, tmp_path, model, dataset, count, batch_size=16):
    for name, value in {"out_dir": str(tmp_path), "num_samples": count, "batch_size": batch_size}.items():
        monkeypatch.setattr(evaluate, name, value)
    return evaluate.evaluate_samples(model, dataset, 1.0)


def test_speed_is_that_of_the_slowest_rank(monkeypatch, tmp_path):
    monkeypatch.setattr(evaluate, "gathered", lambda value: [value / 2, value] if value == 4.0 else [value])
    dataset = get_dataset("digits", "val", 8, 1)
    found = measured_samples(monkeypatch, tmp_path, fake_model("digits", lambda _, i: dataset[i][0]), dataset, 20)
    assert found["images_per_s"] == 20 / 4


def test_class_of_the_nearest_training_image(monkeypatch, tmp_path):
    """Samples that are training images: of the right class but for every fourth; and those of the next class."""
    train_set, dataset = (get_dataset("digits", split, 8, 1) for split in ("train", "val"))
    of_class = [train_set.labels.tolist().index(digit) for digit in range(10)]
    for shift, expected in ((lambda i: i % 4 == 3, 0.75), (lambda i: 1, 0)):
        model = fake_model("digits", lambda caption, i: train_set[of_class[(i + shift(i)) % 10]][0] + 0.01)
        found = measured_samples(monkeypatch, tmp_path, model, dataset, 40)
        assert found["nearest_is_of_the_class"]["mean"] == expected
        assert found["images_per_s"] == 10  # 40 in 4 s
    data, _ = zip(*dataset.__getitems__(range(297)))
    model = fake_model("digits", lambda caption, i: 0.5 * data[i])
    found = measured_samples(monkeypatch, tmp_path, model, dataset, 297)
    real = torch.stack(data).flatten(1).double()
    spread = (real.mean(0).square().sum() + torch.cov(real.T).trace()).item()
    assert found["frechet_distance"] == pytest.approx(0.5**2 * spread, rel=1e-4)  # held-out images, but fainter


def scene_of(caption, repaint):
    """A 16x16 image (3, 16, 16) of what a caption says, in the colours that repaint (a dict) makes of its own."""
    _, things, relation = parse(caption)
    ahead = [(0.25, 0.5), (0.75, 0.5)] if relation in ("left of", None) else {
        "right of": [(0.75, 0.5), (0.25, 0.5)], "above": [(0.5, 0.25), (0.5, 0.75)],
        "below": [(0.5, 0.75), (0.5, 0.25)]}[relation]
    places = ahead if len(things) == 2 else [(0.25, 0.25), (0.75, 0.25), (0.25, 0.75), (0.75, 0.75)]
    colours, names = list(shapes.COLOURS), shapes.SHAPES
    rows = [(names.index(shape), colours.index(repaint[colour]), x, y, 0.17)
            for (colour, shape), (x, y) in zip(things, places)]
    columns = zip(*rows, *[rows[0]] * (4 - len(rows)))
    return to_pixels(shapes.render(shapes.Scene(*(np.array(a)[None] for a in (0, 0, len(things), *columns))), 16)[0])


def test_each_task_tests_one_aspect(monkeypatch, tmp_path):
    """All that the prompts say, and then the same in other colours, which matters to two of the six tasks."""
    colours = list(shapes.COLOURS)
    scores = {}
    for shift in (0, 1):
        repaint = dict(zip(colours, colours[shift:] + colours[:shift]))
        model = fake_model("shapes", lambda caption, i: scene_of(caption, repaint))
        scores[shift] = measured_samples(monkeypatch, tmp_path, model, None, 26)
        assert scores[shift].pop("images_per_s") == 30 / 4  # five for each task, in 4 s
    means = [{name: value["mean"] for name, value in scores[shift].items()} for shift in (0, 1)]
    tasks = ("single object", "two objects", "counting", "colours", "position", "colour attribution")
    assert means[0] == dict.fromkeys((*tasks, "strictly", "overall"), 1)
    assert means[1] == pytest.approx(dict(zip(tasks, (1, 1, 1, 0, 1, 0))) | {"strictly": 0, "overall": 4 / 6})
    errors = [scores[1][task]["standard_error"] for task in tasks]
    assert scores[1]["overall"]["standard_error"] == pytest.approx(math.sqrt(sum(e**2 for e in errors)) / 6)


@pytest.mark.slow
def test_shapes_follow_prompts_or_not(tmp_path):
    settings = [*TRAIN, "--dataset=shapes", "--image_size=16", "--channels=3", "--text_len=8", "--max_iters=2"]
    run("train.py", *settings, f"--out_dir={tmp_path}")
    run("distill.py", *DISTILL, f"--out_dir={tmp_path}", "--max_iters=1")
    results, _ = evaluated(f"--out_dir={tmp_path}", "--val_examples=10", "--num_samples=12", "--trajectories=1")
    tasks = results["samples, 4 steps, learned"]
    assert all(tasks[name]["mean"] == 0 for name in ("single object", "counting", "position", "strictly", "overall"))
    assert 0 <= results["classifier"]["accuracy"]["mean"] <= 1
    assert not (tmp_path / "evaluate" / "quality.png").exists()  # of one step count


@pytest.mark.slow
def test_flow_matching_has_samples_only(tmp_path):
    run("train.py", *TRAIN, "--objective=fm", f"--out_dir={tmp_path}", "--max_iters=2")
    results, _ = evaluated(f"--out_dir={tmp_path}", "--num_samples=10", "--steps=2,5")
    assert set(results) == {"config", "iteration", "samples, 2 steps", "samples, 5 steps", "curves"}
    assert [row["passes"] for row in results["curves"]] == [2, 5]
    assert pixels(tmp_path / "evaluate" / "quality.png").shape[1] > 900
    (tmp_path / "evaluate.json").rename(tmp_path / "other.json")
    beside, samples = f"--beside={tmp_path / 'other.json'}", (f"--out_dir={tmp_path}", "--num_samples=10", "--steps=3")
    evaluated(*samples)
    assert not (tmp_path / "evaluate" / "quality.png").exists()  # of one step count, and that of two is gone
    evaluated(*samples, beside)
    assert pixels(tmp_path / "evaluate" / "quality.png").shape[1] > 900  # of three steps, beside two and five
    (tmp_path / "other.json").write_text("{}")
    assert "other.json, which is no evaluate.json with samples" in fails("evaluate.py", *samples, beside)
    line = fails("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", "--parts=samples,likelihood")
    assert "'likelihood' is unknown for flow matching: choose among samples" in line


def test_a_likelihood_that_is_not_finite_is_an_error(copied):
    held = contents(copied / "ckpt.pt")
    held["ema"]["predictor.head.bias"][0] = math.inf
    torch.save(held, copied / "ckpt.pt")
    for part in ("likelihood", "classifier"):
        assert "not finite" in fails("evaluate.py", "--device=cpu", f"--out_dir={copied}", f"--parts={part}")


@pytest.mark.parametrize("settings, parts", [(["--parts=likelihood,fid"], ["'fid'", "classifier"]),
                                             (["--denoise=blur"], ["'blur'", "'score'"]),
                                             (["--trajectories=0"], ["trajectories is 0"]),
                                             (["--steps=()"], ["'steps' is '()'"]),
                                             (["--guidance=()"], ["'guidance' is '()'"]),
                                             (["--guidance=1e38", "--parts=samples", "--num_samples=4"],
                                              ["not finite", "1e+38"]),
                                             (["--judge=judge.pt"], ["judge.pt", "the model's data are digits"]),
                                             (["--steps=4,1", "--best_of=2", "--denoise=none"],
                                              ["best_of is 2", "fewer than 2 steps"]),
                                             (["--steps=4,2", "--restarts=1", "--denoise=none"],
                                              ["restarts is 1", "fewer than 3"]),
                                             (["--out_dir=nowhere"], ["nowhere/ckpt.pt", "train.py"])])
def test_wrong_settings_are_named(trained, settings, parts):
    line = fails("evaluate.py", f"--out_dir={trained}", *settings)
    assert all(part in line for part in parts)
    assert not (trained / "evaluate" / "ntm_4_none.png").exists()  # told before the first sample is drawn
