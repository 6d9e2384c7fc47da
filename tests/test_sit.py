"""Published SiT weights: the reference network's own answers, and training that starts from them, on latents."""
import argparse
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomize
from helpers import DISTILL, SAMPLE, contents, fails, latent_shard, pixels, run, training_lines
from tiny import noise_of

import data
from beyond import CoupledConfig
from flow import time_grid
from pixels import PixelConfig
from plumbing import checkpoint
from plumbing.optim import make_optimizers
from plumbing.runtime import compile_layers

from sit import CoupledSiTNTM, SiT, SiTNTM, load_sit

# SHORT of test_scripts, for latents of 4x8x8 and the transporter alone: the rest is the published network's
TRAIN = ["--device=cpu", "--dataset=shards", "--latent_scale=0.5", "--batch_size=4", "--max_iters=4",
         "--val_interval=2", "--val_examples=4", "--num_samples=4", "--log_interval=1", "--warmup_iters=2",
         "--optimizer=adamw", "--lr=2e-3", "--heads=4",
         "--transporter_width=16", "--transporter_blocks=2", "--transporter_layers=1", "--shift=None"]


@pytest.fixture(scope="module")
def reference():
    """A tiny SiT at random weights, and what the reference implementation answers to some inputs."""
    path = Path(__file__).parent / "sit_tiny.pt"
    return torch.load(path, weights_only=True)


@pytest.fixture
def published(reference, tmp_path):
    """The path of its checkpoint."""
    torch.save({"ema": reference["state_dict"], "opt": {}}, tmp_path / "sit.pt")
    return tmp_path / "sit.pt"


@pytest.fixture(scope="module")
def latents(tmp_path_factory):
    """Shards of latents: 12 to train on, 6 to validate."""
    folder, generator = tmp_path_factory.mktemp("latents"), np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 6)):
        latent_shard(folder / split / "0.tar", 2 * generator.normal(size=(count, 4, 8, 8)),
                     [f"class {i % 10}" for i in range(count)])
    return folder


# ---------------------------------------------------------------------------------------------------------------
# The network


@pytest.mark.parametrize("wrapped", [True, False])
def test_velocity_is_the_reference_with_time_and_sign_reversed(reference, tmp_path, wrapped):
    state = reference["state_dict"]
    torch.save({"ema": state} if wrapped else state, tmp_path / "sit.pt")
    sit = load_sit(tmp_path / "sit.pt", heads=4)
    with torch.no_grad():
        velocity = sit(reference["x"], 1 - reference["t"], reference["y"])
    assert velocity.shape == (3, 4, 8, 8)
    torch.testing.assert_close(velocity, -reference["velocity"], atol=1e-5, rtol=0)
    size = reference["config"]
    assert (sit.image_size, sit.patch_size, sit.channels, sit.classes) == (8, 2, 4, 10)
    assert (sit.width, sit.depth, sit.heads) == (size["hidden_size"], size["depth"], size["num_heads"])


@pytest.mark.parametrize("width, heads", [(384, 6), (768, 12), (1024, 16), (1152, 16)])
def test_heads_of_the_published_sizes(width, heads, tmp_path):
    torch.save(SiT(4, 1, 2, width, 1, heads, 3).state_dict(), tmp_path / "sit.pt")
    assert load_sit(tmp_path / "sit.pt").heads == heads
    assert load_sit(tmp_path / "sit.pt", heads=2).blocks[0].heads == 2


@pytest.mark.parametrize("heads, fault", [(None, "no published SiT has"), (5, "5 heads do not divide")])
def test_heads_are_not_guessed(published, heads, fault):
    """The tensors are the same for any number of heads, the velocities are not."""
    with pytest.raises(ValueError, match=rf"sit.pt has width 48, which {fault}: set --heads, such as --heads="):
        load_sit(published, heads=heads)


def test_every_unknown_or_missing_tensor_is_named(reference, tmp_path):
    state = dict(reference["state_dict"])
    for name in ("pos_embed", "blocks.0.attn.qkv.weight"):
        del state[name]
    state |= {"blocks.1.attn.q_norm.weight": torch.zeros(12), "extra": torch.zeros(1)}
    torch.save(state, tmp_path / "x.pt")
    with pytest.raises(ValueError) as error:
        load_sit(tmp_path / "x.pt")
    for part in ("x.pt", "pos_embed is missing", "blocks.0.attn.qkv.weight is missing",
                 "blocks.1.attn.q_norm.weight is unknown", "extra is unknown"):
        assert part in str(error.value)
    assert "\n" not in str(error.value) and str(error.value).count(" is ") == 5  # and no other tensor


def test_every_tensor_of_another_shape_is_named(reference, tmp_path):
    wrong = {"blocks.0.attn.proj.bias": torch.zeros(3), "final_layer.linear.bias": torch.zeros(5)}
    torch.save(reference["state_dict"] | wrong, tmp_path / "x.pt")
    with pytest.raises(ValueError) as error:
        load_sit(tmp_path / "x.pt")
    assert all(name in str(error.value) for name in wrong) and "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", None])
def test_damaged_file_is_named(reference, tmp_path, content):
    path = tmp_path / "x.pt"
    torch.save(reference["state_dict"], path)
    path.write_bytes(path.read_bytes()[:1000] if content is None else content)
    with pytest.raises(ValueError, match="x.pt: it is truncated or not a checkpoint"):
        load_sit(path)
    for no_sit in [1, 2], {0: torch.zeros(1)}:
        torch.save(no_sit, path)
        with pytest.raises(ValueError, match="x.pt is not a SiT checkpoint"):
            load_sit(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("key", ["ema", "model", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_checkpoints_of_sits_own_trainer_are_read(reference, tmp_path, prefix, key, zipped):
    """Of several processes, compiled, or both; "args" is an argparse.Namespace, and the weights of "ema" are taken."""
    args = argparse.Namespace(model="SiT-XL/2", image_size=256, ckpt=None, sizes=[1, 2], lr=1e-4)
    state = {prefix + name: value for name, value in reference["state_dict"].items()}
    others = {name: {prefix + "x": torch.zeros(2)} for name in ("model", "state_dict")} if key == "ema" else {}
    torch.save({**others, key: state, "opt": {"state": {}, "param_groups": []}, "args": args}, tmp_path / "sit.pt",
               _use_new_zipfile_serialization=zipped)
    sit = load_sit(tmp_path / "sit.pt", heads=4)
    with torch.no_grad():
        velocity = sit(reference["x"], 1 - reference["t"], reference["y"])
    torch.testing.assert_close(velocity, -reference["velocity"], atol=1e-5, rtol=0)
    with pytest.raises(pickle.UnpicklingError):  # it is allowed for that load alone
        torch.load(tmp_path / "sit.pt", weights_only=True)


def test_layers_that_were_compiled_one_by_one(reference, tmp_path):
    state = {name.replace("blocks.1.", "blocks.1._orig_mod."): value for name, value in reference["state_dict"].items()}
    torch.save(state, tmp_path / "sit.pt")
    assert load_sit(tmp_path / "sit.pt", heads=4).depth == 2


def test_what_could_run_code_is_named_and_does_not_run(reference, tmp_path):
    class Malice:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for args, name in ((argparse.Namespace(folder=Malice()), "posix.mkdir"), (Path("x"), "PosixPath")):
        torch.save({"ema": reference["state_dict"], "args": args}, tmp_path / "sit.pt")
        with pytest.raises(ValueError) as error:
            load_sit(tmp_path / "sit.pt", heads=4)
        assert f"{name} beside its weights" in str(error.value) and "torch.save(" in str(error.value)
        assert "\n" not in str(error.value) and not (tmp_path / "owned").exists()


# ---------------------------------------------------------------------------------------------------------------
# As a predictor


@pytest.fixture
def model(published):
    sit = load_sit(published, heads=4)
    model = SiTNTM(PixelConfig(image_size=8, channels=4, width=48, depth=2, heads=4, vocab_size=12, text_len=1,
                             parametrization="posterior"))
    sit.hand_over(model.predictor)
    return sit, model


def test_captions_select_label_embeddings(model):
    sit, model = model
    u, t, s, steps = torch.randn(3, 16, 16), torch.rand(3), torch.zeros(3), torch.full((3,), 4)
    text = data.get_tokenizer("classes:10").encode(["class 7", "class 0", ""], 1)
    with torch.no_grad():
        v, delta = model.predictor(u, t, s, steps, text)
        expected = sit(model.unpatchify(u), t, torch.tensor([7, 0, 10]))  # 10: the null class
    torch.testing.assert_close(v, model.patchify(expected), atol=1e-5, rtol=1e-5)
    assert (delta == 0).all()


def test_at_first_it_is_the_gaussian_reverse_step(model):
    sit, model = (part.double() for part in model)
    ts, text, y = time_grid(4, 0.02, 16).double(), torch.tensor([[2], [9], [1]]), torch.tensor([0, 7, 10])
    noise = torch.randn(3, 5, 16, 16).double()
    u, x = model.sample(text, ts, randn=noise_of(noise)), noise[:, 4]
    for k in reversed(range(4)):
        t, s = ts[k + 1].item(), ts[k].item()
        v = model.patchify(sit(model.unpatchify(x), torch.full((3,), t).double(), y))
        mean = s**2 * (1 - t) / (t**2 * (1 - s)) * x + (t - s) * (t + s - 2 * t * s) / (t**2 * (1 - s)) * (x - t * v)
        x = mean + (s**2 * (t - s) * (t + s - 2 * t * s) / (t**2 * (1 - s)**2))**0.5 * noise[:, k]
        torch.testing.assert_close(u[:, k], x, rtol=1e-10, atol=1e-10)


def test_likelihood_is_a_density_whatever_it_learned(model):
    """The scale depends on the last hidden states, on s and on T, and every parameter takes part."""
    _, model = model
    randomize(model, 0.3)
    model(torch.randn(4, 4, 8, 8), torch.tensor([[2], [9], [1], [5]])).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    u, text, t = torch.randn(2, 16, 16), torch.tensor([[2], [2]]), torch.full((2,), 0.5)
    predictions = model.predictor(u[:1].expand(2, -1, -1), t, torch.tensor([0.1, 0.3]), torch.full((2,), 4), text)
    assert all((a[0] - a[1]).abs().max() > 1e-4 for a in predictions)


def test_its_first_step_may_be_coupled(published):
    sit = load_sit(published, heads=4)
    sizes = dict(image_size=8, channels=4, width=48, depth=2, heads=4, vocab_size=12, text_len=1, transporter_blocks=0)
    model = CoupledSiTNTM(CoupledConfig(**sizes, parametrization="posterior", first_noise=0.2))
    sit.hand_over(model.predictor)
    x, text = torch.randn(2, 16, 16), torch.tensor([[3], [1]])
    s = torch.tensor([0.5, 0.75])
    flowed, half = x, (1 - s) / 2
    for t in (s, s + half):  # the midpoint method with the published velocity itself
        v = velocity_of(sit, flowed, t, text)
        v = velocity_of(sit, flowed + half[:, None, None] / 2 * v, t + half / 2, text)
        flowed = flowed + half[:, None, None] * v
    torch.testing.assert_close(model.flowed_to_noise(x, s, text), flowed, rtol=1e-4, atol=1e-4)


def velocity_of(sit, tokens, t, text):
    y = torch.where(text[:, 0] < 2, sit.classes, text[:, 0] - 2)
    condition = sit.condition(t, y)
    return sit.velocity(sit.hidden(tokens, condition), condition)


def test_each_direction_of_its_gaussian_is_like_the_image():
    config = PixelConfig(image_size=8, channels=4, patch_size=2, width=48, depth=1, heads=4, vocab_size=12, text_len=1,
                         transporter_blocks=0, parametrization="posterior", rank=3)
    model = randomize(SiTNTM(config), 0.3)
    u, text, t = torch.randn(2, 16, 16), torch.tensor([[2], [3]]), torch.full((2,), 0.5)
    parts = model.predictor(u, t, t / 2, torch.full((2,), 4), text)
    assert [part.shape for part in parts] == [u.shape] * 5  # velocity, rho, and three


def test_it_takes_square_images_in_the_posterior_parametrization():
    with pytest.raises(ValueError, match="a SiT needs parametrization 'posterior' and square images"):
        SiTNTM(PixelConfig())


# ---------------------------------------------------------------------------------------------------------------
# From weights and latents to images


@pytest.mark.slow
def test_training_starts_from_published_weights(published, latents, tmp_path):
    settings = [*TRAIN, f"--data_dir={latents}", f"--out_dir={tmp_path}"]
    _, printed = run("train.py", *settings, f"--init_from=sit:{published}", "--steps=4,8")
    assert "width 48" in printed and "classes:10" in printed
    lines = training_lines(tmp_path / "log.jsonl")
    assert lines[0]["aux"] < 1e-10 < lines[-1]["aux"] and lines[-1]["skipped"] == 0
    assert pixels(tmp_path / "samples" / "000004.png").shape[2] == 3
    run("train.py", *settings, "--resume=yes", "--max_iters=5", "--steps=4,8")
    held = contents(tmp_path / "ckpt.pt")
    assert held["iter"] == 5 and held["kind"] == "sit"
    trained, _ = checkpoint.load_network(tmp_path / "ckpt.pt", {"sit": SiTNTM})
    before = load_sit(published, heads=4)
    assert not torch.equal(trained.predictor.sit.blocks[0].attn.qkv.weight, before.blocks[0].attn.qkv.weight)

    run("distill.py", *DISTILL, f"--out_dir={tmp_path}")
    (tmp_path / "prompts.txt").write_text("class 7\n\n")  # the empty line: any class
    _, printed = run("sample.py", *SAMPLE, f"--out_dir={tmp_path}", f"--prompts={tmp_path / 'prompts.txt'}",
                     "--steps=8", "--guidance=1.5", "--show_trajectory=True")
    assert "trajectory NLL" in printed
    latent = np.load(tmp_path / "images" / "0009.npy")
    assert latent.shape == (4, 8, 8) and latent.dtype == np.float16
    preview = (0.5 * latent[:3].astype(float) / 3 + 1) * 128  # three of the channels, once more times latent_scale
    assert np.abs(pixels(tmp_path / "images" / "0009.png") - preview.transpose(1, 2, 0).clip(0, 255)).max() <= 1.1


def test_muon_and_words_lr_know_its_weights(model):
    _, model = model
    muon, adamw = make_optimizers(model, "muon", 0.0, torch.device("cpu"), words_lr=7.0)
    names = {id(weight): name for name, weight in model.named_parameters()}
    matrices = {names[id(weight)] for group in muon.param_groups for weight in group["params"]}
    ends = "attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"
    depth = len(model.predictor.sit.blocks)
    of_sit = {f"predictor.sit.blocks.{i}.{end}" for i in range(depth) for end in ends}
    assert {name for name in matrices if name.startswith("predictor.")} == of_sit
    words = [names[id(weight)] for group in adamw.param_groups if group.get("factor") for weight in group["params"]]
    assert words == ["predictor.sit.y_embedder.embedding_table.weight"]


def test_its_layers_are_compiled_one_by_one(model, monkeypatch):
    model, compiled = model[1], []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(module))
    compile_layers(model)
    assert set(model.predictor.sit.blocks) <= set(compiled)
    assert len(compiled) == len({*compiled}) == sum(
        1 for name, _ in model.named_modules() if name.split(".")[-2:-1] == ["layers"]) + len(model.predictor.sit.blocks)


@pytest.mark.slow
def test_it_trains_by_muon_without_a_transporter(published, latents, tmp_path):
    run("train.py", *TRAIN, f"--data_dir={latents}", f"--out_dir={tmp_path}", f"--init_from=sit:{published}",
        "--transporter_blocks=0", "--optimizer=muon", "--flip=True", "--max_iters=2")
    assert len(training_lines(tmp_path / "log.jsonl")) == 2


def test_latents_are_not_flipped_and_training_says_so(latents, capsys):
    data.get_dataset("shards", "train", 8, 4, data_dir=str(latents), flip=True)
    assert "note: latents are neither flipped nor cropped" in capsys.readouterr().err


def test_the_heads_of_a_width_of_its_own_are_a_setting(published, latents, tmp_path):
    settings = [name for name in TRAIN if not name.startswith("--heads")]
    line = fails("train.py", *settings, f"--data_dir={latents}", f"--out_dir={tmp_path}", f"--init_from=sit:{published}")
    assert "width 48" in line and "--heads" in line


@pytest.mark.slow
def test_captions_that_are_no_classes_are_named(published, latents, tmp_path):
    settings = [*TRAIN, f"--init_from=sit:{published}"]
    run("train.py", *settings, f"--data_dir={latents}", f"--out_dir={tmp_path / 'run'}", "--max_iters=1")
    line = fails("sample.py", *SAMPLE, f"--out_dir={tmp_path / 'run'}", "--prompt=class 10", "--denoise=none")
    assert "'class 10' is not a class" in line and "'class 9'" in line
    for split in ("train", "val"):
        latent_shard(tmp_path / split / "0.tar", np.zeros((1, 4, 8, 8)), ["a cat"])
    line = fails("train.py", *settings, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'cats'}", "--batch_size=1")
    assert "caption 'a cat' is not a class" in line
