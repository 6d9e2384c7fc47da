"""Measure the speed of training, inversion and sampling, each in several variants.

    python bench.py                                     # the size of config/shapes_scratch.py, with random weights
    python bench.py --out_dir=out/shapes                # a trained model's size and weights
    python bench.py --width=512 --depth=12 --heads=8 --batch_size=256

Each figure is the median of several measurements after a warm-up. The variants take turns, so that a machine that slows
down slows all of them alike. Prints tables and writes bench.json into out_dir, or into out/.
"""

import json
import statistics
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from configurator import configure
from flow import forward_trajectory
from fm import EULER_STEPS, FlowMatching
from model import NTM, Denoiser, NTMConfig
from networks import NTMS
from plumbing import checkpoint
from plumbing.optim import make_optimizers, update_weights
from plumbing.runtime import autocast, find_device, one_line_errors

out_dir = ""  # the folder of a model to measure; empty: a model of the sizes below with random weights
image_size: int | tuple = 16  # pixels a side; or height,width
channels = 3  # 1: grey, 3: RGB
patch_size = 2  # pixels a side of the square that becomes one token
text_len = 8  # tokens of a caption
width = 128  # numbers per token in the predictor
depth = 4  # layers of the predictor
heads = 4  # attention heads of the predictor
transporter_width = 64  # numbers per token in the transporter
transporter_blocks = 3  # autoregressive blocks of the transporter
transporter_layers = 2  # layers of each block
transporter_heads = 2  # attention heads of each block
steps = 4  # T, the number of reverse steps
shift: float | None = 0.5  # e^m of the time grid; None: from the number of tokens
batch_size = 64  # images per update, and images sampled at once
image_sizes = (8, 16)  # image sizes in pixels at which inversion is timed
tolerances = (1e-2, 1e-3, 1e-4)  # tolerances at which inversion by Jacobi sweeps is timed
repeats = 5  # measurements per figure; the figure is their median
bfloat16: bool | None = None  # train in bfloat16 by autocast; None: on CUDA only
device = ""  # cuda, mps or cpu; empty: the best available


def medians(functions, device):
    """{name: median seconds of a call} of functions {name: function}, which take turns after one warm-up call each."""
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds = {name: [] for name in functions}
    for turn in tqdm(range(1 + repeats), leave=False, unit="turn"):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def flops_of(function):
    """The floating-point operations of a call."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def network(kind, config, device):
    """A network in evaluation mode with random weights, including those that are initialised to zero.

    With those at zero the transporter would be the identity, which Jacobi inverts in one sweep. Random weights make the
    transporter scale numbers as a trained one does.
    """
    torch.manual_seed(0)
    model = kind(config)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.data.copy_(noise * 0.3 / parameter.shape[-1] ** 0.5)
    return model.to(device).eval()


def inputs(config, device):
    """Random images (batch_size, C, H, W) in [-1, 1] and captions (batch_size, L)."""
    generator = torch.Generator().manual_seed(0)
    images = 2 * torch.rand(batch_size, config.channels, *config.image_size, generator=generator) - 1
    text = torch.randint(2, config.vocab_size, (batch_size, config.text_len), generator=generator)
    return images.to(device), text.to(device)


def draw(model, images, text, pairs):
    """The random numbers of an update, which are the last argument of forward."""
    x0 = model.patchify(images)
    if isinstance(model, FlowMatching):
        return model.draw_times(len(x0), device=images.device), torch.randn_like(x0)
    if pairs:
        steps, ts = model.draw_pairs(len(x0), device=images.device)
    else:
        steps, ts = model.draw_trajectories(len(x0), device=images.device)
    return steps, ts, model.noised(x0, text, ts)


def training_step(kind, config, device, pairs, compiled=False):
    """A function that makes one update with AdamW. pairs: train on one step of each trajectory instead of all steps."""
    model = network(kind, config, device).train()
    images, text = inputs(config, device)
    optimizers = make_optimizers(model, "adamw", 0.0, device)
    forward = torch.compile(model) if compiled else model

    def update():
        drawn = draw(model, images, text, pairs)
        with autocast({"bfloat16": bfloat16}, device):
            loss = forward(images, text, drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update_weights(optimizers, 1e-3)
        model.zero_grad(set_to_none=True)

    return update


def matrix_product_rate(device):
    """FLOP/s of a large matrix product."""
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    with autocast({"bfloat16": bfloat16}, device):
        seconds = medians({"product": lambda: a @ b}, device)["product"]
    return 2 * n**3 / seconds


def bench_training(model, device):
    """Images/s of training, its FLOP/s as a fraction of a large matrix product's, and on CUDA its peak memory."""
    config = model.config
    ways = {
        "NTM, pairs": (NTM, config, True),
        "NTM, trajectories": (NTM, config, False),
        "NTM, no transporter": (NTM, replace(config, transporter_blocks=0), True),
        "flow matching": (FlowMatching, config, True),
    }
    updates = {}
    flops = {}
    peaks = {}
    for name, (kind, sized, pairs) in ways.items():
        updates[name] = training_step(kind, sized, device, pairs)
        flops[name] = flops_of(updates[name])
    if device.type == "cuda":
        for name, (kind, sized, pairs) in ways.items():
            compiled = f"{name}, compiled"
            updates[compiled] = training_step(kind, sized, device, pairs, compiled=True)
            flops[compiled] = flops[name]
        peaks = {name: {"peak GiB": peak_memory(update)} for name, update in updates.items()}
    ceiling = matrix_product_rate(device)
    results = {"matrix product GFLOP/s": ceiling / 1e9}
    for name, seconds in medians(updates, device).items():
        results[name] = {
            "images/s": batch_size / seconds,
            "GFLOP an image": flops[name] / batch_size / 1e9,
            "utilisation": flops[name] / seconds / ceiling,
            **peaks.get(name, {}),
        }
    return results


def peak_memory(function):
    """The most CUDA memory in GiB that is allocated during a call."""
    torch.cuda.reset_peak_memory_stats()
    function()
    return torch.cuda.max_memory_allocated() / 2**30


@torch.no_grad()
def bench_inversion(model, device):
    """Images/s of inversion by cache and by sweeps at several N, with sweeps per block and the largest error.

    The error is measured against sweeps without a tolerance, which are exact.
    """
    results = {}
    for size in sorted({model.config.image_size, *map(square, image_sizes)}):
        config = replace(model.config, image_size=size)
        sized = model if config == model.config else network(NTM, config, device)
        ts = config.time_grid(0.02).to(device).expand(batch_size, -1)
        images, _ = inputs(config, device)
        x = forward_trajectory(sized.patchify(images), ts)
        u, _ = sized.transport(x, ts, sized.step_count(ts))
        exact = sized.invert(u, ts, "jacobi", tol=0.0)
        ways = {"cache": partial(sized.invert, u, ts, "cache")}
        for tol in tolerances:
            ways[f"jacobi, tolerance {tol:g}"] = partial(sized.invert, u, ts, "jacobi", tol)
        for name, seconds in medians(ways, device).items():
            error = (ways[name]() - exact).abs().max().item()
            row = {"images/s": batch_size / seconds, "largest error": error}
            if name != "cache":
                row["sweeps a block"] = statistics.mean(sized.transporter.sweeps)
            results[f"N = {config.num_tokens}, {name}"] = row
    return results


def square(side):
    return side, side


@torch.no_grad()
def bench_sampling(model, device):
    """Images/s from captions to images, of an NTM with each way to denoise, and of flow matching of the same size."""
    denoiser = network(Denoiser, model.config, device)
    peer = network(FlowMatching, model.config, device)
    _, text = inputs(model.config, device)
    ts = model.config.time_grid(0.02).to(device)
    T = len(ts) - 1

    def invert():
        return model.invert(model.sample(text, ts), ts)

    ways = {
        f"NTM, {T} steps, none": invert,
        f"NTM, {T} steps, score": lambda: model.score_denoise(invert(), ts, text),
        f"NTM, {T} steps, learned": lambda: denoiser(model.sample(text, ts)[:, 0], text),
    }
    for steps in (T, EULER_STEPS):
        times = torch.linspace(0, 1, steps + 1)
        ways[f"flow matching, {steps} steps"] = partial(peer.sample, text, times)
    return {name: {"images/s": batch_size / seconds} for name, seconds in medians(ways, device).items()}


def open_model(config, device):
    """The model in out_dir, or one of the sizes in config with random weights."""
    if out_dir:
        model, _ = checkpoint.load_network(Path(out_dir) / "ckpt.pt", NTMS, device)
        return model
    names = NTMConfig.__dataclass_fields__.keys() & config.keys()
    sizes = {name: config[name] for name in names}
    return network(NTM, NTMConfig(**sizes), device)


def report(title, rows):
    print(title)
    for name, row in rows.items():
        figures = row.items() if isinstance(row, dict) else [("", row)]
        text = "".join(f"  {key} {value:.4g}" for key, value in figures)
        print(f"  {name:36}{text}")


@one_line_errors()
def main(config):
    where = find_device(config["device"])
    model = open_model(config, where)
    for size in image_sizes:
        replace(model.config, image_size=size)  # fails now for a wrong size, rather than minutes later
    if where.type == "cuda":
        machine = torch.cuda.get_device_name(where)
    else:
        machine = f"{where.type}, {torch.get_num_threads()} threads"
    results = {"machine": machine, "torch": torch.__version__, "config": config}
    for measure in bench_training, bench_inversion, bench_sampling:
        title = measure.__name__.removeprefix("bench_")
        results[title] = measure(model, where)
        report(title, results[title])
    path = Path(out_dir or "out") / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1), "utf-8")
    print(f"wrote {path}")


if __name__ == "__main__":
    main(configure(globals()))
