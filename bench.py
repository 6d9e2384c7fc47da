"""Measures speed: training, inversion, sampling in several ways, and the cost against steps and tokens, in one run.

    python bench.py                                     # the size of config/shapes.py, at random weights
    python bench.py --out_dir=out/shapes                # a trained model's size and weights
    python bench.py --width=512 --depth=12 --heads=8 --batch_size=256

Each figure is the median of several after a warm-up. What is compared takes turns, so that a machine that slows down
slows all of it alike. Prints tables and leaves bench.json in out_dir, or in out/.
"""

import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from configurator import configure
from flow import forward_trajectory
from fm import EULER_STEPS, FlowMatching
from model import NTM, Denoiser, NTMConfig
from plumbing import checkpoint
from plumbing.optim import make_optimizers, step
from plumbing.runtime import autocast, find_device, one_line_errors

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
batch_size = 64
image_sizes = (8, 16)  # for inversion and for the cost against N
tolerances = (1e-2, 1e-3, 1e-4)  # of sweeps
step_counts = (1, 2, 4, 8)  # for the cost against T
repeats = 5  # of each figure, of which the median counts
bfloat16: bool | None = None  # autocast; None: on CUDA only
device = ""  # cuda, mps or cpu; empty: the best there is


def medians(functions, device):
    """{name: median seconds of a call} of several functions {name: function}, taking turns, after one call each."""
    synchronize = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(device.type, lambda: None)
    seconds = {name: [] for name in functions}
    for turn in tqdm(range(1 + repeats), leave=False, unit="turn"):
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            seconds[name] += [time.perf_counter() - start] if turn else []
    return {name: statistics.median(values) for name, values in seconds.items()}


def flops_of(function):
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def network(kind, config, device):
    """A network in evaluation mode, with random weights also where initialisation has zeros: the transporter then
    stretches as a trained one does, while at the identity Jacobi would need one sweep."""
    torch.manual_seed(0)
    model, generator = kind(config), torch.Generator().manual_seed(0)
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


def training_step(kind, config, device, compiled=False):
    """A function that makes one update, as train.py does."""
    model, (images, text) = network(kind, config, device).train(), inputs(config, device)
    optimizers = make_optimizers(model, "adamw", 0.0, device)
    forward = torch.compile(model) if compiled else model

    def update():
        with autocast({"bfloat16": bfloat16}, device):
            loss = forward(images, text, model.randomness(batch_size, device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        step(optimizers, 1e-3)
        model.zero_grad(set_to_none=True)

    return update


def bench_training(model, device):
    """Images/s of training, its FLOPs as a fraction of the rate of a large matrix product, and on CUDA peak memory."""
    config = replace(model.config, first_noise=1.0)
    ways = {"NTM, pairs": (NTM, replace(config, pairs=True)), "NTM, trajectories": (NTM, replace(config, pairs=False)),
            "NTM, no transporter": (NTM, replace(config, transporter_blocks=0, pairs=True)),
            "flow matching": (FlowMatching, config)}
    updates = {name: training_step(*way, device) for name, way in ways.items()}
    flops, peak = {name: flops_of(update) for name, update in updates.items()}, {}
    if device.type == "cuda":
        updates |= {f"{name}, compiled": training_step(*way, device, compiled=True) for name, way in ways.items()}
        for name, update in updates.items():
            torch.cuda.reset_peak_memory_stats()
            update()
            peak[name] = {"peak GiB": torch.cuda.max_memory_allocated() / 2**30}
    n = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(2, n, n, device=device)
    with autocast({"bfloat16": bfloat16}, device):
        ceiling = 2 * n**3 / medians({"product": lambda: a @ b}, device)["product"]
    results = {"matrix product GFLOP/s": ceiling / 1e9}
    for name, seconds in medians(updates, device).items():
        work = flops[name.removesuffix(", compiled")]
        results[name] = {"images/s": batch_size / seconds, "GFLOP an image": work / batch_size / 1e9,
                         "utilisation": work / seconds / ceiling, **peak.get(name, {})}
    return results


@torch.no_grad()
def bench_inversion(model, device):
    """Images/s of inverting trajectories by cache and by sweeps at several N, sweeps over a chunk of tokens, and the
    largest error against Jacobi's sweeps without a tolerance, which are exact."""
    ways, results = {"cache": ("cache",)}, {}
    ways |= {f"{way}, tolerance {tol:g}": (way, tol) for way in ("jacobi", "gauss-seidel") for tol in tolerances}
    for size in sorted({model.config.image_size, *((size, size) for size in image_sizes)}):
        config = replace(model.config, image_size=size)
        sized = model if config == model.config else network(NTM, config, device)
        ts = config.time_grid(0.02).to(device).expand(batch_size, -1)
        x = forward_trajectory(sized.patchify(inputs(config, device)[0]), ts)
        u, _ = sized.transport(x, ts, torch.full((batch_size,), ts.shape[1] - 1, device=device))
        exact = sized.invert(u, ts, "jacobi", tol=0.0)
        seconds = medians({name: lambda way=way: sized.invert(u, ts, *way) for name, way in ways.items()}, device)
        for name, way in ways.items():
            error = (sized.invert(u, ts, *way) - exact).abs().max().item()
            row = results[f"N = {config.num_tokens}, {name}"] = {
                "images/s": batch_size / seconds[name], "largest error": error}
            if way != ("cache",):
                row["sweeps a chunk"] = statistics.mean(sized.transporter.sweeps)
    return results


@torch.no_grad()
def bench_sampling(model, device):
    """Images/s from captions to images: an NTM for each way to denoise, and flow matching with the same network."""
    denoiser, peer = network(Denoiser, model.config, device), network(FlowMatching, model.config, device)
    (_, text), ts = inputs(model.config, device), model.config.time_grid(0.02).to(device)
    T = len(ts) - 1
    ways = {f"NTM, {T} steps, none": lambda: model.invert(model.sample(text, ts), ts),
            f"NTM, {T} steps, score": lambda: model.score_denoise(model.invert(model.sample(text, ts), ts), ts, text),
            f"NTM, {T} steps, learned": lambda: denoiser(model.sample(text, ts)[:, 0], text),
            **{f"flow matching, {n} steps": lambda n=n: peer.sample(text, torch.linspace(0, 1, n + 1))
               for n in (T, EULER_STEPS)}}
    return {name: {"images/s": batch_size / seconds} for name, seconds in medians(ways, device).items()}


def bench_cost(model, device):
    """Milliseconds per image of training and of sampling (without denoising), against T and N."""
    config, results = replace(model.config, first_noise=1.0), {}
    sizes = {f"T = {T}": replace(config, steps=T) for T in step_counts}
    sizes |= {f"N = {(size // config.patch_size) ** 2}": replace(config, image_size=size) for size in image_sizes}
    for name, sized in sizes.items():
        model, (_, text), ts = network(NTM, sized, device), inputs(sized, device), sized.time_grid(0.02).to(device)
        ways = {f"training, {kind}": training_step(NTM, replace(sized, pairs=kind == "pairs"), device)
                for kind in ("pairs", "trajectories")} | {"sampling": lambda: model.sample(text, ts)}
        results[name] = {f"{way}, ms": 1000 * s / batch_size for way, s in medians(ways, device).items()}
    return results


@one_line_errors()
def main(config):
    where = find_device(config["device"])
    if out_dir:
        model, _ = checkpoint.load_network(Path(out_dir) / "ckpt.pt", {"ntm": NTM}, where)
    else:
        of_model = NTMConfig.__dataclass_fields__.keys() & config.keys()
        model = network(NTM, NTMConfig(**{name: config[name] for name in of_model}), where)
    for size in image_sizes:
        replace(model.config, image_size=size)  # a wrong one is better known now than later
    cuda = where.type == "cuda"
    machine = torch.cuda.get_device_name(where) if cuda else f"{where.type}, {torch.get_num_threads()} threads"
    results = {"machine": machine, "torch": torch.__version__, "config": config}
    for measure in bench_training, bench_inversion, bench_sampling, bench_cost:
        title = measure.__name__.removeprefix("bench_")
        results[title] = measure(model, where)
        print(title)
        for name, row in results[title].items():
            figures = row.items() if isinstance(row, dict) else [("", row)]
            print(f"  {name:36}" + "".join(f"  {key} {value:.4g}" for key, value in figures))
    path = Path(out_dir or "out") / "bench.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1))
    print(f"wrote {path}")


if __name__ == "__main__":
    main(configure(globals()))
