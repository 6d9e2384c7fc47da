"""Measures speed: training, inversion, and four ways to draw a picture; every ratio side by side, in one run.

    python bench.py                                     # the size of config/shapes.py, at random weights
    python bench.py --out_dir=out/shapes                # a trained model's size and weights
    python bench.py --width=512 --depth=12 --heads=8 --batch_size=256
    python bench.py data                                # reading instead: images/s of one worker, from shards

Each figure is the median of several after a warm-up; what is compared takes turns, so that a machine that slows down
slows all alike. Prints tables and leaves bench.json (bench_data.json) in out_dir, or out/.
"""

import io
import json
import re
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import checkpoint
from configurator import at_least_one, configure, one_line_errors
from flow import forward_trajectory
from fm import EULER_STEPS, FlowMatching
from loop import make_optimizers
from model import NTM, Denoiser, NTMConfig
from ranks import autocast, find_device
from shards import Shards, write_shards

out_dir = ""  # of a trained model to take size and weights from; empty: the sizes below, and random weights
image_size: int | tuple = 16
channels = 3
patch_size = 2
text_len = 8
width = 128
depth = 4
heads = 4
transporter_width = 64
transporter_blocks = 3
transporter_layers = 2
transporter_heads = 2
steps = 4
shift: float | None = 0.5
pairs = True
batch_size = 64
image_sizes = (8, 16)  # for inversion and for the cost against N
tolerances = (1e-2, 1e-3, 1e-4)  # of Jacobi's sweeps
step_counts = (1, 2, 4, 8)  # for the cost against T
repeats = 5  # of each figure, of which the median counts
bfloat16: bool | None = None  # autocast; None: on CUDA only
device = ""  # cuda, mps or cpu; empty: the best there is


def wait(device):
    """Until the accelerator has done what it was asked."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    elif device.type == "mps":
        torch.mps.synchronize()


def medians(functions, device, bar):
    """{name: median seconds of a call} of several functions {name: function}, taking turns, after one call each."""
    seconds = {name: [] for name in functions}
    for turn in range(1 + repeats):
        for name, function in functions.items():
            wait(device)
            start = time.perf_counter()
            function()
            wait(device)
            if turn:
                seconds[name].append(time.perf_counter() - start)
            bar.update()
    return {name: statistics.median(values) for name, values in seconds.items()}


def spread(model):
    """Random weights where initialisation has zeros, so that the transporter stretches and depends as a trained one
    does: at the identity, Jacobi would need one sweep."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator) * 0.3 / parameter.shape[-1] ** 0.5
            parameter.data.copy_(noise)
    return model


def network(kind, config, device):
    """A fresh network of a size, at random weights."""
    torch.manual_seed(0)
    return spread(kind(config)).to(device)


def inputs(config, device, count):
    """Random pictures and captions."""
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(count, config.channels, *config.image_size, generator=generator) - 1
    text = torch.randint(2, config.vocab_size, (count, config.text_len), generator=generator)
    return images.to(device), text.to(device)


def matmul_ceiling(settings, device, bar):
    """FLOP/s of a large matrix product in the precision of training: what this machine could do at best."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)

    def product():
        with autocast(settings, device):
            torch.mm(a, b)

    return 2 * n**3 / medians({"product": product}, device, bar)["product"]


def training_step(kind, config, settings, device, compiled=False):
    """A function that makes one update, as train.py does."""
    model = network(kind, config, device)
    images, text = inputs(config, device, batch_size)
    optimizers = make_optimizers(model, {"optimizer": "adamw", "weight_decay": 0.0}, device)
    run = torch.compile(model) if compiled else model

    def update():
        with autocast(settings, device):
            loss = run(images, text, model.draw(batch_size, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)

    return update


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def peak_memory(function, device):
    """GiB at most during a call: of tensors on CUDA, of the whole process on Linux; None where it cannot be told."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        function()
        return torch.cuda.max_memory_allocated() / 2**30
    try:
        Path("/proc/self/clear_refs").write_text("5")  # forgets the largest size so far
    except OSError:
        return None
    function()
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def bench_training(config, settings, device, bar):
    """Images/s of training, the share of the machine's matrix-product ceiling that its FLOPs are, and peak memory."""
    ways = {"NTM, pairs": (NTM, replace(config, pairs=True)), "NTM, trajectories": (NTM, replace(config, pairs=False)),
            "NTM, no transporter": (NTM, replace(config, transporter_blocks=0, pairs=True)),
            "flow matching": (FlowMatching, config)}
    updates = {name: training_step(*way, settings, device) for name, way in ways.items()}
    if device.type == "cuda":
        updates |= {f"{name}, compiled": training_step(*way, settings, device, True) for name, way in ways.items()}
    flops = {name: flops_of(update) for name, update in updates.items() if name in ways}
    peak = {name: peak_memory(update, device) for name, update in updates.items()}
    ceiling, seconds = matmul_ceiling(settings, device, bar), medians(updates, device, bar)
    return {"matrix product GFLOP/s": ceiling / 1e9} | {name: {
        "images/s": batch_size / s, "GFLOP an image": flops[name.removesuffix(", compiled")] / batch_size / 1e9,
        "utilisation": flops[name.removesuffix(", compiled")] / s / ceiling,
        **({"peak GiB": peak[name]} if peak[name] else {})} for name, s in seconds.items()}


@torch.no_grad()
def bench_inversion(models, device, bar):
    """Cache and Jacobi at several N: images/s of inverting a trajectory, sweeps a block, and the largest error against
    Jacobi's sweeps without a tolerance, which are exact."""
    results = {}
    for model in models:
        config = model.config
        images, _ = inputs(config, device, batch_size)
        ts = config.time_grid(0.02).to(device).expand(batch_size, -1)
        x = forward_trajectory(model.patchify(images), ts)
        count = torch.full((batch_size * ts.shape[1],), ts.shape[1] - 1, device=device)
        u, _ = model.transporter(x.flatten(0, 1), ts.flatten(), count)
        u = u.unflatten(0, ts.shape)
        exact = model.invert(u, ts, "jacobi", tol=0.0)
        ways = {"cache": ("cache", 0.0)} | {f"Jacobi, tolerance {tol:g}": ("jacobi", tol) for tol in tolerances}
        seconds = medians({name: lambda way=way: model.invert(u, ts, *way) for name, way in ways.items()}, device, bar)
        for name, way in ways.items():
            error = (model.invert(u, ts, *way) - exact).abs().max().item()
            row = {"images/s": batch_size / seconds[name], "largest error": error}
            if way[0] == "jacobi":
                row["sweeps a block"] = statistics.mean(model.transporter.sweeps)
            results[f"N = {config.num_tokens}, {name}"] = row
    return results


def bench_sampling(model, denoiser, device, bar):
    """Images/s from a caption to a picture: four ways, and a flow-matching model of the same network."""
    config, ts = model.config, model.config.time_grid(0.02).to(device)
    peer = network(FlowMatching, config, device).eval()
    _, text = inputs(config, device, batch_size)

    def inverted():
        return model.invert(model.sample(text, ts), ts)

    def learned():
        with torch.no_grad():
            denoiser(model.sample(text, ts)[:, 0], text)

    T = len(ts) - 1
    ways = {f"NTM, {T} steps, none": inverted,
            f"NTM, {T} steps, score": lambda: model.score_denoise(inverted(), ts, text),
            f"NTM, {T} steps, learned": learned,
            f"flow matching, {T} steps": lambda: peer.sample(text, T),
            f"flow matching, {EULER_STEPS} steps": lambda: peer.sample(text, EULER_STEPS)}
    return {name: {"images/s": batch_size / s} for name, s in medians(ways, device, bar).items()}


def bench_cost(model, settings, device, bar):
    """Milliseconds an image of a training step and of sampling (learned denoising left out), against T and N."""
    config, results = model.config, {}
    sizes = {f"T = {T}": replace(config, steps=T) for T in step_counts}
    sizes |= {f"N = {(size // config.patch_size) ** 2}": replace(config, image_size=size) for size in image_sizes}
    for name, sized in sizes.items():
        drawer = network(NTM, sized, device).eval()
        _, text = inputs(sized, device, batch_size)
        ts = sized.time_grid(0.02).to(device)
        seconds = medians({
            "training, pairs": training_step(NTM, replace(sized, pairs=True), settings, device),
            "training, trajectories": training_step(NTM, replace(sized, pairs=False), settings, device),
            "sampling": lambda: drawer.sample(text, ts)}, device, bar)
        results[name] = {f"{key}, ms": 1000 * s / batch_size for key, s in seconds.items()}
    return results


def photographs(count):
    """Pictures of 384x256 with soft shapes and fine grain, as heavy to decode as photographs."""
    grain = np.random.default_rng(0)
    for _ in range(count):
        soft = Image.fromarray(grain.integers(0, 256, (12, 18, 3), dtype=np.uint8)).resize((384, 256))
        yield Image.fromarray((soft + grain.normal(0, 6, (256, 384, 3))).clip(0, 255).astype(np.uint8))


def bench_data(bar, count=64):
    """Images/s of one worker from shards of PNGs, of JPEGs (384x256 to 256x256) and of latents (4x32x32)."""
    def as_file(picture, kind):
        file = io.BytesIO()
        if kind == "latents":
            np.save(file, np.zeros((4, 32, 32), dtype=np.float16))
        else:
            picture.save(file, kind, quality=90)
        return file.getvalue()

    suffixes = {"PNG": "png", "JPEG": "jpg", "latents": "npy"}
    with tempfile.TemporaryDirectory() as folder:
        sets = {}
        for kind, suffix in suffixes.items():
            write_shards(Path(folder) / kind, [(f"{i:05d}", {suffix: as_file(picture, kind), "txt": b"a caption"})
                                               for i, picture in enumerate(photographs(count))])
            sets[kind] = Shards(str(Path(folder) / kind), "all", *((4, 32, 32) if kind == "latents" else (3, 256, 256)))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
        seconds = medians({kind: lambda ds=ds: ds.__getitems__(order) for kind, ds in sets.items()},
                          torch.device("cpu"), bar)
    return {kind: {"images_per_s": count / s} for kind, s in seconds.items()}


def table(title, results):
    """A part's results as lines: a row for each name, a column for each figure."""
    yield title
    for name, row in results.items():
        figures = row.items() if isinstance(row, dict) else [("", row)]
        yield f"  {name:36}" + "".join(f"  {key} {value:.4g}" for key, value in figures)


def main(config):
    where = find_device(config["device"])
    at_least_one(config, "batch_size", "repeats")
    if of_data:
        with tqdm(total=3 * (1 + repeats), unit="call", dynamic_ncols=True) as bar:
            report(config, where, {"data": bench_data(bar)}, "bench_data.json")
        return
    if out_dir:
        trained = checkpoint.load(Path(out_dir) / "ckpt.pt", "ntm", device=where)
        model = checkpoint.network_of(trained, Path(out_dir) / "ckpt.pt", where)
    else:
        fields = {name: config[name] for name in NTMConfig.__dataclass_fields__ if name in config}
        model = network(NTM, NTMConfig(**fields), where).eval()
    denoiser = network(Denoiser, model.config, where).eval()
    others = [network(NTM, replace(model.config, image_size=size), where).eval() for size in image_sizes
              if (size, size) != model.config.image_size]
    models = sorted([model, *others], key=lambda m: m.config.num_tokens)

    training = 4 * (2 if where.type == "cuda" else 1)
    calls = 1 + training + len(models) * (1 + len(tolerances)) + 5 + 3 * (len(step_counts) + len(image_sizes))
    with tqdm(total=calls * (1 + repeats), unit="call", dynamic_ncols=True) as bar:
        results = {"training": bench_training(model.config, config, where, bar),
                   "inversion": bench_inversion(models, where, bar),
                   "sampling": bench_sampling(model, denoiser, where, bar),
                   "cost": bench_cost(model, config, where, bar)}
    report(config, where, results, "bench.json")


def report(config, where, results, name_of_file):
    """Prints the results and leaves them in a file, with the machine and the settings they are of."""
    for title, rows in results.items():
        print("\n".join(table(title, rows)))
    cuda = where.type == "cuda"
    name = torch.cuda.get_device_name(where) if cuda else f"{where.type}, {torch.get_num_threads()} threads"
    path = Path(out_dir or "out") / name_of_file
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"machine": name, "torch": torch.__version__, "config": config, **results}, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    of_data = sys.argv[1:2] == ["data"]
    del sys.argv[1:1 + of_data]
    config = configure(globals())
    with one_line_errors():
        main(config)
