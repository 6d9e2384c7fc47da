"""What must fit does: validation and score denoising at the size of real models, and no copy of the weights too many."""
import gc
import re
import runpy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from helpers import DISTILL, ROOT, TRAIN, load, run
from tiny import make_model, make_trajectory, of_config
from torch._subclasses.fake_tensor import FakeTensorMode

import distill
import flow
import train
from model import NTM, Denoiser, NTMConfig
from plumbing.memory import examples_at_once, in_chunks

LIMIT = 4e9  # bytes, beside the weights


class Kept:
    """Counts the bytes that back-propagation keeps, weights aside: `peak`, the most at a time. A context."""

    def __init__(self, model):
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.users, self.now, self.peak = {}, 0, 0

    def __enter__(self):
        counter = self

        class Saved:
            def __init__(self, tensor):
                self.tensor, self.storage = tensor, tensor.untyped_storage()
                self.key = self.storage._cdata
                counter.users[self.key] = counter.users.get(self.key, 0) + 1
                if counter.users[self.key] == 1 and self.key not in counter.weights:
                    counter.now += self.storage.nbytes()
                    counter.peak = max(counter.peak, counter.now)

            def __del__(self):
                counter.users[self.key] -= 1
                if counter.users[self.key] == 0 and self.key not in counter.weights:
                    counter.now -= self.storage.nbytes()

        self.hooks = torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor)
        return self.hooks.__enter__() or self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)


@pytest.mark.slow
def test_score_denoising_fits_beside_the_weights():
    """Tensors of the real size, without their numbers: samples of a sheet, and as many of the denoiser's targets. All
    of them at once would take more than the limit."""
    with FakeTensorMode():
        model = NTM(of_config("t2i")).requires_grad_(False)
        ts = model.config.time_grid(0.02)
        count = examples_at_once(model.config, 4) + 1
        images, text = torch.zeros(count, 4, 32, 32), torch.ones(count, 77, dtype=torch.long)
        model.invert = lambda u, ts: u  # token by token, without a gradient: it would take minutes here
        with Kept(model) as sheet:
            assert train.sample_images(model, text, ts, None).shape == (count, 4, 32, 32)
        with Kept(model) as lesson:
            distill.input_and_target(model, images, text, ts, torch.zeros(count, 5, 256, 16))
        assert 0.5 * LIMIT < sheet.peak == lesson.peak < LIMIT


@pytest.mark.slow
@pytest.mark.parametrize("name, of_weights, of_an_image", [("t2i", 2.35, 0.906), ("t2i_small", 0.33, 0.287)])
def test_what_training_keeps_is_what_its_config_says(monkeypatch, name, of_weights, of_an_image):
    """In bfloat16, GB: copies of the weights, and what each image adds; with attention as on CUDA, which keeps no
    logits."""
    monkeypatch.setattr(flow, "attend", lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    with FakeTensorMode():
        model, peaks = NTM(of_config(name)), []
        for batch in 1, 2:
            levels = torch.full((batch,), 4), torch.full((batch, 2), 0.3), torch.zeros(batch, 2, 256, 16)
            with Kept(model) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
                model(torch.zeros(batch, 4, 32, 32), torch.ones(batch, 77, dtype=torch.long), levels)
            peaks.append(kept.peak / 1e9)
    assert peaks[1] - peaks[0] == pytest.approx(of_an_image, rel=0.01)
    assert 2 * peaks[0] - peaks[1] == pytest.approx(of_weights, rel=0.02)


def commands_for(gigabytes, page, name):
    """(command, GB a GPU) of each command in a page that trains config/NAME.py: `gigabytes` of a pass of so many images,
    the batch divided among ranks and accumulation passes."""
    config = runpy.run_path(str(ROOT / "config" / f"{name}.py"))
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for command in re.findall(rf"^torchrun .*train\.py config/{name}\.py.*", text, re.MULTILINE):
        def given(key, default):
            return int((re.search(rf"--{key}=(\d+)", command) or [0, default])[1])
        ranks = given("nproc_per_node", 1) * given("nnodes", 1)
        passes = ranks * given("grad_accum", config["grad_accum"])
        yield command, gigabytes(given("batch_size", config["batch_size"]) / passes)


def test_commands_of_the_docs_fit_into_a_gpu_of_80_gb():
    with FakeTensorMode():
        weights = sum(parameter.numel() for parameter in NTM(of_config("t2i")).parameters()) * 4 / 1e9

    def gigabytes(images):  # weights, gradients, AdamW's two and the average; then what is counted above
        return 5 * weights + 2.35 + 0.906 * images

    assert gigabytes(2048 / 8 / 4) == pytest.approx(85, abs=1)
    found = [*commands_for(gigabytes, "docs/scaling.md", "t2i")]
    assert len(found) >= 3 and all(size < 75 for _, size in found), found


@pytest.mark.slow
def test_what_an_example_takes_is_estimated_well():
    with FakeTensorMode():
        for config, T in ((of_config("t2i_small"), 8), (NTMConfig(transporter_blocks=0, width=256), 4),
                          (NTMConfig(image_size=16, depth=1), 16)):
            count, model = examples_at_once(config, T), NTM(config).requires_grad_(False)
            x, text = torch.zeros(1, T + 1, config.num_tokens, config.token_dim), torch.ones(1, config.text_len).long()
            with Kept(model) as kept:
                model.score_denoise(x, config.time_grid(0.02, T), text)
            assert 0.7 * LIMIT < count * kept.peak < 1.1 * LIMIT


def test_validation_passes_as_many_examples_at_once_as_fit(monkeypatch):
    """At the size of t2i a layer of 100 trajectories would take 17 GB."""
    config, seen = of_config("t2i"), []
    assert 10 < examples_at_once(config, 4, gradients=False) < 30
    model = randomize(NTM(NTMConfig()))
    bound = model.trajectory_bound
    monkeypatch.setattr(model, "trajectory_bound", lambda x, *args: seen.append(len(x)) or bound(x, *args))
    batch = torch.rand(7, 1, 8, 8), torch.ones(7, 8).long(), ["a"] * 7
    settings, ts = {"bfloat16": False, "chunk": 3}, model.config.time_grid(0.02)
    batches = [(*batch, torch.Generator().manual_seed(0))]
    parts = train.validate(model, batches, ts, settings)
    assert seen == [3, 3, 1]
    monkeypatch.setattr(train, "examples_at_once", lambda config, steps, gradients=True: 5)
    whole = train.validate(model, [(*batch, torch.Generator().manual_seed(0))], ts, settings | {"chunk": 0})
    assert seen[3:] == [5, 2] and parts == pytest.approx(whole, rel=1e-5)


def test_trajectories_that_fit():
    """4 GB / (13 x 4 bytes x units); of one layer at a time without gradients."""
    config = NTMConfig(image_size=32, patch_size=2, text_len=77, width=1024, depth=24, transporter_width=512,
                       transporter_blocks=4, transporter_layers=2, shift=1.0)
    units = 4 * 24 * (77 + 256) * 1024 + 5 * 8 * 256 * 512
    assert examples_at_once(config, 4) == int(4e9 / 52 / units) == 2
    of_one_layer = 4 * (77 + 256) * 1024 + 5 * 256 * 512
    assert examples_at_once(config, 4, gradients=False) == int(4e9 / 52 / of_one_layer) == 38
    assert examples_at_once(config, 1000) == 1  # never none


@pytest.mark.parametrize("chunk, sizes", [(1, [1] * 5), (2, [2, 2, 1]), (5, [5]), (9, [5])])
def test_a_function_gets_its_batch_in_parts(chunk, sizes):
    a, b, seen = torch.randn(5, 3), torch.arange(5), []

    def both(a, b):
        seen.append(len(a))
        return a * b[:, None], -b

    product, negative = in_chunks(both, chunk, a, b)
    assert seen == sizes
    assert torch.equal(product, a * b[:, None]) and torch.equal(negative, -b)
    assert torch.equal(in_chunks(lambda a: 2 * a, chunk, a), 2 * a)


def test_tensors_of_different_lengths_are_no_batch():
    with pytest.raises(ValueError):
        in_chunks(lambda a, b: a, 2, torch.zeros(5), torch.zeros(2))


def test_parts_make_the_same_scores():
    model = make_model(scale=0.5)
    x, ts, text = make_trajectory(model, batch=5)
    steps = torch.full((5,), 3)

    def pair(x, ts, text, steps):
        return model.transport(x[:, :1], ts[:, :1], steps)[0][:, 0], model.score_denoise(x, ts, text)

    u0, denoised = in_chunks(pair, 2, x, ts, text, steps)
    torch.testing.assert_close(denoised, model.score_denoise(x, ts, text))
    torch.testing.assert_close(u0, model.transporter(x[:, 0], ts[:, 0], steps)[0])


def test_a_lesson_transports_every_level_but_noise_and_the_cleanest_once_more(monkeypatch):
    """Once for the denoiser's input, and for the target those that have a gradient."""
    model, levels = randomize(NTM(NTMConfig())), []
    forward = model.transporter.forward
    monkeypatch.setattr(model.transporter, "forward", lambda x, *args: levels.append(len(x)) or forward(x, *args))
    distill.input_and_target(model, torch.rand(3, 1, 8, 8), torch.ones(3, 8).long(), model.config.time_grid(0.02),
                   torch.randn(3, 5, 16, 4))
    assert levels == [3, 3 * 4]


class Stop(Exception):
    pass


def tensors():
    """Bytes of every tensor in memory, by its address."""
    gc.collect()
    found = [item for item in gc.get_objects() if type(item) in (torch.Tensor, torch.nn.Parameter) and item.numel()]
    return {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in found}


def copies_at_first_pass(monkeypatch, network, script, *settings):
    """How many times the weights of the network are in memory when training is about to begin."""
    before = tensors()

    def count(self, *args):
        held = sum(size for address, size in tensors().items() if address not in before)
        raise Stop(held / sum(4 * parameter.numel() for parameter in self.parameters()))

    with monkeypatch.context() as patch:
        patch.setattr(network, "forward", count)
        with pytest.raises(Stop) as stop:
            run(script, *settings)
    return stop.value.args[0]


def test_no_copy_of_the_weights_too_many(trained, tmp_path, monkeypatch):
    """At the first pass there are model and average, and of a resumed run AdamW's two; gradients are the fifth. Of what
    a run starts from, or the denoiser learns from, there is no more than it computes with."""
    big = ["--width=64", "--depth=4", "--heads=4"]  # beside which data and activations are small
    settings = [*TRAIN, *big, f"--out_dir={tmp_path / 'run'}", "--batch_size=1", "--grad_accum=1"]
    before = copies_at_first_pass(monkeypatch, NTM, "train.py", *settings)
    assert before < 2.6
    run("train.py", *settings, "--max_iters=1", "--val_examples=1", "--num_samples=1")
    resumed = copies_at_first_pass(monkeypatch, NTM, "train.py", *settings, "--resume=yes")
    assert resumed - before == pytest.approx(2, abs=0.3)
    settings = [argument for argument in TRAIN if "width" not in argument and "depth" not in argument
                and "heads" not in argument and "transporter" not in argument]
    other = [*settings, f"--out_dir={tmp_path / 'other'}", "--batch_size=1", f"--init_from={tmp_path / 'run' / 'ckpt.pt'}"]
    assert copies_at_first_pass(monkeypatch, NTM, "train.py", *other) - before == pytest.approx(0, abs=0.3)
    teacher, weights = load(tmp_path / "run", "ntm"), {}
    for network in teacher, Denoiser(replace(teacher.config, width=64, depth=2, heads=4)):
        weights[type(network)] = sum(parameter.numel() for parameter in network.parameters())
    del teacher, network
    copies = copies_at_first_pass(monkeypatch, Denoiser, "distill.py", *DISTILL, f"--out_dir={tmp_path / 'run'}",
                                  "--width=64", "--depth=2", "--heads=4", "--batch_size=1")
    assert copies == pytest.approx(2 + weights[NTM] / weights[Denoiser], abs=0.3)
