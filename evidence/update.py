"""What an update of training costs: operations and bytes by count, the least time on a card, and where time goes.

    python -m evidence.update                          counts for the networks of speedrun.sh
    python -m evidence.update --width=256 --depth=8    or of another size
    python -m evidence.update config/t2i_fm.py config/t2i.py --batch_size=128    or for those of config files
    python -m evidence.update --profile=10             the time of ten updates by stage and by operator, on this device

Counts need neither the memory nor the time of what they count: tensors have shapes, but no values.
"""

import argparse
import time
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils import clip_grad_norm_
from torch.profiler import ProfilerActivity, profile, record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from beyond import CoupledNTM
from configurator import run_config
from fm import FlowMatching
from losses import TrainingLoss, draw_levels, losses_of_batch
from networks import NETWORKS, kind_of
from plumbing.optim import make_optimizers, update_average, update_weights
from plumbing.rng import randn
from plumbing.runtime import (
    autocast,
    find_device,
    for_training,
    in_bfloat16,
    one_line_errors,
    training_products,
)

ROOT = Path(__file__).parent.parent
SIZE = {"width": 384, "depth": 6, "heads": 6, "patch_size": 4}
# the networks of config/emoji64_fm.py and config/emoji64.py, but for their size
EMOJI64 = {"image_size": 64, "channels": 3, "vocab_size": 4055, "text_len": 16}
OF_NTM = {
    "transporter_blocks": 0,
    "rank": 24,
    "filters": 16,
    "logistics": 3,
    "shift": 2.0,
    "first_noise": 0.5,
    "parametrization": "posterior",
}
# the settings of the loss of config/emoji64.py, config/t2i.py and others like them
LOSS = {"max_t_min": 0.05, "pairs": True, "closed_form": False, "mirrored": True, "level_weight": 0.5,
        "velocity_weight": 1.0}
NO_LOSS_OF_NTM = {"mirrored": False, "level_weight": 0.0, "velocity_weight": 0.0}
COMPILE = {"layers": "layers", "whole": True, "no": False}
VOCABULARIES = {"emoji": 4055, "gpt2": 50259}
# FLOP/s and bytes/s of an H100. Measured: a product of 8192 x 8192 in bfloat16, and a copy in its memory. For float32,
# which training multiplies as TF32, the maker's figure.
H100 = {"bfloat16": 790e12, "float32": 395e12, "bytes/s": 3e12}
OF_WEIGHTS = 48  # bytes an update moves for each weight: weight, gradient, momentum, square and average in float32


class Cost(NamedTuple):
    """What an update costs. Operations are those of matrix products."""

    flop: float  # operations an image
    in_float32: float  # those of them in float32
    kept: float  # bytes an image that are kept for the backward pass
    muon: float  # Muon's operations an update, whatever the batch
    weights: int  # the number of weights

    def floor(self, batch, card):
        """Least seconds of an update of `batch` images: by operations, and by bytes."""
        coarse = (self.flop - self.in_float32 + self.muon / batch) / card["bfloat16"]
        moved = 2 * batch * self.kept + OF_WEIGHTS * self.weights  # what is kept is written once and read once
        return batch * (coarse + self.in_float32 / card["float32"]), moved / card["bytes/s"]


class Products(TorchDispatchMode):
    """A context that counts the operations of matrix products as FlopCounterMode does; count: {dtype: operations}."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **kwargs or {})
        count = flop_registry.get(function._overloadpacket)
        if count:
            first = result[0] if isinstance(result, tuple) else result
            self.count[first.dtype] += count(*args, **kwargs or {}, out_val=result)
        return result


def build(kind, config):
    """A network of a kind in networks.py; config: a dict that holds its fields, and may hold more."""
    network = NETWORKS[kind]
    known = {field.name for field in fields(network.config_class)}
    return network(network.config_class(**{name: value for name, value in config.items() if name in known}))


def of_config(path):
    """(kind, settings) of the network that a config file trains.

    A config file with an init_from "out/START/ckpt.pt" takes its network's size from START.py in the same folder.
    """
    path = Path(path)
    own = run_config(str(path))
    settings = run_config(str(ROOT / "train.py"))  # its defaults
    if "init_from" in own:
        trained = Path(own["init_from"]).parent.name
        settings |= run_config(str(path.with_name(f"{trained}.py")))
        settings |= {"objective": "ntm", "parametrization": "posterior"}
    settings |= own
    vocabulary = VOCABULARIES.get(settings["tokenizer"])
    if vocabulary:
        settings["vocab_size"] = vocabulary
    return kind_of(settings, is_sit=False), settings


class Update:
    """The parts of an update of a model, in the order in which train.py has them."""

    def __init__(self, model, average, batch, compiled=False, config=LOSS):
        """average: another of its kind, or the model itself. batch: images. compiled: as the setting of train.py.

        config: settings, of which those of the loss count; what it lacks is as in LOSS.
        """
        of_loss = {name: config.get(name, LOSS[name]) for name in LOSS}
        self.settings = of_loss | {"batch_size": batch, "bfloat16": None, "compile": compiled}
        if isinstance(model, FlowMatching):
            self.settings |= NO_LOSS_OF_NTM
        self.model = model
        self.batches = SimpleNamespace(rows=slice(None), randn=randn)  # of the one rank that there is
        device = next(model.parameters()).device
        self.network = for_training(TrainingLoss(model, self.settings), self.settings, device)
        self.noised = getattr(average, "noised", None)
        if isinstance(average, CoupledNTM):
            self.noised = for_training(average.noised_pairs, self.settings, device)

    def loss(self, images, text, generator=None):
        """The loss to differentiate, a scalar, at random noise levels."""
        with record_function("levels, coupling"):
            drawn = draw_levels(self.model, self.noised, images, text, self.settings, self.batches, generator)
        with record_function("forward"):
            return losses_of_batch(self.network, None, 0.0, images, text, *drawn)["minimised"]


def inputs(config, batch, device):
    """A batch of random images (B, channels, H, W) in [-1, 1], and of captions that are all alike, (B, L)."""
    images = torch.rand(batch, config.channels, *config.image_size, device=device) * 2 - 1
    return images, torch.ones(batch, config.text_len, dtype=torch.long, device=device)


def counted(kind, config, batch):
    """Of an update of `batch` images: Products.count, bytes kept for the backward pass, Muon's operations, weights."""
    kept = {}

    def keep(tensor):
        is_attention = tensor.dim() == 4 and tensor.shape[-1] == tensor.shape[-2]  # not kept by a fused kernel
        if not is_attention:
            storage = tensor.untyped_storage()
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with FakeTensorMode():
        model = build(kind, config)
        images, text = inputs(model.config, batch, "cpu")
        with Products() as products, saved_tensors_hooks(keep, lambda tensor: tensor):
            with torch.autocast("cpu", torch.bfloat16):
                loss = Update(model, model, batch, config=config).loss(images, text)
            loss.backward()
        optimizers = make_optimizers(model, "muon", 1e-4, torch.device("cpu"), bfloat16=True)
        with Products() as of_muon:
            update_weights(optimizers, 1e-4)
        weights = sum(weight.numel() for weight in model.parameters())
    return products.count, sum(kept.values()), sum(of_muon.count.values()), weights


def cost_of(kind, config):
    """The Cost of a network's update in bfloat16."""
    few, many = 20, 40
    count, kept, muon, weights = counted(kind, config, many)
    kept_of_few = counted(kind, config, few)[1]
    per_image = (kept - kept_of_few) / (many - few)  # without copies of the weights, which do not grow with the batch
    return Cost(sum(count.values()) / many, count[torch.float32] / many, per_image, muon, weights)


def matrix_product_rate(device, dtype):
    """FLOP/s of a large matrix product, by the median time of eight."""
    n = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    seconds = []
    for _ in range(8):
        start = clock(device)
        torch.mm(a, b)
        seconds.append(clock(device) - start)
    return 2 * n**3 / sorted(seconds)[len(seconds) // 2]


def clock(device):
    """The time in seconds, after waiting until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def updates(kind, config, batch, device, compiled):
    """A function that makes an update as train.py does, with Muon, and in bfloat16 on CUDA."""
    with device:
        model = build(kind, config)
        average = build(kind, config).requires_grad_(False)
    images, text = inputs(model.config, batch, device)
    parts = Update(model, average, batch, compiled if device.type == "cuda" else False, config)
    optimizers = make_optimizers(model, "muon", 1e-4, device, in_bfloat16(parts.settings, device))

    def update(i):
        with training_products(parts.settings, device):
            with autocast(parts.settings, device):
                loss = parts.loss(images, text)
            with record_function("backward"):
                loss.backward()
        with record_function("clipping, Muon, AdamW"):
            clip_grad_norm_(model.parameters(), 1.0)
            update_weights(optimizers, 1e-4)
        with record_function("average"):
            update_average(average, model, 0.999, i)
        model.zero_grad(set_to_none=True)

    return update


def print_counts(networks, batch):
    """Print what an update of each network costs, and its least time on an H100; networks: [(kind, config)]."""
    for kind, config in networks:
        cost = cost_of(kind, config)
        by_products, by_bytes = cost.floor(batch, H100)
        print(f"{kind}: {cost.weights / 1e6:.1f} million weights; an image takes {cost.flop / 1e9:.1f} GFLOP, "
              f"{cost.in_float32 / 1e9:.2f} of them in float32, and keeps {cost.kept / 1e6:.0f} MB; "
              f"Muon takes {cost.muon / 1e9:.0f} GFLOP an update")
        print(f"    an update of {batch} images on an H100: at least {1e3 * by_products:.1f} ms by products, "
              f"{1e3 * by_bytes:.1f} ms by bytes that are kept; "
              f"{batch / max(by_products, by_bytes):,.0f} images/s at most")


def print_profile(kind, config, batch, count, device, compiled):
    """Print how fast `count` updates are, and where their time goes, by stage and by operator."""
    start = clock(device)
    update = updates(kind, config, batch, device, compiled)
    for i in range(3):
        update(i)
    first = clock(device) - start
    start = clock(device)
    for i in range(count):
        update(i)
    speed = batch * count / (clock(device) - start)
    line = f"{kind}: {speed:,.1f} images/s on {device.type}, the first three updates after {first:.0f} s"
    if device.type == "cuda":
        rate = matrix_product_rate(device, torch.bfloat16)
        share = speed * cost_of(kind, config).flop / rate
        memory = torch.cuda.max_memory_allocated() / 1e9
        line += f"; {share:.0%} of the {rate / 1e12:.0f} TFLOP/s of a matrix product; {memory:.0f} GB"
    print(line)
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    with profile(activities=activities) as profiled:
        for i in range(count):
            update(i)
        clock(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=40))
    torch.compiler.reset()


@one_line_errors()
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m evidence.update", allow_abbrev=False,
                                     description="What an update of training costs.")
    parser.add_argument("config", nargs="*", help="config files; default: the networks of speedrun.sh")
    for name, value in SIZE.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"of speedrun.sh's networks; default: {value}")
    parser.add_argument("--batch_size", type=int, default=512)
    parser.add_argument("--profile", type=int, default=0, metavar="UPDATES", help="run and profile so many")
    parser.add_argument("--compile", default="layers", choices=["layers", "whole", "no"], help="how, on CUDA")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; default: the best there is")
    args = parser.parse_args(arguments)
    of_speedrun = EMOJI64 | OF_NTM | vars(args)
    networks = [of_config(path) for path in args.config] or [("fm", of_speedrun), ("coupled", of_speedrun)]
    if not args.profile:
        print_counts(networks, args.batch_size)
        return
    for kind, config in networks:
        print_profile(kind, config, args.batch_size, args.profile, find_device(args.device), COMPILE[args.compile])


if __name__ == "__main__":
    main()
