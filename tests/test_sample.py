"""sample.py where something is not as the user may think: what it says then, and what it refuses."""
import json
import os
import shutil
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import ROOT, SAMPLE, TRAIN, contents, fails, on_ranks, pixels, ranks_of, run, run_with_notes

import pipeline
import sample
from data import open_dataset
from pipeline import TrainedModel, load
from plumbing import checkpoint, memory, shapes
from plumbing.layouts import read_prompts
from plumbing.runtime import coarse_products
from plumbing.tokenizer import words


def noted(out, *settings):
    """What sample.py prints, and its notes."""
    return run_with_notes("sample.py", *SAMPLE, f"--out_dir={out}", *settings)[1:]


def with_contents(path, **changed):
    torch.save(contents(path) | changed, path)


def test_nothing_is_noted_where_all_is_as_asked(copied):
    assert noted(copied)[1] == [] and noted(copied, "--prompt=the digit one", "--steps=4")[1] == []


@pytest.mark.parametrize("settings", [[], ["--denoise=learned"]])
def test_without_a_denoiser_the_score_denoises(copied, settings):
    os.remove(copied / "denoiser.pt")
    printed, notes = noted(copied, *settings)
    assert "score denoising" in printed and "learned" not in printed
    note, = notes
    assert all(part in note for part in (str(copied / "denoiser.pt"), "distill.py", "own score"))
    before = pixels(copied / "images" / "0000.png")
    assert noted(copied, "--denoise=score")[1] == [] and np.array_equal(before, pixels(copied / "images" / "0000.png"))


def test_without_a_denoiser_the_score_denoises_from_python_too(copied, capsys):
    os.remove(copied / "denoiser.pt")
    model = load(copied, device="cpu")
    assert model.denoise == "score" and model.sample(["the digit one"]).shape == (1, 1, 8, 8)
    note, = capsys.readouterr().err.splitlines()
    assert note.startswith("note: ") and "denoiser.pt" in note
    load(copied, device="cpu")
    assert capsys.readouterr().err == ""  # said once


@pytest.mark.parametrize("distilled_for", [0, 3])
def test_a_denoiser_serves_the_steps_that_it_was_distilled_for(copied, distilled_for):
    """0: those of the model, 4. The model was trained for 3 and for 4."""
    for name in ("ckpt.pt", "denoiser.pt"):
        held = contents(copied / name)
        with_contents(copied / name, model_config=held["model_config"] | {"steps": (4, 3)},
                      settings=held["settings"] | {"steps": distilled_for})
    for steps in (4, 3):
        printed, notes = noted(copied, f"--steps={steps}")
        if steps == (distilled_for or 4):
            assert "learned denoising" in printed and notes == []
        else:
            assert "score denoising" in printed and len(notes) == 1
            assert f"distilled for {distilled_for or 4} steps, not {steps}" in notes[0]


def test_steps_that_the_model_was_not_trained_for_are_told(copied):
    _, notes = noted(copied, "--steps=2", "--denoise=none", "--batch_size=2")
    note, = notes
    assert "trained for 4 steps" in note and "with 2" in note
    run("train.py", *TRAIN, "--objective=fm", f"--out_dir={copied / 'fm'}", "--max_iters=1")
    assert not any("steps" in line for line in noted(copied / "fm", "--steps=2")[1])  # flow matching takes any


def test_a_t_min_that_the_denoiser_overrides_is_told(copied):
    note, = noted(copied, "--t_min=0.1")[1]
    assert "t_min is 0.03" in note
    assert noted(copied, "--t_min=0.1", "--denoise=none")[1] == []


def test_likelihoods_beside_guided_samples_are_the_unguided_models(copied):
    assert "under the model without guidance" in noted(copied, "--denoise=score")[0]
    assert "without guidance" not in noted(copied, "--denoise=score", "--guidance=0")[0]


def test_words_that_the_model_has_never_seen_are_named(copied):
    prompt = "--prompt=The digit giraffe, a moon"
    with_contents(copied / "ckpt.pt", words=[])
    assert not any("giraffe" in note and "words" in note for note in noted(copied, prompt)[1])  # an older checkpoint
    with_contents(copied / "ckpt.pt", words=sorted(words(["the digit one"])))
    _, notes = noted(copied, prompt)
    assert sum("words a, giraffe, moon" in note for note in notes) == 1
    assert pixels(copied / "images" / "0004.png").shape == (8, 8, 3)


def test_the_shipped_models_know_their_words(capsys):
    held = contents(ROOT / "assets" / "shapes" / "ckpt.pt")
    assert held["words"] == sorted(words(shapes.captions(shapes.scenes(0, range(10_000)))))
    of_shapes, of_emoji = load(ROOT / "assets" / "shapes", device="cpu"), load(device="cpu")
    of_shapes.sample(["a giraffe on the moon"])
    first, second = capsys.readouterr().err.splitlines()
    assert "words giraffe, moon, on, the" in first and "'a giraffe" in second
    of_emoji.warn_about_captions(["a giraffe on a hexagon"])
    assert "without the words hexagon" in capsys.readouterr().err
    of_shapes.sample(["a red circle left of a blue square"])
    of_emoji.warn_about_captions((ROOT / "assets" / "emoji" / "prompts.txt").read_text().splitlines())
    assert capsys.readouterr().err == ""


def test_checkpoints_for_sampling_keep_words_and_teacher(copied, tmp_path):
    with_contents(copied / "ckpt.pt", words=["digit", "one"])
    for name in ("ckpt.pt", "denoiser.pt"):
        checkpoint.slim(copied / name, tmp_path / "slim" / name)
    assert contents(tmp_path / "slim" / "ckpt.pt")["words"] == ["digit", "one"]
    assert contents(tmp_path / "slim" / "denoiser.pt")["teacher"] == 100


def test_captions_that_are_cut_are_named_with_what_is_kept(copied):
    unknown, note = noted(copied, "--prompt=the digit one above the digit two")[1]
    assert "without the words above" in unknown
    assert "cut to 4 tokens" in note and "'the digit one above the digit two'" in note and "'the digit one above'" in note
    images = torch.zeros(1, 1, 8, 8)
    assert load(copied, device="cpu").log_likelihood(images, ["the digit one above"]).nats.isfinite()


@pytest.mark.parametrize("folder", ["prompts.txt", "prompts.txt/images", "/proc/nowhere"])
def test_a_folder_that_cannot_be_written_to_is_told_before_sampling(copied, monkeypatch, folder):
    (copied / "prompts.txt").write_text("the digit one")
    monkeypatch.setattr("model.NTM.sample", lambda *_, **__: pytest.fail("sampled"))
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}", f"--folder={copied / folder}")
    assert str(copied / folder) in line and "cannot be written to" in line


def test_prompts_are_lines_and_a_mark_is_no_prompt(tmp_path):
    """A byte-order mark, Windows' line ends, and characters at which str.splitlines() would end a line."""
    odd = "a\u2028b\x0bc\x85d"
    (tmp_path / "p.txt").write_bytes(b"\xef\xbb\xbf" + f"one\r\n\r\n{odd}\r\n".encode())
    assert [entry["prompt"] for entry in read_prompts(str(tmp_path / "p.txt"))] == ["one", "", odd]
    entries = [{"prompt": "one\r"}, {"prompt": odd, "tag": "\u2029"}]
    text = "\n".join(json.dumps(entry, ensure_ascii=False) for entry in entries)
    (tmp_path / "p.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert read_prompts(str(tmp_path / "p.jsonl")) == entries
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf")
    with pytest.raises(ValueError, match="bom.txt holds no prompts"):
        read_prompts(str(tmp_path / "bom.txt"))


def test_models_and_prompts_in_the_home_folder(copied, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(copied.parent))
    (copied.parent / "p[1]{2}.txt").write_text("an 8\n")
    assert read_prompts("~/p[1]{2}.txt") == [{"prompt": "an 8"}]
    assert load(f"~/{copied.name}", device="cpu").iteration == load(copied, device="cpu").iteration
    run("sample.py", "--device=cpu", f"--out_dir=~/{copied.name}", "--prompts=~/p[1]{2}.txt", "--num_samples=1",
        "--folder=~/[images]{1..2}")
    assert (copied.parent / "[images]{1..2}" / "sheet.png").exists()


def test_captions_of_a_data_set_that_is_gone(copied):
    held = contents(copied / "ckpt.pt")
    with_contents(copied / "ckpt.pt", settings=held["settings"] | {
        "dataset": "shards", "data_dir": str(copied / "gone"), "latent_scale": 0.0, "crop": "center", "flip": False})
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}")
    assert "without --prompt" in line and "gone" in line
    assert "wrote" in noted(copied, "--prompt=the digit one")[0]


def test_prompts_beside_a_model_are_its_own(copied, monkeypatch):
    (copied / "prompts.txt").write_text("the digit four\nan 8\n")
    monkeypatch.setattr(sample, "num_samples", 3)
    captions = ["the digit four", "an 8", "the digit four"]
    assert sample.captions_to_sample(load(copied, device="cpu")) == (captions, [])


def test_prompt_and_prompts_exclude_each_other(copied):
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}", "--prompt=the digit one", "--prompts=some.txt")
    assert "'the digit one'" in line and "'some.txt'" in line and "leave one out" in line


def test_a_folder_of_images_is_not_continued_by_another_way_to_denoise(copied, tmp_path):
    """Without a denoiser the first run takes the score; distilled since, the second would take the denoiser."""
    denoiser = shutil.move(copied / "denoiser.pt", tmp_path)
    settings = ["--layout=flat", f"--folder={tmp_path / 'flat'}"]
    noted(copied, *settings)
    shutil.copy(denoiser, copied)
    assert "images of other settings" in fails("sample.py", *SAMPLE, f"--out_dir={copied}", *settings)


@pytest.mark.parametrize("arguments, part", [
    (dict(captions=[3]), "list of at least one string"), (dict(guidance=-1.0), "guidance is -1"),
    (dict(guidance=float("nan")), "guidance is nan")])
def test_mistakes_in_sampling_from_python(trained, arguments, part):
    with pytest.raises(ValueError, match=part):
        load(trained, device="cpu").sample(**{"captions": ["a 3"]} | arguments)


def test_likelihoods_from_python(trained):
    model = load(trained, device="cpu")
    with pytest.raises(ValueError, match="steps is 2.5, but must be an int"):
        load(trained, device="cpu", steps=2.5)
    with pytest.raises(ValueError, match="images reach nan"):
        model.log_likelihood(torch.full((1, 1, 8, 8), float("nan")), ["a 3"])
    images = np.random.default_rng(0).uniform(-1, 1, (2, 1, 8, 8))  # float64, and no tensor
    found = model.log_likelihood(images, ["a 3"] * 2).nats
    assert torch.equal(found, model.log_likelihood(torch.tensor(images).float(), ["a 3"] * 2).nats)


def test_the_clock_waits_for_the_device_before_and_after(trained, monkeypatch):
    """What was queued before is not this stage's."""
    model, events = TrainedModel(trained, torch.device("cpu")), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    monkeypatch.setattr(time, "perf_counter", lambda: events.append("look") or float(len(events)))
    model.device = SimpleNamespace(type="cuda")
    model.clock("stage", events.append, "work")
    assert events == ["wait", "look", "work", "wait", "look"] and model.seconds == {"stage": 3.0}


def test_only_steps_are_coarse(trained, monkeypatch):
    """On CUDA: the inverse of a flow and a likelihood need all digits, the samples' Gaussians do not."""
    model, precision = TrainedModel(trained, torch.device("cpu"), denoise="score"), {}
    for name in ("predict", "invert", "trajectory_nll", "score_denoise"):
        def recorded(*args, name=name, function=getattr(model.network, name), **kwargs):
            precision.setdefault(name, torch.get_float32_matmul_precision())
            return function(*args, **kwargs)
        monkeypatch.setattr(model.network, name, recorded)
    monkeypatch.setattr(pipeline, "coarse_products", lambda device: coarse_products(torch.device("cuda")))
    model.sample(["the digit one"])
    assert precision == {"predict": "high", "invert": "highest", "trajectory_nll": "highest",
                         "score_denoise": "highest"}


@pytest.mark.parametrize("denoise", ["learned", "none"])
def test_the_best_of_three_is_the_one_that_the_model_finds_likeliest(trained, denoise, monkeypatch):
    model, numbers = load(trained, device="cpu", denoise=denoise), range(4, 10)
    captions = ["the digit one", "the digit two", "the digit three"] * 2
    candidates, scored, densities, draw, density = [], [], [], model.draw, pipeline.guided_log_density
    monkeypatch.setattr(model, "draw", lambda *args: candidates.append(draw(*args)) or candidates[-1])
    monkeypatch.setattr(pipeline, "guided_log_density",
                                                lambda *args: scored.append(args[1]) or densities.append(density(*args)) or densities[-1])
    images, x, nll = model.sample_trajectories(captions, numbers, 1.0, seed=2, in_x_space=denoise == "none", best_of=3)
    assert len(candidates) == 3 and "choosing" in model.seconds
    best = torch.stack(densities).argmax(dim=0).tolist()
    assert len(set(best)) > 1  # or this shows nothing
    noisy = 0.98 if denoise == "none" else 1  # then a candidate is (1 - t_0) x_0 and a little noise
    torch.testing.assert_close(torch.stack(scored) * noisy, torch.stack([tokens for tokens, _, _ in candidates]))
    for i, m in enumerate(best):
        torch.testing.assert_close(images[i], model.network.unpatchify(candidates[m][0])[i])
    if denoise == "none":
        assert torch.equal(x, torch.stack([candidates[m][1][i] for i, m in enumerate(best)])) and nll.shape == (6,)
    first, *_ = model.sample_trajectories(captions, numbers, 1.0, seed=2)
    torch.testing.assert_close(first, model.network.unpatchify(candidates[0][0]))
    alone, *_ = model.sample_trajectories(captions[1:2], [5], 1.0, seed=2, best_of=3)
    torch.testing.assert_close(alone[0], images[1], atol=1e-4, rtol=1e-4)


def test_images_are_scored_with_noise_that_none_is_drawn_with():
    """Image 0 of seed 0 too, whose generator has the seed 0."""
    drawn = {torch.randn(1, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)).item()
             for seed in range(3) for number in range(200)}
    assert len(drawn) == 600
    assert not drawn & {torch.randn(1, generator=pipeline.scoring_generator(seed)).item() for seed in range(200)}


def test_best_of_from_the_scripts(copied):
    assert "choosing: " in noted(copied, "--best_of=2")[0]
    assert "best_of is 0, but must be at least 1" in fails("sample.py", *SAMPLE, f"--out_dir={copied}", "--best_of=0")
    run("evaluate.py", "--device=cpu", f"--out_dir={copied}", "--parts=samples", "--num_samples=20", "--best_of=2",
        "--denoise=learned")
    assert json.loads((copied / "evaluate.json").read_text())["config"]["best_of"] == 2


def test_only_the_level_that_is_needed_is_inverted(copied, monkeypatch):
    """The cleanest; of a trajectory to show all but noise, which the transporter leaves as it is."""
    model, lengths = load(copied, device="cpu", denoise="none"), []
    block = model.network.transporter.blocks[0]
    inverse = block.inverse_cached
    monkeypatch.setattr(block, "inverse_cached", lambda u, *args: lengths.append(len(u)) or inverse(u, *args))
    (alone, nothing, _), (whole, x, _) = (model.sample_trajectories(["the digit one"] * 3, range(3), in_x_space=in_x_space)
                                          for in_x_space in (False, True))
    assert lengths == [3, 12] and nothing is None
    torch.testing.assert_close(alone, whole)
    torch.testing.assert_close(whole, model.network.unpatchify(x[:, 0]))


def test_restarts_from_the_scripts(copied):
    """They change every level, and an image is the same in whatever batch it is sampled."""
    model, captions = load(copied, device="cpu", denoise="none"), ["the digit one", "the digit two"]
    (once, x, _), (again, y, nll) = (
        model.sample_trajectories(captions, [4, 5], 1.0, seed=2, in_x_space=True, restarts=restarts) for restarts in (0, 1))
    assert (once != again).any() and not (x == y).flatten(2).all(-1).any() and nll.isfinite().all()
    alone, *_ = model.sample_trajectories(captions[1:], [5], 1.0, seed=2, restarts=1)
    torch.testing.assert_close(alone[0], again[1], atol=1e-4, rtol=1e-4)
    assert "restarts is -1, but must be at least 0" in fails("sample.py", *SAMPLE, f"--out_dir={copied}", "--restarts=-1")
    with pytest.raises(ValueError, match="best_of is 2, .*fewer than 2 steps"):
        load(copied, device="cpu", steps=1).sample(captions, best_of=2)
    with pytest.raises(ValueError, match="fewer than 3 steps"):
        load(copied, device="cpu", steps=2).sample(captions, restarts=1)
    run("evaluate.py", "--device=cpu", f"--out_dir={copied}", "--parts=samples", "--num_samples=20", "--restarts=1",
        "--denoise=learned")
    assert json.loads((copied / "evaluate.json").read_text())["config"]["restarts"] == 1


@pytest.mark.slow
def test_flow_matching_takes_steps_again_but_has_nothing_to_choose_by(tmp_path):
    run("train.py", *TRAIN, f"--out_dir={tmp_path}", "--objective=fm", "--max_iters=1")
    assert "best_of is 2" in fails("sample.py", *SAMPLE, f"--out_dir={tmp_path}", "--best_of=2", "--steps=2")
    with pytest.raises(ValueError, match="best_of is 1.5"):
        load(tmp_path, device="cpu", steps=2).sample(["the digit one"], best_of=1.5)
    model = load(tmp_path, device="cpu", steps=4)
    once, again = (model.sample_trajectories(["the digit one"] * 2, [4, 5], 1.0, restarts=n)[0] for n in (0, 1))
    assert (once != again).flatten(1).any(dim=1).all()
    torch.testing.assert_close(model.sample_trajectories(["the digit one"], [5], 1.0, restarts=1)[0][0], again[1])
    run("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", "--parts=samples", "--num_samples=20", "--restarts=1",
        "--steps=4")
    assert json.loads((tmp_path / "evaluate.json").read_text())["curves"][0]["passes"] == 5
    run("sample.py", *SAMPLE, f"--out_dir={tmp_path}", "--steps=4", "--shift=2", "--show_trajectory=True")
    assert load(tmp_path, device="cpu", steps=4, shift=2.0).ts.tolist() == pytest.approx([0, 0.4, 2 / 3, 6 / 7, 1])


def test_an_ntm_keeps_its_time_grid(copied):
    assert "shift is 2.0, but" in fails("evaluate.py", "--device=cpu", f"--out_dir={copied}", "--shift=2")


# ---------------------------------------------------------------------------------------------------------------
# A folder holds the images of one run


def names(folder):
    """The files in a folder, those in its folders too, but for the hidden one that records the settings."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {".settings.json"}


def of_sheet(count, *more):
    return {"sheet.png", *(f"{i:04d}{suffix}" for i in range(count) for suffix in (".png", *more))}


FOREIGN = ["notes.txt", "mine.png", "0001.txt", "1.png", "00001x.png", "01234.png", "12345/mine.png", "cats/0007.png",
           "0003_trajectory.mp4"]


@pytest.fixture
def beside(copied):
    """Files in the folder of images that no run of sample.py leaves."""
    for name in FOREIGN:
        (copied / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        (copied / "images" / name).write_bytes(b"mine")
    return set(FOREIGN)


def test_of_a_larger_sample_a_smaller_one_leaves_nothing(copied, beside):
    folder = copied / "images"
    noted(copied, "--denoise=none", "--show_trajectory=True")
    for name in ("0009.npy", "0010.png", "10000.png", "0004.png.part"):  # of latents, larger ones, an interruption
        (folder / name).write_bytes(b"")
    assert of_sheet(5, "_trajectory.png", "_trajectory.gif") < names(folder)
    noted(copied, "--num_samples=2")
    assert names(folder) == of_sheet(2) | beside
    noted(copied, "--num_samples=3", "--show_trajectory=True")
    assert names(folder) == of_sheet(3, "_trajectory.png", "_trajectory.gif") | beside


def test_of_another_layout_a_run_leaves_nothing(copied, beside, tmp_path):
    (tmp_path / "p.txt").write_text("the digit one\na 3\n")
    settings = [f"--prompts={tmp_path / 'p.txt'}", "--num_samples=2"]
    folder = copied / "images"
    geneval = {f"{n:05d}/{name}" for n in range(2) for name in ("grid.png", "metadata.jsonl", "samples/0000.png",
                                                                "samples/0001.png")}
    noted(copied, *settings, "--layout=geneval")
    assert names(folder) == geneval | beside
    (folder / "00001" / "mine.txt").touch()
    noted(copied, *settings)
    assert names(folder) == of_sheet(4) | {"00001/mine.txt"} | beside and not (folder / "00000").exists()
    drawn = pixels(folder / "0003.png")
    noted(copied, *settings, "--layout=flat", "--seed=7")
    assert names(folder) == of_sheet(4) - {"sheet.png"} | {"00001/mine.txt"} | beside
    assert not np.array_equal(pixels(folder / "0003.png"), drawn)  # not that of the other seed
    noted(copied, *settings, "--layout=flat", "--seed=7")
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}", *settings, "--layout=flat")
    assert "images of other settings" in line and len(names(folder)) == 4 + 1 + len(beside)


def test_a_flat_run_that_goes_on_leaves_images_and_nothing_else(copied, tmp_path):
    """Some of its images are there, one half written, and what an earlier version or a sheet has left beside them."""
    folder = tmp_path / "flat"
    settings = ["--layout=flat", f"--folder={folder}"]
    noted(copied, *settings)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    stamp = (folder / "0002.png").stat().st_mtime_ns
    (folder / "0001.png").rename(folder / "0001.png.part")
    for name in ("0000.npy", "0003_trajectory.gif", "sheet.png", "0005.png"):
        (folder / name).write_bytes(b"")
    assert "1 of 5 images" in noted(copied, *settings)[0]
    assert {name: (folder / name).read_bytes() for name in names(folder)} == before
    assert (folder / "0002.png").stat().st_mtime_ns == stamp


def test_a_flat_run_that_is_killed_as_it_goes_on_goes_on_again(copied, tmp_path, monkeypatch):
    """Whenever that is, its settings are there."""
    settings, calls = ["--layout=flat", f"--folder={tmp_path / 'flat'}"], []
    noted(copied, *settings)
    (tmp_path / "flat" / "0002.png").unlink()

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("plumbing.layouts.claim", killed)
        noted(copied, *settings)
    assert "1 of 5 images" in noted(copied, *settings)[0]


@pytest.mark.parametrize("layout", ["sheet", "flat"])
def test_images_of_somebody_else_are_not_taken_for_an_earlier_runs(copied, tmp_path, monkeypatch, layout):
    (tmp_path / "photos").mkdir()
    photo = tmp_path / "photos" / "0012.png"
    photo.write_bytes(b"a photo")
    monkeypatch.setattr("model.NTM.sample", lambda *_, **__: pytest.fail("sampled"))
    line = fails("sample.py", *SAMPLE, f"--out_dir={copied}", f"--folder={photo.parent}", f"--layout={layout}")
    assert "0012.png, which no run of sample.py has left there: choose another --folder" in line
    assert names(photo.parent) == {"0012.png"} and photo.read_bytes() == b"a photo"


def test_an_interrupted_run_in_a_folder_of_its_own_can_be_sent_again(copied, tmp_path, monkeypatch):
    def interrupted(path, *_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("plumbing.layouts.contact_sheet", interrupted)
        noted(copied, f"--folder={tmp_path / 'mine'}")
    assert names(tmp_path / "mine") == of_sheet(5) - {"sheet.png"}
    noted(copied, f"--folder={tmp_path / 'mine'}", "--num_samples=2")
    assert names(tmp_path / "mine") == of_sheet(2)
    (tmp_path / "mine" / ".settings.json").unlink()  # as earlier versions left it
    noted(copied, f"--folder={tmp_path / 'mine'}", "--num_samples=1")
    assert names(tmp_path / "mine") == of_sheet(1)
    (tmp_path / "mine" / ".settings.json").write_text("")  # a full disk
    noted(copied, f"--folder={tmp_path / 'mine'}", "--num_samples=2")
    assert names(tmp_path / "mine") == of_sheet(2)


def test_a_run_that_fails_leaves_the_images_of_the_one_before(copied):
    noted(copied)
    held = contents(copied / "ckpt.pt")
    held["ema"]["predictor.head.bias"][0] = float("inf")
    torch.save(held, copied / "ckpt.pt")
    assert "not finite" in fails("sample.py", *SAMPLE, f"--out_dir={copied}", "--num_samples=2", "--denoise=none")
    assert names(copied / "images") == of_sheet(5)


@pytest.mark.parametrize("settings", [["--denoise=none", "--show_trajectory=True"], ["--layout=flat"],
                                      ["--layout=geneval", "--scale=2"]])
def test_three_ranks_share_the_images_of_one(copied, tmp_path, settings):
    """Of five batches, so that they have two, two and one; or of two, so that one has none."""
    (tmp_path / "p.txt").write_text("the digit one\na 3\nthe digit four\n")
    for batch_size in (2, 5):
        folders = [tmp_path / f"{name}_{batch_size}" for name in ("alone", "together")]
        command = ["sample.py", *SAMPLE, f"--out_dir={copied}", f"--prompts={tmp_path / 'p.txt'}", "--num_samples=3",
                   f"--batch_size={batch_size}", *settings]
        _, alone = run(*command, f"--folder={folders[0]}")
        together = on_ranks(3, *command, f"--folder={folders[1]}")
        assert names(folders[0]) == names(folders[1]) and together.count("wrote") == 1
        for name in names(folders[0]):
            assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
        assert [line.partition(": ")[0] for line in alone.splitlines() if "images/s" in line] == [
            line.partition(": ")[0] for line in together.splitlines() if "images/s" in line]
        assert [line for line in alone.splitlines() if "NLL" in line] == [
            line for line in together.splitlines() if "NLL" in line]


def test_the_speed_of_several_ranks_is_the_slowest_ones(capsys):
    """Twelve images: each stage by the rank that it took longest, all together by the rank that took longest in all."""
    config = SimpleNamespace(num_tokens=16, token_dim=4)
    model = SimpleNamespace(device=torch.device("cpu"), network=SimpleNamespace(config=config), ts=torch.zeros(5),
                            held_out_nll=lambda: 1.25)
    sample.report(model, 12, [{"sampling": 4.0, "inversion": 2.0}, {"sampling": 3.0, "inversion": 6.0}, {}], [320.0, 640.0])
    assert capsys.readouterr().out.splitlines() == [
        "sampling: 3.0 images/s", "inversion: 2.0 images/s", "all together: 1.3 images/s on 3 x cpu",
        "trajectory NLL: 480.00 nats, 1.5000 for each of its 320 numbers, under the model without guidance; "
        "trajectories of held-out images have 1.2500 (lower is likelier)"]


def test_a_likelihood_that_means_nothing_is_short(capsys):
    config = SimpleNamespace(num_tokens=16, token_dim=4)
    model = SimpleNamespace(ts=torch.zeros(5), network=SimpleNamespace(config=config), held_out_nll=lambda: None)
    sample.report(model, 0, [{}], [6e18])
    assert capsys.readouterr().out.startswith("trajectory NLL: 6.0e+18 nats, 1.9e+16 for each of its 320 numbers")


def test_held_out_images_are_as_likely_as_the_model_itself_finds_them(copied, tmp_path):
    """By the log beside a checkpoint, or by the copy that is passed on; against the trajectories of the images."""
    model = load(copied, device="cpu", denoise="score")
    told = model.held_out_nll()
    dataset = open_dataset(model.settings, "val")
    images, captions = zip(*(dataset[i] for i in range(16)))
    ts = model.ts.expand(16, -1)
    x0 = model.network.patchify(torch.stack(images))
    nlls = [model.network.trajectory_nll(model.network.noised(x0, None, ts), ts, model.encode(list(captions))).sum(dim=1)
            for _ in range(8)]
    assert told == pytest.approx(torch.stack(nlls).mean().item() / x0[0].numel() / len(model.ts), abs=0.05)
    checkpoint.slim(copied / "ckpt.pt", tmp_path / "ckpt.pt")
    assert load(tmp_path, device="cpu", denoise="score").held_out_nll() == told
    assert load(copied, device="cpu", denoise="score", t_min=0.1).held_out_nll() is None
    (copied / "log.jsonl").unlink()
    assert load(copied, device="cpu", denoise="score").held_out_nll() is None


def test_what_is_wrong_with_a_folder_is_told_by_all_ranks_in_one_line(copied, tmp_path):
    (tmp_path / "0000.png").write_bytes(b"a photo")
    status, _, errors = ranks_of(2, "sample.py", *SAMPLE, f"--out_dir={copied}", f"--folder={tmp_path}")
    assert status != 0 and "which no run of sample.py has left there" in errors
    assert "sample.py\", line" not in errors  # no traceback of ours


# ---------------------------------------------------------------------------------------------------------------
# From Python: as many captions as one likes


@pytest.mark.parametrize("denoise, best_of", [("learned", 1), ("score", 1), ("none", 2)])
def test_any_number_of_captions_is_sampled_in_batches_that_fit(trained, monkeypatch, denoise, best_of):
    """The images are those of one batch, in the same order; no step of them sees more at once than fit into memory."""
    model, captions = load(trained, device="cpu", denoise=denoise), ["the digit one", "the digit two"] * 6
    whole, sizes, network = model.sample(captions, seed=3, best_of=best_of), [], model.network
    assert len({tuple(image.flatten().tolist()) for image in whole}) == 12
    for name in ("sample", "invert", "score_denoise", "trajectory_nll"):
        monkeypatch.setattr(network, name, lambda batch, *args, function=getattr(network, name), **kwargs:
                            sizes.append(len(batch)) or function(batch, *args, **kwargs))
    density = pipeline.guided_log_density
    monkeypatch.setattr(pipeline, "guided_log_density",
                        lambda network, batch, *args: sizes.append(len(batch)) or density(network, batch, *args))
    for module in (pipeline, memory):
        monkeypatch.setattr(module, "examples_at_once", lambda config, steps, gradients=True: 5)
    torch.testing.assert_close(model.sample(captions, seed=3, best_of=best_of), whole, atol=1e-4, rtol=1e-4)
    assert set(sizes) == {5, 2}


def test_any_number_of_images_has_its_likelihood_in_batches_that_fit(trained, monkeypatch):
    model, captions = load(trained, device="cpu"), ["the digit one", "the digit two", "a 3"] * 4
    images, sizes = torch.rand(12, 1, 8, 8) * 2 - 1, []
    whole, bound = model.log_likelihood(images, captions, seed=4), model.network.trajectory_bound
    monkeypatch.setattr(model.network, "trajectory_bound", lambda x, *args: sizes.append(len(x)) or bound(x, *args))
    monkeypatch.setattr(pipeline, "examples_at_once", lambda config, steps, gradients=True: 5)
    for found, expected in zip(model.log_likelihood(images, captions, seed=4), whole, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)
    assert set(sizes) == {5, 2} and len(sizes) == 3 * 8  # eight trajectories


def test_the_size_of_a_batch_is_what_4_gb_hold(trained, monkeypatch):
    """Whatever captions there are: no more than the estimate that validation goes by, and never none."""
    model, asked = load(trained, device="cpu"), []
    monkeypatch.setattr(pipeline, "examples_at_once",
                        lambda config, steps, gradients=True: asked.append((config, steps, gradients)) or 3)
    assert [len(numbers) for numbers in model.batches(8)] == [3, 3, 2] and asked == [(model.network.config, 4, False)]
    monkeypatch.undo()
    assert max(len(numbers) for numbers in model.batches(10**6)) == pipeline.MOST_AT_ONCE  # digits are small
