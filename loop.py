"""The training loop that train.py and distill.py share: ranks, batches, schedule, guarded updates, nothing lost.

What is random in iteration i is drawn for the whole batch from (seed, i), and each rank takes its rows of it. So a run
does not depend on how many processes or accumulation steps share a batch, and a resumed run is the interrupted one.
"""

import contextlib
import copy
import json
import math
import signal
import time
from pathlib import Path

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from tqdm import tqdm

import checkpoint
from configurator import at_least_one, one_line_errors
from data import get_dataset, get_tokenizer
from flow import Layer
from model import null_caption
from pictures import dequantize
from ranks import all_sum, autocast, gathered, job, leave_ranks, restarts
from shards import Shards

PATIENCE = 10  # updates skipped in a row before a run gives up
HAS_MUON = hasattr(torch.optim, "Muon")  # torch 2.9 or newer


class Order:
    """Which examples each iteration sees: epoch after epoch, each shuffled anew. A batch sampler for DataLoader.

    Position p of the endless sequence is a function of (seed, p), so nothing about it needs saving. rows: those of the
    batch that a rank reads. again: what an example's number grows by with every epoch.
    """

    def __init__(self, size, batch_size, seed, start, stop, rows, again=0):
        self.size, self.batch_size, self.seed, self.rows, self.again = size, batch_size, seed, rows, again
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
                    permutation = torch.randperm(self.size, generator=shuffle, dtype=torch.int32)  # half of int64
                indices.append(epoch * self.again + permutation[position % self.size].item())
            yield indices


def collate(examples):
    """Images (B, C, H, W), B captions, and what was wrong with those that had to be replaced."""
    images, captions, *faults = zip(*examples)
    return torch.stack(images), list(captions), [fault for fault in (faults[0] if faults else ()) if fault]


def open_dataset(settings, split, data_dir=""):
    """The data set that a run's settings name; data_dir: where it is now, if not there any more."""
    of_shards = ("latent_scale", "crop", "flip") if settings["dataset"] == "shards" else ()
    return get_dataset(settings["dataset"], split, settings["image_size"], settings["channels"], settings["seed"],
                       data_dir or settings["data_dir"], **{name: settings[name] for name in of_shards})


def load_data(config):
    """The training and validation sets and the tokenizer that a run's settings name, once its counts are checked."""
    at_least_one(config, "batch_size", "grad_accum", "max_iters", "log_interval", "val_interval", "val_examples",
                 "num_samples")
    sets = [open_dataset(config, split) for split in ("train", "val")]
    return *sets, get_tokenizer(config["tokenizer"])


def validation_batches(dataset, tokenizer, text_len, count, device, rank=0, world=1, batch_size=100):
    """This rank's share of the first `count` examples: (images, text, captions, a generator that is always the same).

    Batches are dealt to ranks whole, so that sums over the ranks do not depend on how many there are.
    """
    count = min(count, len(dataset))
    for start in range(0, count, batch_size)[rank::world]:
        images, captions, _ = collate(dataset.__getitems__(list(range(start, min(start + batch_size, count)))))
        generator = torch.Generator(device).manual_seed(start)
        images = dequantize(images.to(device), generator) if dataset.eight_bit else images.to(device)
        yield images, tokenizer.encode(captions, text_len).to(device), captions, generator


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


@contextlib.contextmanager
def loading(dataset, order, workers, device):
    """The batches of an order, in turn; the workers that load them end with this context."""
    with one_line_errors():
        batches = iter(DataLoader(dataset, batch_sampler=order, collate_fn=collate, num_workers=workers,
                                  pin_memory=device.type == "cuda", worker_init_fn=leave_signals_to_the_trainer,
                                  # workers of a fresh interpreter would each run the script that we are in once more
                                  multiprocessing_context="fork" if workers else None))
    try:
        yield batches
    finally:
        if workers:  # Python would end them by SIGTERM, to which they are deaf, and wait for them for ever
            batches._shutdown_workers()


class Interrupt:
    """In its context, Ctrl-C and SIGTERM ask for an end after the current iteration; a second Ctrl-C ends at once."""

    def __enter__(self):
        self.asked = False
        self.before = {number: signal.signal(number, self.ask) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *error):
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def ask(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)


class Log:
    """out_dir/log.jsonl, one JSON object a line; on resuming, lines from after the checkpoint are dropped. With
    wandb_log, the same to Weights & Biases."""

    def __init__(self, path, start, config):
        self.path, self.wandb = path, None
        if config["wandb_log"]:
            try:
                import wandb
            except ImportError as error:
                raise ValueError("wandb_log needs wandb: `pip install wandb`, or leave wandb_log out") from error
            name = config["wandb_run_name"] or None
            self.wandb = wandb.init(project=config["wandb_project"], name=name, config=config)
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_text().splitlines(keepends=True) if start and path.exists() else []
        lines = [line for line in lines if line.endswith("\n") and json.loads(line)["iter"] <= start]
        path.write_text("".join(lines))
        # a run may have been killed between a checkpoint and its validation
        self.lacks_validation = bool(lines) and "loss" in json.loads(lines[-1])

    def write(self, **values):
        finite = {name: value if math.isfinite(value) else None for name, value in values.items()}  # JSON has no NaN
        with open(self.path, "a") as file:
            file.write(json.dumps(finite) + "\n")
        if self.wandb:
            self.wandb.log(finite, step=values["iter"])


STARTS = ("scratch", "resume", "auto")


def find_start(init_from, path, kind, device):
    """The checkpoint to continue from, or None to start anew, by init_from: "resume" continues, "auto" does so if
    there is something to continue, and so does whatever torchrun has restarted, if it wrote that itself. A checkpoint
    that is there is never overwritten by a run that starts anew."""
    if init_from not in STARTS:
        raise ValueError(f"init_from {init_from!r} is unknown: choose {', '.join(map(repr, STARTS))}")
    if init_from == "resume" or (path.exists() and (init_from == "auto" or max(gathered(restarts())))):
        contents = checkpoint.load(path, kind, device=device)
        if init_from == "scratch" and contents.get("job") != job():
            raise ValueError(f"{path} is of another job: continue it with --init_from=resume, or choose another "
                             "--out_dir")
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
    again = len(dataset) if isinstance(dataset, Shards) else 0  # which crop and flip anew in every epoch
    order = Order(len(dataset), batch_size, config["seed"], start, config["max_iters"], mine, again)
    with one_line_errors():
        log = Log(log_path, start, config) if rank == 0 else None
    generator, this_job = torch.Generator(device), job()

    def save(i):
        if rank == 0:
            checkpoint.save(path, kind=kind, model_config=checkpoint.config_dict(model.config), settings=config, iter=i,
                            model=model.state_dict(), ema=ema.state_dict(),
                            optimizers=[optimizer.state_dict() for optimizer in optimizers], job=this_job,
                            counts={"skipped": skipped, "unusable": counts["unusable"], "cut": counts["cut"]},
                            **(keep or {}))

    def check(i):
        values = validate(ema, i)
        if rank == 0:
            log.write(iter=i, **values)
            bar.write(f"iteration {i}: " + ", ".join(f"{name} {v:.4f}" for name, v in values.items()))

    def to_be_checked(i):
        return i % config["val_interval"] == 0 or i == config["max_iters"]

    before = {"skipped": 0, "unusable": 0, "cut": 0, **(resumed or {}).get("counts", {})}
    skipped, skipped_in_a_row = before["skipped"], 0
    faults, cut = [], 0  # of this rank since then: what was wrong with examples, and how many captions were too long
    counts = before
    with (Interrupt() as interrupt, loading(dataset, order, config["workers"], device) as batches,
          tqdm(total=config["max_iters"], initial=start, disable=rank > 0, unit="it", dynamic_ncols=True) as bar):
        if start and to_be_checked(start) and gathered(rank == 0 and log.lacks_validation)[0]:
            check(start)

        since, seen, waited = time.perf_counter(), 0, 0.0
        for i in range(start, config["max_iters"]):
            lr = learning_rate(config, i)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr

            # The batch, and all that is random about it: for the whole batch, of which this rank keeps its rows.
            with one_line_errors():
                asked_at = time.perf_counter()
                images, captions, new_faults = next(batches)
                waited += time.perf_counter() - asked_at
                cut -= tokenizer.cut
                text = tokenizer.encode(captions, model.config.text_len).to(device)
                cut, faults = cut + tokenizer.cut, faults + new_faults
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
                meet = world == 1 or chunk == passes - 1  # the gradients of the ranks, once an update
                with contextlib.nullcontext() if meet else network.no_sync():
                    with autocast(config, device):
                        parts = losses(network, images[rows], text[rows], [a[rows] for a in draws], i)
                    (parts["loss"] / passes).backward()
                for name, part in parts.items():
                    means[name] = means.get(name, 0) + torch.as_tensor(part, device=device).detach() / (passes * world)
            grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config["grad_clip"]).item()
            counts = {"asked": interrupt.asked, "unusable": len(faults), "cut": cut}  # to end; examples; captions
            sums = {**means, **{name: torch.tensor(float(count), device=device) for name, count in counts.items()}}
            sums = dict(zip(sums, all_sum(torch.stack(list(sums.values()))).tolist()))
            means, asked, loss = {name: sums[name] for name in means}, sums["asked"], sums["loss"]
            counts = {name: before[name] + int(sums[name]) for name in ("unusable", "cut")}

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
            spoilt = counts["unusable"] >= 10 and counts["unusable"] > config["bad_limit"] * i * batch_size
            finished = i == config["max_iters"] or asked or skipped_in_a_row == PATIENCE or spoilt
            validating = to_be_checked(i)
            if rank == 0 and (i % config["log_interval"] == 0 or finished or validating):
                seconds = time.perf_counter() - since
                rate, wait, since, seen, waited = seen / seconds, waited / seconds, time.perf_counter(), 0, 0.0
                logged = {"skipped": skipped, **counts}
                bar.set_postfix(loss=f"{loss:.3f}", images_per_s=f"{rate:.0f}", data_wait=f"{wait:.0%}",
                                **{name: count for name, count in logged.items() if count})
                log.write(iter=i, **means, lr=lr, grad_norm=grad_norm, images_per_s=round(rate, 1),
                          data_wait=round(wait, 3), **logged)
            if skipped_in_a_row == PATIENCE:
                raise SystemExit(f"loss or gradient was not finite {PATIENCE} times in a row (loss {loss}, gradient "
                                 f"norm {grad_norm}); stopped at iteration {i}, none of it in {path}: lower lr (now "
                                 f"{lr:.1e}) or grad_clip, or lengthen warmup_iters")
            if spoilt:
                save(i)
                named = "; ".join([fault for some in gathered(faults[:10]) for fault in some][:10])
                raise SystemExit(f"{counts['unusable']} of {i * batch_size} examples are unusable, more than "
                                 f"bad_limit {config['bad_limit']} allows; stopped at iteration {i}, which {path} "
                                 f"holds. The first are: {named}")
            if validating or finished:
                save(i)  # before the validation, so that nothing that goes wrong there costs the weights
            if validating:
                check(i)
                since, waited = time.perf_counter(), 0.0  # the rate is that of training
            if asked and i < config["max_iters"]:
                if rank == 0:
                    bar.write(f"interrupted: {path} holds iteration {i}; continue with --init_from=resume")
                break
        leave_ranks()
