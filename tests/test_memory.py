"""What must fit does: validation and score denoising at the size of real models, and no copy of the weights too many."""
import gc
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import randomize
from helpers import DISTILL, ROOT, TRAIN, load, run
from tiny import make_model, make_trajectory, network_of
from torch._subclasses.fake_tensor import FakeTensorMode

import distill
import flow
import train
from configurator import run_config
from evidence import update
from losses import TrainingLoss
from model import NTM, Denoiser, NTMConfig
from plumbing.memory import examples_at_once, in_chunks
from plumbing.optim import make_optimizers

LIMIT = 4e9  # bytes, beside the weights
# of 1.25 billion parameters, with a transporter; width 768, depth 12 and a transporter half as wide: 205 million
TRANSPORTED = NTMConfig(image_size=32, channels=4, patch_size=2, vocab_size=50259, text_len=77, width=1536, depth=24,
                        heads=24, transporter_width=1024, transporter_blocks=2, transporter_layers=4, transporter_heads=16)
SMALLER = replace(TRANSPORTED, width=768, depth=12, heads=12, transporter_width=512, transporter_heads=8)


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
@pytest.mark.parametrize("network, least", [(lambda: NTM(TRANSPORTED), 0.5), (lambda: network_of("t2i"), 0.4)],
                         ids=["transported", "t2i"])
def test_score_denoising_fits_beside_the_weights(network, least):
    """Tensors of the real size, without their numbers: samples of a sheet, and as many of the denoiser's targets. All
    of them at once would take more than the limit. A coupled model has no score of its first step, so it takes less."""
    with FakeTensorMode():
        model = network().requires_grad_(False)
        ts = model.config.time_grid(0.02)
        count = examples_at_once(model.config, 4) + 1
        images, text = torch.zeros(count, 4, 32, 32), torch.ones(count, 77, dtype=torch.long)
        model.invert = lambda u, ts: u  # token by token, without a gradient: it would take minutes here
        with Kept(model) as sheet:
            assert train.sample_images(model, text, ts, None).shape == (count, 4, 32, 32)
        with Kept(model) as lesson:
            distill.input_and_target(model, images, text, ts, torch.zeros(count, 5, 256, 16))
        assert least * LIMIT < sheet.peak == lesson.peak < LIMIT


def kept_in_training(monkeypatch, kind, settings):
    """GB that an update in bfloat16 keeps for back-propagation: copies of the weights, and what each image adds; with
    attention as on CUDA, which keeps no logits."""
    monkeypatch.setattr(flow, "attend", lambda q, k, v, causal: F.scaled_dot_product_attention(q, k, v, is_causal=causal))
    with FakeTensorMode():
        model, peaks = update.build(kind, settings), []
        loss = TrainingLoss(model, settings)
        for batch in 1, 2:
            images, text = update.inputs(model.config, batch, "cpu")
            if kind == "fm":
                drawn = torch.full((batch,), 0.3), torch.zeros(batch, 256, 16)
            else:
                drawn = torch.full((batch,), 4), torch.full((batch, 2), 0.3), torch.zeros(batch, 2, 256, 16)
            with Kept(model) as kept, torch.autocast("cpu", dtype=torch.bfloat16):
                loss(images, text, drawn)
            peaks.append(kept.peak / 1e9)
    return 2 * peaks[0] - peaks[1], peaks[1] - peaks[0]


@pytest.mark.slow
@pytest.mark.parametrize("network, of_weights, of_an_image", [(TRANSPORTED, 2.35, 0.906), (SMALLER, 0.33, 0.287)])
def test_what_training_keeps_with_a_transporter(monkeypatch, network, of_weights, of_an_image):
    kept = kept_in_training(monkeypatch, "ntm", vars(train) | vars(network))
    assert kept == (pytest.approx(of_weights, rel=0.02), pytest.approx(of_an_image, rel=0.01))


KEPT = {  # GB of copies of the weights, and of an image
    "t2i_fm": (2.04, 0.67), "t2i": (2.04, 0.673), "t2i_small_fm": (0.256, 0.168), "t2i_small": (0.256, 0.171),
}


def says(name, *figures):
    """Whether the comment of a config has all of these figures."""
    text = (ROOT / "config" / f"{name}.py").read_text().replace("\n# ", " ")
    return all(figure in text for figure in figures)


@pytest.mark.slow
@pytest.mark.parametrize("name", KEPT)
def test_what_training_keeps_is_what_its_config_says(monkeypatch, name):
    """The NTMs by their own loss, with the flow over pixels and mirror images."""
    of_weights, of_an_image = KEPT[name]
    kept = kept_in_training(monkeypatch, *update.of_config(ROOT / "config" / f"{name}.py"))
    assert kept == (pytest.approx(of_weights, rel=0.01), pytest.approx(of_an_image, rel=0.01))
    assert says(name, f"{of_weights:.2f} GB", f"{of_an_image:.2f} GB an image")


def gigabytes_of_weights(name):
    """(million weights, GB of them with gradients, optimisers' states and average; GB of a checkpoint) of a config."""
    with FakeTensorMode():
        kind, settings = update.of_config(ROOT / "config" / f"{name}.py")
        model = update.build(kind, settings)
        optimizers = make_optimizers(model, settings["optimizer"], 1e-4, torch.device("cpu"))
        weights = sum(weight.numel() for weight in model.parameters())
        states = 0
        for optimizer in optimizers:
            of_each = 2 if isinstance(optimizer, torch.optim.AdamW) else 1
            states += of_each * sum(weight.numel() for group in optimizer.param_groups for weight in group["params"])
    return weights / 1e6, 4e-9 * (3 * weights + states), 4e-9 * (2 * weights + states)


@pytest.mark.parametrize("name, parameters, training, checkpoint", [
    ("t2i_fm", "1.10 billion", 19.3, 14.9), ("t2i", "1.10 billion", 19.3, 14.9),
    ("t2i_small_fm", "167 million", 3.0, 2.3), ("t2i_small", "168 million", 3.0, 2.3)])
def test_weights_are_those_that_the_config_says(name, parameters, training, checkpoint):
    found = gigabytes_of_weights(name)
    assert [round(size, 1) for size in found[1:]] == [training, checkpoint]
    assert parameters in (f"{found[0]:.0f} million", f"{found[0] / 1000:.2f} billion")
    assert says(name, f"{parameters} parameters", f"{training} GB")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["t2i_small_fm", "t2i_small"])
def test_operations_are_those_that_the_config_says(name):
    cost = update.cost_of(*update.of_config(ROOT / "config" / f"{name}.py"))
    assert says(name, f"{cost.flop / 1e12:.2f} TFLOP", f"Muon takes {cost.muon / 1e12:.1f} TFLOP")


def test_large_and_small_are_one_recipe():
    """What differs between them is the network's size, the batch and how long and fast they learn."""
    own = "out_dir", "init_from", "width", "depth", "heads", "lr", "batch_size", "grad_accum", "max_iters"
    for suffix in "_fm", "":
        large, small = (run_config(str(ROOT / "config" / f"{name}{suffix}.py")) for name in ("t2i", "t2i_small"))
        assert {key for key in large | small if large.get(key) != small.get(key)} <= {*own}
    method = ("first_noise", "transporter_blocks", "rank", "filters", "logistics", "mirrored", "shift", "level_weight",
              "velocity_weight", "aux_weight")
    emoji = run_config(str(ROOT / "config" / "emoji64.py"))
    assert {name: large[name] for name in method} == {name: emoji[name] for name in method}
    tiny = run_config(str(ROOT / "config" / "t2i_tiny.py"))
    assert {name: tiny[name] for name in method if name != "shift"} == {
        name: large[name] for name in method if name != "shift"}


def commands_for(gigabytes, page, name):
    """(command, GB a GPU) of each command in a page that trains config/NAME.py: `gigabytes` of a pass of so many images,
    the batch divided among ranks and accumulation passes."""
    config = run_config(str(ROOT / "config" / f"{name}.py"))
    text = (ROOT / page).read_text().replace("\\\n", " ")
    for command in re.findall(rf"^torchrun .*train\.py config/{name}\.py.*", text, re.MULTILINE):
        def given(key, default):
            return int((re.search(rf"--{key}=(\d+)", command) or [0, default])[1])
        ranks = given("nproc_per_node", 1) * given("nnodes", 1)
        passes = ranks * given("grad_accum", config["grad_accum"])
        yield command, gigabytes(given("batch_size", config["batch_size"]) / passes)


@pytest.mark.parametrize("name", ["t2i_fm", "t2i"])
def test_commands_of_the_docs_fit_into_a_gpu_of_80_gb(name):
    of_weights, of_an_image = KEPT[name]
    beside = gigabytes_of_weights(name)[1]

    def gigabytes(images):
        return beside + of_weights + of_an_image * images

    assert gigabytes(2048 / 8 / 4) == pytest.approx(64, abs=1)
    found = [*commands_for(gigabytes, "docs/scaling.md", name)]
    assert len(found) >= 3 and all(size < 75 for _, size in found), found


@pytest.mark.slow
def test_what_an_example_takes_is_estimated_well():
    with FakeTensorMode():
        for model, T in ((NTM(SMALLER), 8), (network_of("t2i_small"), 8),
                         (NTM(NTMConfig(transporter_blocks=0, width=256)), 4), (NTM(NTMConfig(image_size=16, depth=1)), 16)):
            config = model.requires_grad_(False).config
            count = examples_at_once(config, T)
            x, text = torch.zeros(1, T + 1, config.num_tokens, config.token_dim), torch.ones(1, config.text_len).long()
            with Kept(model) as kept:
                model.score_denoise(x, config.time_grid(0.02, T), text)
            assert 0.7 * LIMIT < count * kept.peak < 1.1 * LIMIT


def test_validation_passes_as_many_examples_at_once_as_fit(monkeypatch):
    """At the size of t2i, with a transporter, a layer of 100 trajectories would take 17 GB."""
    with FakeTensorMode():
        assert 30 < examples_at_once(network_of("t2i").config, 4, gradients=False) < 40
    config, seen = TRANSPORTED, []
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
