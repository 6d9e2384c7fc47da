"""What a GPU will need. Without one: graphs that are whole and compiled once, and no wait for the device in an update;
with one, `pytest -m cuda` runs the scripts on it in bfloat16, compiled."""
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import randomize
from helpers import DISTILL, ROOT, SAMPLE, TRAIN, contents, fails, on_ranks, run, torchrun, training_lines
from tiny import Encoder, network_of
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.nn.utils import clip_grad_norm_

from beyond import CoupledConfig, CoupledNTM
from evidence.update import of_config
from fm import FlowMatching
from losses import TrainingLoss, draw_levels, losses_of_batch
from model import NTM, NTMConfig
from plumbing import rng
from plumbing.optim import make_optimizers, update_average, update_weights
from plumbing.runtime import autocast, for_training

TINY = dict(image_size=4, width=16, depth=1, heads=2, transporter_width=8, transporter_blocks=1)
NO_TRANSPORTER = dict(transporter_blocks=0, rank=2, parametrization="posterior")
WAYS = {
    "pairs": {}, "trajectories": {}, "several T": dict(steps=(2, 4)), "flow matching": {}, "directions": dict(rank=2),
    "closed form": NO_TRANSPORTER, "coupled": NO_TRANSPORTER | dict(first_noise=0.5),
    "coupled flow over pixels": NO_TRANSPORTER | dict(first_noise=0.5, filters=2, logistics=2),
    "near its start": dict(parametrization="posterior"),
}
PLAIN = dict(max_t_min=0.05, closed_form=False, mirrored=False, level_weight=0.0, velocity_weight=0.0, aux_weight=0.0)
# the settings of train.py that a way stands for, beside those of its network
TRAINED = {
    "pairs": dict(pairs=True), "trajectories": dict(pairs=False), "several T": dict(pairs=True),
    "flow matching": dict(pairs=False), "directions": dict(pairs=True, level_weight=0.5),
    "closed form": dict(pairs=True, closed_form=True, level_weight=1.0, velocity_weight=1.0),
    "near its start": dict(pairs=True, aux_weight=2.5),
}
TRAINED["coupled"] = TRAINED["closed form"]
TRAINED["coupled flow over pixels"] = dict(pairs=True, mirrored=True, level_weight=0.5, velocity_weight=1.0)


def make_network(way, size):
    if way == "flow matching":
        return FlowMatching(NTMConfig(**size))
    if way.startswith("coupled"):
        return CoupledNTM(CoupledConfig(**size | WAYS[way]))
    return NTM(NTMConfig(**size | WAYS[way]))


def an_update(way, device, size=TINY, batch=8):
    """update_of a network of the size, trained that way."""
    with device:
        model = make_network(way, size)
        average = make_network(way, size)
    return update_of(model, average, TRAINED[way], device, batch)


def update_of(model, average, trained, device, batch):
    """A function that makes one update as train.py does, with Muon, and returns the gradient's norm."""
    average.requires_grad_(False)
    config = model.config
    optimizers = make_optimizers(model, "muon", 1e-4, device, bfloat16=True)
    images = torch.zeros(batch, config.channels, *config.image_size, device=device)
    text = torch.ones(batch, config.text_len, dtype=torch.long, device=device)
    settings = PLAIN | trained | dict(batch_size=batch, bfloat16=True)
    loss = TrainingLoss(model, settings)
    noised = getattr(average, "noised_pairs", getattr(average, "noised", None))
    frozen = average if settings["aux_weight"] else None
    generator = torch.Generator(device)
    batches = SimpleNamespace(rows=slice(None), randn=rng.randn)

    def update(i):
        with autocast(settings, device):
            levels = draw_levels(model, noised, images, text, settings, batches, generator)
            losses = losses_of_batch(loss, frozen, settings["aux_weight"], images, text, *levels)
        losses["minimised"].backward()
        norm = clip_grad_norm_(model.parameters(), 1.0)
        update_weights(optimizers, 1e-3)
        update_average(average, model, 0.999, i)
        model.zero_grad(set_to_none=True)
        return norm

    return update


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.slow
def test_an_update_waits_for_nothing(way):
    """Tensors without values, on which whatever needs a value fails, as the norm's does here."""
    with FakeTensorMode():
        update = an_update(way, torch.device("cpu"))
        update(0)
        with pytest.raises(DataDependentOutputException):
            update(1).item()


def test_the_training_loop_waits_once_an_update(tmp_path, monkeypatch):
    """For the sums of losses, norm and counts. What the loader does is on the CPU."""
    waits, tolist, item = [], torch.Tensor.tolist, torch.Tensor.item
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: waits.append("sums") or tolist(self))
    monkeypatch.setattr(torch.Tensor, "item", lambda self: waits.append(str(self.dtype)) or item(self))
    counts = []
    for iterations in 2, 6:
        waits.clear()
        run("train.py", *TRAIN, f"--out_dir={tmp_path / str(iterations)}", f"--max_iters={iterations}",
            "--num_samples=1", "--val_interval=100")
        counts.append({name: waits.count(name) for name in ("sums", "torch.float32")})
    assert counts[1]["sums"] - counts[0]["sums"] == 4 and counts[1]["torch.float32"] == counts[0]["torch.float32"]


@pytest.mark.parametrize("way", ["pairs", "closed form", "flow matching", "coupled", "coupled flow over pixels"])
@pytest.mark.slow
def test_a_graph_is_whole_and_compiled_once(tmp_path, monkeypatch, way):
    """Captured as on CUDA, and run by Python. What couples noise, from a flow-matching model, is another graph."""
    start = []
    if way.startswith("coupled"):
        run("train.py", *TRAIN, "--objective=fm", "--max_iters=1", "--num_samples=1", f"--out_dir={tmp_path}/fm")
        start = [f"--init_from={tmp_path}/fm/ckpt.pt", "--aux_weight=0"]
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda model: original(model, backend="eager"))
    objective = "fm" if way == "flow matching" else "ntm"
    torch._dynamo.reset()
    counters.clear()
    settings = {name: value for name, value in {**WAYS[way], **TRAINED[way]}.items() if name != "parametrization"}
    run("train.py", *TRAIN, *(f"--{name}={value}" for name, value in settings.items()),
        *start, f"--objective={objective}", "--compile=True", "--max_iters=5", "--val_interval=100", "--val_examples=2",
        "--num_samples=1", f"--out_dir={tmp_path}")
    assert not counters["graph_break"] and counters["stats"]["unique_graphs"] == 1 + way.startswith("coupled")
    torch._dynamo.reset()


@pytest.mark.parametrize("way", ["flow matching", "closed form"])
@pytest.mark.slow
def test_layers_compiled_one_by_one_are_one_graph_and_compute_the_same(monkeypatch, way):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function: original(function, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    model = randomize(make_network(way, TINY | dict(depth=3)), scale=0.3)
    config = model.config
    settings = PLAIN | TRAINED[way] | dict(batch_size=4, bfloat16=False, compile="layers")
    loss = TrainingLoss(model, settings)
    images = torch.rand(4, config.channels, *config.image_size)
    text = torch.ones(4, config.text_len, dtype=torch.long)
    batches = SimpleNamespace(rows=slice(None), randn=rng.randn)
    levels = draw_levels(model, getattr(model, "noised", None), images, text, settings, batches, None)
    plain = loss(images, text, levels)["minimised"]
    network = for_training(loss, settings, torch.device("cpu"))
    compiled = network(images, text, levels)["minimised"]
    torch.testing.assert_close(compiled, plain)
    compiled.backward()
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    torch._dynamo.reset()


OVERLAP = """
import functools
import sys

sys.path.insert(0, {root!r})
import torch
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from evidence.update import Update, build, inputs
from plumbing import runtime

size = dict(image_size=16, channels=3, patch_size=4, width=256, depth=2, heads=4, vocab_size=20, text_len=4)
size |= dict(transporter_blocks=0, rank=4, filters=2, logistics=2, first_noise=0.5, parametrization="posterior")
runtime.DistributedDataParallel = functools.partial(runtime.DistributedDataParallel, bucket_cap_mb=1.5)
torch.compile = functools.partial(torch.compile, backend="aot_eager")
torch.nn.Module.compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
device, rank, _ = runtime.start_ranks("cpu")
for compiled in False, "layers", True:
    torch.manual_seed(0)
    model = build("coupled", size)
    update = Update(model, build("coupled", size).requires_grad_(False), 10, compiled)
    events = []

    def send(state, bucket):
        events.append("bucket")
        return allreduce_hook(None, bucket)

    update.network.register_comm_hook(None, send)
    for weight in model.parameters():
        weight.register_post_accumulate_grad_hook(lambda weight: events.append("gradient"))
    images, text = inputs(model.config, 10, device)
    for _ in range(3):
        events.clear()
        update.loss(images, text).backward()
        model.zero_grad(set_to_none=True)
    first = events.index("bucket")
    if rank == 0:
        print(events.count("bucket"), events[first:].count("gradient") / events.count("gradient"))
    torch.compiler.reset()
runtime.meet_ranks()
runtime.leave_ranks()
"""


@pytest.mark.slow
def test_ranks_sum_gradients_while_others_are_computed(tmp_path):
    """Plain, with layers compiled and with the whole: most gradients come after the first sum has begun."""
    program = tmp_path / "overlap.py"
    program.write_text(OVERLAP.format(root=str(ROOT)))
    ways = [line.split() for line in on_ranks(2, program).splitlines()]
    assert len(ways) == 3
    for buckets, later in ways:
        assert int(buckets) > 4 and float(later) > 0.7


def test_a_way_to_compile_that_is_none_is_named(tmp_path):
    for script in "train.py", "distill.py":
        line = fails(script, "--compile=layer", "--device=cpu", f"--out_dir={tmp_path}")
        assert line == "compile is 'layer': choose True, False or 'layers'"


# ---------------------------------------------------------------------------------------------------------------
# On a GPU

cuda = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA here")]
GPU = "--device=cuda"  # after SHORT's, of which the last one counts


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory):
    """A folder after train.py and distill.py, in bfloat16 and compiled, as is the default on CUDA."""
    out = tmp_path_factory.mktemp("gpu")
    torch._dynamo.reset()
    counters.clear()
    run("train.py", *TRAIN, GPU, f"--out_dir={out}", "--optimizer=muon", "--max_iters=8")
    (out / "graphs").write_text(str(counters["stats"]["unique_graphs"]))
    run("distill.py", *DISTILL, GPU, f"--out_dir={out}")
    return out


class TestCuda:
    pytestmark = cuda

    def test_scripts_run(self, on_gpu):
        assert all(loss["loss"] < 10 for loss in training_lines(on_gpu / "log.jsonl"))
        for denoise in "learned", "score", "none":
            run("sample.py", *SAMPLE, GPU, f"--out_dir={on_gpu}", f"--denoise={denoise}", "--show_trajectory=True")
        run("evaluate.py", GPU, f"--out_dir={on_gpu}", "--val_examples=20", "--num_samples=20", "--trajectories=1")
        run("bench.py", GPU, f"--out_dir={on_gpu}", "--repeats=1", "--batch_size=4", "--image_sizes=(8,)")
        training = json.loads((on_gpu / "bench.json").read_text())["training"]
        assert all(0 < row["peak GiB"] < 2 for name, row in training.items() if name != "matrix product GFLOP/s")

    def test_what_is_compiled_is_compiled_once(self, on_gpu):
        assert int((on_gpu / "graphs").read_text()) == 1

    def test_a_run_goes_on(self, on_gpu):
        run("train.py", GPU, f"--out_dir={on_gpu}", "--resume=yes", "--max_iters=10")
        assert contents(on_gpu / "ckpt.pt")["iter"] == 10

    def test_a_coupled_model_trains(self, tmp_path):
        run("train.py", *TRAIN, GPU, "--objective=fm", f"--out_dir={tmp_path / 'fm'}")
        run("train.py", *TRAIN, GPU, "--transporter_blocks=0", "--closed_form=True", "--aux_weight=0", "--rank=2",
            "--first_noise=0.5", f"--init_from={tmp_path / 'fm' / 'ckpt.pt'}", f"--out_dir={tmp_path / 'ntm'}")
        assert contents(tmp_path / "ntm" / "ckpt.pt")["model_config"]["first_noise"] == 0.5

    def test_bfloat16_is_near_float32(self, on_gpu, tmp_path):
        run("train.py", *TRAIN, GPU, f"--out_dir={tmp_path}", "--optimizer=muon", "--max_iters=8", "--bfloat16=False",
            "--compile=False")
        losses = [[line["loss"] for line in training_lines(out / "log.jsonl")][:8] for out in (on_gpu, tmp_path)]
        assert losses[0] == pytest.approx(losses[1], abs=0.03)

    @pytest.mark.parametrize("way", WAYS)
    def test_an_update_waits_for_nothing(self, way):
        update = an_update(way, torch.device("cuda"))
        update(0)
        torch.cuda.set_sync_debug_mode("error")
        try:
            norm = update(1)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert norm.isfinite()

    def test_an_inverse_is_by_sweeps_and_exact_to_its_tolerance(self):
        model = NTM(NTMConfig(image_size=16, width=16, depth=1, heads=2)).cuda()
        for parameter in model.transporter.parameters():
            torch.nn.init.normal_(parameter, std=0.03)
        ts = model.config.time_grid(0.02).cuda()
        x = torch.randn(3, len(ts), model.config.num_tokens, model.config.token_dim, device="cuda")
        u, _ = model.transport(x, ts.expand(3, -1), torch.full((3,), len(ts) - 1, device="cuda"))
        torch.testing.assert_close(model.invert(u, ts), x, atol=1e-4, rtol=0)
        assert (u - x).abs().max() > 0.01 and 1 < max(model.transporter.sweeps) < model.config.num_tokens

    def test_encode(self, tmp_path):
        from plumbing.latents import load_exported
        batch = torch.export.Dim("batch", min=1, max=63)
        program = torch.export.export(Encoder(), (torch.zeros(2, 3, 32, 32),), dynamic_shapes=({0: batch},))
        torch.export.save(program, tmp_path / "encoder.pt2")
        encode, images = load_exported(tmp_path / "encoder.pt2", torch.device("cuda")), torch.rand(5, 3, 32, 32)
        torch.testing.assert_close(encode(images.cuda()).cpu(), Encoder()(images), atol=1e-4, rtol=1e-4)

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="nccl takes one GPU a rank")
    def test_two_ranks_are_one(self, tmp_path):
        for ranks in 1, 2:
            status, _, err = torchrun(ranks, "train.py", *TRAIN, GPU, f"--out_dir={tmp_path / str(ranks)}")
            assert status == 0, err
        one, two = ([line["loss"] for line in training_lines(tmp_path / ranks / "log.jsonl")] for ranks in "12")
        assert two == pytest.approx(one, abs=0.03)

    @pytest.mark.parametrize("name", ["t2i_small_fm", "t2i_small"])
    def test_t2i_small_fits_into_24_gb(self, name):
        _, settings = of_config(ROOT / "config" / f"{name}.py")
        settings["aux_weight"] = 0.0  # flow matching has no model to stay close to
        device = torch.device("cuda")
        with device:
            model, average = network_of(name), network_of(name)
        update = update_of(model, average, settings, device, 32)
        torch.cuda.reset_peak_memory_stats()
        update(0)
        assert torch.cuda.max_memory_allocated() < 24e9
