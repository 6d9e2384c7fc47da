"""The training loop that train.py and distill.py share: ranks, batches, schedule, guarded updates, nothing lost.

What is random in iteration i is drawn for the whole batch from (seed, i), and each rank takes its rows of it. So a run
does not depend on how many processes or accumulation steps share a batch, and a resumed run is the interrupted one.
"""

import contextlib
import copy
import json
import math
import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
from data import dequantize, get_dataset, get_tokenizer
from flow import Layer
from model import null_caption

PATIENCE = 10  # updates skipped in a row before a run gives up
HAS_MUON = hasattr(torch.optim, "Muon")  # torch 2.9 or newer


@contextlib.contextmanager
def one_line_errors():
    """Turns what a setting can be wrong about (ValueError, OSError) into one line and exit status 1."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def find_device(name=""):
    """The device called `name`, or the best there is: cuda, else mps, else cpu. Raises ValueError if it is absent."""
    best = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {name!r} is not available here: leave it out for {best!r}") from error
    return device


def at_least_one(config, *names):
    """Raises ValueError for a setting among `names` that counts something and is below 1."""
    for name in names:
        if config[name] < 1:
            raise ValueError(f"{name} is {config[name]}, but must be at least 1")


def start_ranks(device_name=""):
    """Joins the other processes under torchrun (gloo on CPU, nccl on CUDA); alone, there is nothing to join.

    Returns device, rank, world size.
    """
    device = find_device(device_name)
    if "RANK" not in os.environ:
        return device, 0, 1
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, dist.get_rank(), dist.get_world_size()


def autocast(config, device):
    """The precision of the networks. On CUDA bfloat16; on CPUs float32, which was faster for models this small: most
    of their time is not in the matrix products, and casting back and forth cost more than those gained."""
    bfloat16 = device.type == "cuda" if config["bfloat16"] is None else config["bfloat16"]
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=bfloat16)


class Order:
    """Which examples each iteration sees: epoch after epoch, each shuffled anew. A batch sampler for DataLoader.

    Position p of the endless sequence is a function of (seed, p), so nothing about it needs saving.
    """

    def __init__(self, size, batch_size, seed, start, stop, rows):
        self.size, self.batch_size, self.seed, self.rows = size, batch_size, seed, rows
        self.iterations = range(start, stop)

    def __len__(self):
        return len(self.iterations)

    def __iter__(self):
        epoch = None
        for i in self.iterations:
            indices = []
            for position in range(i * self.batch_size + self.rows.start, i * self.batch_size + self.rows.stop):
                if epoch != position // self.size:
                    epoch = position // self.size
                    shuffle = torch.Generator().manual_seed(self.seed + epoch)
                    permutation = torch.randperm(self.size, generator=shuffle)
                indices.append(permutation[position % self.size].item())
            yield indices


def collate(examples):
    images, captions = zip(*examples)
    return torch.stack(images), list(captions)


def load_data(config):
    """The training and validation sets and the tokenizer that a run's settings name, once its counts are checked."""
    at_least_one(config, "batch_size", "grad_accum", "max_iters", "log_interval", "val_interval", "val_examples",
                 "num_samples")
    arguments = [config[name] for name in ("image_size", "channels", "seed", "data_dir", "latent_scale")]
    sets = [get_dataset(config["dataset"], split, *arguments) for split in ("train", "val")]
    return *sets, get_tokenizer(config["tokenizer"])


def validation_batches(dataset, tokenizer, text_len, count, device, rank=0, world=1, batch_size=100):
    """This rank's share of the first `count` examples: (images, text, captions, a generator that is always the same).

    Batches are dealt to ranks whole, so that sums over the ranks do not depend on how many there are.
    """
    count = min(count, len(dataset))
    for start in range(0, count, batch_size)[rank::world]:
        images, captions = collate(dataset.__getitems__(list(range(start, min(start + batch_size, count)))))
        generator = torch.Generator(device).manual_seed(start)
        images = dequantize(images.to(device), generator) if dataset.eight_bit else images.to(device)
        yield images, tokenizer.encode(captions, text_len).to(device), captions, generator


last_sum = []  # the handle of the last all_sum


def all_sum(tensor):
    """The sum over all ranks, in place."""
    if dist.is_initialized():
        # Whoever drops the last handle lets go of the tensor, for which it needs Python. Were it one of gloo's threads,
        # and the interpreter ending meanwhile, the process would abort; so this one is kept until the next sum.
        last_sum[:] = [dist.all_reduce(tensor, async_op=True)]
        last_sum[0].wait()
    return tensor


def learning_rate(config, i):
    """Linear warm-up to lr, then a cosine to min_lr at max_iters."""
    if i < config["warmup_iters"]:
        return config["lr"] * (i + 1) / config["warmup_iters"]
    progress = (i - config["warmup_iters"]) / max(1, config["max_iters"] - config["warmup_iters"])
    return config["min_lr"] + (config["lr"] - config["min_lr"]) * 0.5 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def update_average(ema, model, decay, i):
    """Exponential moving average of the weights; the first iterations are forgotten faster than `decay` would."""
    for average, parameter in zip(ema.parameters(), model.parameters()):
        average.lerp_(parameter, 1 - min(decay, (1 + i) / (10 + i)))


def make_optimizers(model, config, device):
    """A list: AdamW for all weights, or with optimizer="muon" Muon for the Transformer layers' matrices and AdamW for
    the rest: at equal time it went much further on every picture set here.

    Raises ValueError for another name, or where torch has no Muon.
    """
    name, adamw = config["optimizer"], list(model.parameters())
    if name not in ("adamw", "muon"):
        raise ValueError(f"optimizer {name!r} is unknown: choose 'adamw' or 'muon'")
    optimizers = []
    if name == "muon":
        if not HAS_MUON:
            raise ValueError(f"optimizer 'muon' needs torch 2.9 or newer, this is {torch.__version__}: choose 'adamw'")
        hidden = [module.weight for parent in model.modules() if isinstance(parent, Layer)
                  for module in (parent.attention.qkv, parent.attention.out, parent.mlp[0], parent.mlp[2])]
        muon = {id(weight) for weight in hidden}
        adamw = [parameter for parameter in adamw if id(parameter) not in muon]
        # scaled so that one learning rate serves both
        optimizers = [torch.optim.Muon(hidden, weight_decay=config["weight_decay"], adjust_lr_fn="match_rms_adamw")]
    fused = device.type in ("cuda", "cpu")
    return optimizers + [torch.optim.AdamW(adamw, betas=(0.9, 0.95), weight_decay=config["weight_decay"], fused=fused)]


def leave_signals_to_the_trainer(worker):
    """A terminal's Ctrl-C reaches the data workers too; they must outlive the update that it interrupts."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


class Interrupt:
    """Ctrl-C and SIGTERM ask for an end after the current iteration; a second Ctrl-C ends at once."""

    def __init__(self):
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.ask)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Log:
    """out_dir/log.jsonl, one JSON object a line; on resuming, lines from after the checkpoint are dropped."""

    def __init__(self, path, start):
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
        path.write_text("".join(line for line in lines if line.endswith("\n") and json.loads(line)["iter"] <= start))

    def write(self, **values):
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with open(self.path, "a") as file:
            file.write(json.dumps(finite) + "\n")


STARTS = ("scratch", "resume", "auto")


def find_start(init_from, path, kind, device):
    """The checkpoint to continue from, or None to start anew, by init_from: "resume" continues, "auto" does so if
    there is something to continue. A checkpoint that is there is never overwritten by a run that starts anew."""
    if init_from not in STARTS:
        raise ValueError(f"init_from {init_from!r} is unknown: choose {', '.join(map(repr, STARTS))}")
    if init_from == "resume" or (init_from == "auto" and path.exists()):
        contents = checkpoint.load(path, kind, device=device)
        if "optimizers" not in contents:
            raise ValueError(f"{path} holds what sampling needs and no more: it cannot be resumed")
        return contents
    if path.exists():
        raise ValueError(f"{path} is there already: continue it with --init_from=resume, or choose another --out_dir")
    return None


def fit(config, kind, model, dataset, tokenizer, draw, losses, validate, ranks, resumed=None, keep=None):
    """Train `model`, writing checkpoints, log and samples into out_dir.

    config: the script's settings. kind: "ntm", "fm" or "denoiser", what its checkpoint is.
    draw(batch, device, generator): what is random in a batch, a tuple of tensors with one row an example.
    losses(network, images, text, draws, i): {name: number} of iteration i to log, of which "loss", a scalar tensor, is
        minimised; network is `model`, compiled and wrapped.
    validate(ema, i): what to log about the averaged model, {name: number}; runs on all ranks.
    ranks: device, rank, world as from start_ranks(). resumed: the checkpoint to continue, as from find_start().
    keep: what else belongs into the checkpoint, a dict.
    """
    device, rank, world = ranks
    config = {**config, "optimizer": config["optimizer"] or ("muon" if HAS_MUON else "adamw")}
    path = Path(config["out_dir"]) / ("denoiser.pt" if kind == "denoiser" else "ckpt.pt")
    log_path = path.with_name("denoiser_log.jsonl" if kind == "denoiser" else "log.jsonl")
    batch_size, passes = config["batch_size"], config["grad_accum"]
    with one_line_errors():
        if batch_size % (world * passes):
            raise ValueError(f"batch_size {batch_size} is not divisible by {world} ranks x grad_accum {passes}")
        optimizers = make_optimizers(model, config, device)

    ema = copy.deepcopy(model).eval().requires_grad_(False)
    start = 0
    if resumed:
        fixed = ("optimizer", "t_min", "steps") if kind == "denoiser" else ("optimizer",)
        theirs = {**resumed["model_config"], **{name: resumed["settings"].get(name) for name in fixed}}
        ours = {**checkpoint.config_dict(model.config), **{name: config[name] for name in fixed}}
        if theirs != ours:
            raise checkpoint.CheckpointError(f"{path} is of another model: " + ", ".join(
                f"{name} is {theirs.get(name)}, the settings say {value}"
                for name, value in ours.items() if theirs.get(name) != value))
        checkpoint.restore(model, resumed["model"], path)
        checkpoint.restore(ema, resumed["ema"], path)
        for optimizer, state in zip(optimizers, resumed["optimizers"]):
            optimizer.load_state_dict(state)
        start = resumed["iter"]

    compiled = device.type == "cuda" if config["compile"] is None else config["compile"]
    network = torch.compile(model) if compiled else model
    if world > 1:
        network = DistributedDataParallel(network, device_ids=[device.index] if device.type == "cuda" else None)

    share = batch_size // world
    mine = range(rank * share, (rank + 1) * share)  # this rank's rows of every batch
    order = Order(len(dataset), batch_size, config["seed"], start, config["max_iters"], mine)
    with one_line_errors():
        loader = iter(DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=config["workers"],
                                 pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer))
        log = Log(log_path, start) if rank == 0 else None
    generator = torch.Generator(device)
    interrupt = Interrupt()
    bar = tqdm(total=config["max_iters"], initial=start, disable=rank > 0, unit="it", dynamic_ncols=True)

    def save(i):
        if rank == 0:
            checkpoint.save(path, kind=kind, model_config=checkpoint.config_dict(model.config), settings=config, iter=i,
                            model=model.state_dict(), ema=ema.state_dict(),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers], **(keep or {}))

    skipped = skipped_in_a_row = 0
    since, seen = time.perf_counter(), 0
    for i in range(start, config["max_iters"]):
        lr = learning_rate(config, i)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr

        # The batch, and all that is random about it: for the whole batch, of which this rank keeps its rows.
        with one_line_errors():
            images, captions = next(loader)
            text = tokenizer.encode(captions, model.config.text_len).to(device)
        generator.manual_seed(config["seed"] * 1_000_003 + i)
        images = images.to(device, non_blocking=True)
        if dataset.eight_bit:
            shape = (batch_size, *images.shape[1:])
            images = images + dequantize(torch.zeros(shape, device=device), generator)[mine.start:mine.stop]
        dropped = torch.rand(batch_size, 1, generator=generator, device=device) < config["caption_dropout"]
        text = torch.where(dropped[mine.start:mine.stop], null_caption(text), text)
        draws = [a[mine.start:mine.stop] for a in draw(batch_size, device, generator)]

        means = {}  # of the losses, over accumulation passes and ranks
        for chunk, rows in enumerate(torch.arange(share, device=device).chunk(passes)):
            last = chunk == passes - 1
            with contextlib.nullcontext() if last or world == 1 else network.no_sync():  # gradients meet once an update
                with autocast(config, device):
                    parts = losses(network, images[rows], text[rows], [a[rows] for a in draws], i)
                (parts["loss"] / passes).backward()
            for name, part in parts.items():
                means[name] = means.get(name, 0) + torch.as_tensor(part, device=device).detach() / (passes * world)
        grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"]).item()
        means["asked"] = torch.tensor(float(interrupt.asked), device=device)
        means = dict(zip(means, all_sum(torch.stack(list(means.values()))).tolist()))
        loss, asked = means["loss"], means.pop("asked")

        # Every rank has the same loss and gradient, so all of them skip an update or none does.
        if math.isfinite(loss) and math.isfinite(grad_norm):
            for optimizer in optimizers:
                optimizer.step()
            update_average(ema, model, config["ema"], i)
            skipped_in_a_row = 0
        else:
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
        model.zero_grad(set_to_none=True)

        i += 1  # iterations done
        seen += batch_size
        bar.update()
        finished = i == config["max_iters"] or asked or skipped_in_a_row == PATIENCE
        validating = i % config["val_interval"] == 0 or i == config["max_iters"]
        if rank == 0 and (i % config["log_interval"] == 0 or finished or validating):
            rate, since, seen = seen / (time.perf_counter() - since), time.perf_counter(), 0
            bar.set_postfix(loss=f"{loss:.3f}", images_per_s=f"{rate:.0f}", **({"skipped": skipped} if skipped else {}))
            log.write(iter=i, **means, lr=lr, grad_norm=grad_norm, images_per_s=round(rate, 1), skipped=skipped)
        if skipped_in_a_row == PATIENCE:
            bar.close()
            raise SystemExit(f"loss or gradient was not finite {PATIENCE} times in a row (loss {loss}, gradient norm "
                             f"{grad_norm}); stopped at iteration {i}, none of it in {path}: lower lr (now {lr:.1e}) "
                             "or grad_clip, or lengthen warmup_iters")
        if validating or finished:
            save(i)  # before the validation, so that nothing that goes wrong there costs the weights
        if validating:
            values = validate(ema, i)
            if rank == 0:
                log.write(iter=i, **values)
                bar.write(f"iteration {i}: " + ", ".join(f"{name} {v:.4f}" for name, v in values.items()))
            since = time.perf_counter()  # the rate is that of training
        if asked and i < config["max_iters"]:
            bar.close()
            if rank == 0:
                print(f"interrupted: {path} holds iteration {i}; continue with --init_from=resume")
            break
    bar.close()
    if dist.is_initialized():
        dist.barrier()  # nobody hangs up on a rank that is still talking
        dist.destroy_process_group()
