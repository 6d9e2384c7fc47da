"""Trains a Normalizing Trajectory Model; without arguments, on handwritten digits, minutes on a CPU.

    python train.py config/shapes.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/t2i.py
    python train.py --out_dir=out/shapes --resume=yes                # goes on, with the settings of the checkpoint
    python train.py config/digits_fm.py                              # flow matching instead: the baseline
    python train.py config/digits_tune.py --resume=auto              # an NTM from it; sent again, it goes on
    python train.py config/sit.py --init_from=sit:SiT-XL-2-256.pt    # or from published weights

Leaves in out_dir: ckpt.pt, log.jsonl, log.png and, from every validation, samples/ITERATION.png.
"""

import copy
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from configurator import configure
from data import get_tokenizer, open_dataset
from flow import forward_trajectory
from fm import FlowMatching
from model import NTM, NTMConfig
from plumbing import checkpoint
from plumbing.images import contact_sheet
from plumbing.latents import load_decoder
from plumbing.loader import Batches, examine, validation_batches
from plumbing.lock import lock_folder
from plumbing.log import Progress
from plumbing.optim import learning_rate, make_optimizers, step, update_average
from plumbing.runtime import (alike, all_sum, all_sums, autocast, coarse_products, exact_products, for_training,
                              gathered, gradients_meet, in_bfloat16, job, leave_ranks, note, one_line_errors,
                              start_ranks)
from plumbing.settings import check_objective
from plumbing.shards import find_shards, first_example

# ---- run
out_dir = "out/digits"
objective = "ntm"  # or "fm": flow matching, with the same network
init_from = "scratch"  # or a ckpt.pt of flow matching or of an NTM; or sit:PATH, published weights
resume = "no"  # "yes": continue out_dir/ckpt.pt, wherever it started from; "auto": if there is one
seed = 0  # with the iteration, all of a run's randomness
device = ""  # cuda, mps or cpu; empty: the best there is
bfloat16: bool | None = None  # autocast; None: on CUDA only
compile: bool | None = None  # torch.compile; None: on CUDA only
workers = 0  # processes that load data, per rank; 0: load in the training process

# ---- data
dataset = "digits"
data_dir = ""  # which shards: a folder, a glob, or NAME-{00000..00099}.tar; or where fashion's files are
crop = "center"  # of the shards' images that are not square; or "random"
flip = False  # mirror images of the shards at random, half of them
latent_scale = 0.0  # what latents are multiplied by; 0: what `data.py encode` measured. SiT's want 0.18215
bad_limit = 0.01  # the fraction of unusable examples, replaced by others, at which a run stops
bad_captions = 0.1  # the fraction of captions, cut or in bytes for want of words, above which a run does not start
image_size: int | tuple = 8
channels = 1
tokenizer = "captions"  # or "emoji", "gpt2", a file NAME.tiktoken; or "classes": captions are "class 0" to "class 999"
text_len = 4  # caption tokens; longer captions are cut
caption_dropout = 0.1  # fraction of captions replaced by the null caption, which guidance needs

# ---- model
patch_size = 2
width = 96  # of the predictor, as depth and heads
depth = 4  # 0: no predictor, which with steps 1 and a deep transporter is TarFlow
heads = 4
transporter_width = 64
transporter_blocks = 3  # 0: no transporter, the plain Gaussian step of a diffusion model
transporter_layers = 2  # in each block
transporter_heads = 2
steps: int | tuple = 4  # T; a tuple of several makes one model for all of them
shift: float | None = 0.5  # e^m of the time grid, low for toy pictures; None: from the number of tokens
max_t_min = 0.05  # training has t_0 uniform below this
rank = 0  # directions along which a step's Gaussian is correlated; 0, the paper's: none
pairs = True  # train on one random step of each trajectory instead of all T
level_weight = 0.0  # p: a step that ends at noise level s counts s^p, which balances their gradients; 0, the paper's: 1
first_noise = 1.0  # c: how much of x_1 is fresh noise; the rest follows from the next cleaner level
closed_form = False  # a first stage, without a transporter: the expected loss, whose gradients have less noise
velocity_weight = 0.0  # then, of flow matching's loss beside it, so that the means stay as good as flow matching's
aux_weight = 2.5  # weight of staying close to the flow-matching model it starts from; goes to 0 by a cosine

# ---- optimisation
batch_size = 64  # examples per update, over all ranks and accumulation passes
grad_accum = 1  # passes per update and rank
max_iters = 2000
optimizer = "muon"  # or "adamw"
lr = 5e-3  # for muon; adamw wants about 2e-3
words_lr = 1.0  # times lr, of the words' embeddings: where most words are rare, 25 learns them sooner
min_lr = 1e-6
warmup_iters = 100
weight_decay = 1e-4
grad_clip = 1.0
ema = 0.999  # decay of the averaged weights that sampling uses

# ---- log
log_interval = 50
val_interval = 500  # iterations between validations, each with a sheet of samples and a checkpoint
save_minutes = 15.0  # a checkpoint after so many minutes without one, too; 0: those of validations alone
keep = 1  # checkpoints of validations that stay, as ckpt_000500.pt and so on; 1: ckpt.pt alone, the newest
val_examples = 297
t_min = 0.02  # where validation's trajectories and its samples end
num_samples = 25  # on the sheet
decoder = ""  # of latents, for the sheet: a program saved by torch.export, latents (B, C, h, w) to images in [-1, 1]
chunk = 0  # examples that are validated or score-denoised at once; 0: what fits into about 4 GB
wandb_log = False  # the log and the sheets to Weights & Biases as well

NETWORKS = {"ntm": NTM, "fm": FlowMatching}
RENAMED = {"resume": "--resume=yes", "auto": "--resume=auto"}  # what init_from could be in older versions
NETWORK = ("image_size", "channels", "patch_size", "text_len", "width", "depth", "heads", "tokenizer")
TRANSPORTER = ("transporter_width", "transporter_blocks", "transporter_layers", "transporter_heads")

# ---------------------------------------------------------------------------------------------------------------
# What a run starts from


def starting_point(name, device, heads=None):
    """The trained network that init_from names, sit:PATH or the path of a checkpoint of flow matching or of an NTM;
    what it decides about an NTM that starts from it, {setting: value}; and its vocabulary, if it holds one. heads: of
    a SiT of another width than the published ones."""
    if name.startswith("sit:"):
        from plumbing.sit import load_sit
        network = load_sit(name.removeprefix("sit:"), heads)
        decided = {key: getattr(network, key) for key in NETWORK if hasattr(network, key)}
        decided |= {"predictor": "sit", "tokenizer": f"classes:{network.classes}", "text_len": 1}
        return network, decided | {"parametrization": "posterior"}, None
    if not Path(name).exists():
        raise ValueError(f"init_from {name!r} is neither 'scratch', sit:PATH nor a file: train the model there first; "
                         "a run is continued by --resume=yes, or auto")
    network, trained = checkpoint.load_network(name, NETWORKS, device)
    decided, vocabulary = {key: trained["settings"][key] for key in NETWORK}, trained.get("vocabulary")
    if trained["kind"] == "fm":
        return network, decided | {"parametrization": "posterior", "predictor": "captions"}, vocabulary
    kept = TRANSPORTER if network.config.transporter_blocks else ()  # what has no transporter may be given one
    kept += ("first_noise",) if network.config.first_noise < 1 else ()
    decided |= {key: getattr(network.config, key) for key in ("parametrization", "predictor", "rank", *kept)}
    return network, decided | {"aux_weight": 0.0}, vocabulary  # there is no flow-matching model to stay close to


def start(config, device):
    """Settles the settings by what the run starts from: a trained network, a checkpoint that it continues, or nothing.

    Returns network, contents of the checkpoint, and vocabulary, None for what there is not.
    """
    path, init_from = Path(config["out_dir"]) / "ckpt.pt", config["init_from"]
    if init_from in RENAMED:
        raise ValueError(f"init_from {init_from!r} is now a setting of its own: write {RENAMED[init_from]}")
    resumed = checkpoint.find_start(config["resume"], path, *NETWORKS)
    if resumed:
        checkpoint.keep_settings(config, resumed)
        origin = resumed["settings"].get("init_from", "scratch")
        if origin in RENAMED:  # an older version forgot the start of what it resumed
            origin = init_from
        if "init_from" in config.given and origin != init_from:
            note(f"{path} continues, which started from {origin}, not from {init_from}")
        config["init_from"] = origin
        config |= {name: resumed["model_config"][name] for name in ("parametrization", "predictor")}
        return None, resumed, resumed.get("vocabulary")
    if init_from == "scratch":
        if config["dataset"] == "shards" and not {"image_size", "channels"} <= config.given:
            size = "x".join(map(str, first_example(find_shards(config["data_dir"], "train")[0])[1]))
            raise ValueError(f"shards need image_size and channels: their first example is {size} (channels, height, "
                             "width), of which latents keep the size and images take any")
        return None, None, None
    if config["objective"] == "fm":
        raise ValueError("only an NTM starts from another model: leave objective or init_from out")
    heads = config["heads"] if "heads" in config.given else None
    base, decided, vocabulary = starting_point(init_from, device, heads)
    decided["rank"] = max(decided.get("rank", 0), config["rank"])  # directions may be added, not taken away
    in_full = lambda value: (value, value) if type(value) is int else value  # an image size may be a square's side
    for key in config.given & decided.keys():
        if in_full(config[key]) != in_full(decided[key]):
            raise ValueError(f"{key} is {config[key]!r}, but {init_from} decides it, {decided[key]!r}: leave it out")
    config |= decided
    return base, None, vocabulary


# ---------------------------------------------------------------------------------------------------------------
# Losses


def training_losses(network, frozen, images, text, randomness, config, i):
    """{name: number} of iteration i, of which "objective" is minimised if there is one, else "loss": -log p and what
    stays close to `frozen`, or the error of the velocity, per dimension. "loss" has no level_weight or velocity_weight.

    frozen: the flow-matching model that an NTM started from, whose means it is to stay close to, or None. Equations
    (16), (22), (26), (30) and (31) of docs/method.md.
    """
    if not (frozen or config["level_weight"] or config["velocity_weight"]):
        return {"loss": network(images, text, randomness)}
    (steps, ts, noise), target = randomness, None
    if frozen:
        with torch.no_grad(), coarse_products(steps.device):
            x = forward_trajectory(frozen.patchify(images), ts, noise=noise)
            target = frozen.gaussians(x, ts, text, steps).mean
    parts = network(images, text, randomness, target, parts=True)
    weight = config["aux_weight"] * 0.5 * (1 + math.cos(math.pi * i / config["max_iters"])) if frozen else 0.0
    aux = weight * parts["aux"] if frozen else 0.0
    return {"objective": parts.pop("objective") + aux, "loss": parts["nll"] + aux, **parts,
            "aux_weight": parts["nll"].new_full((), weight)}


@torch.no_grad()
def validate(ema, batches, ts, config):
    """What to log about the averaged model on held-out data, nats per dimension: val_step_k, -log p of each step of a
    trajectory, cleanest first, their mean val_loss, and val_bound, the upper bound on -log p(x_{t_min}), which unlike
    the loss does not depend on the time grid ts (T+1,). Of flow matching val_loss, the velocity's squared error. All of
    it is measured in float32, as by evaluate.py, whatever the run trains in."""
    sums = torch.zeros(len(ts) + 1 if isinstance(ema, NTM) else 2, device=ts.device)  # over examples
    for images, text, _, generator in batches:
        with exact_products(ts.device):
            if isinstance(ema, NTM):
                times = ts.expand(len(images), -1)
                x = forward_trajectory(ema.patchify(images), times, generator)
                chunk = config["chunk"] or ema.config.examples_at_once(len(ts) - 1, gradients=False)
                nll, bound = map(torch.cat, zip(*(ema.trajectory_bound(*part) for part in zip(
                    x.split(chunk), times.split(chunk), text.split(chunk)))))
                values = torch.cat([nll[:, :-1], bound[:, None]], dim=1) / images[0].numel()
            else:
                values = ema(images, text, ema.randomness(len(images), ts.device, generator)).expand(len(images), 1)
        sums += torch.cat([values, torch.ones_like(values[:, :1])], dim=1).sum(dim=0)
    *means, _ = (all_sum(sums) / sums[-1]).tolist()
    if not isinstance(ema, NTM):
        return {"val_loss": means[0]}
    *nll, bound = means
    return {"val_loss": sum(nll) / len(nll), "val_bound": bound, **{f"val_step_{k}": v for k, v in enumerate(nll)}}


def sample_images(ema, text, ts, generator, chunk=0):
    """Samples for captions, always from the same noise; an NTM's are score-denoised, `chunk` of them at once."""
    if not isinstance(ema, NTM):
        return ema.unpatchify(ema.sample(text, generator=generator)[:, 0])
    x = ema.invert(ema.sample(text, ts, generator=generator), ts)
    return ema.unpatchify(ema.score_denoise(x, ts, text, chunk))


# ---------------------------------------------------------------------------------------------------------------
# The run


def main(config):
    with one_line_errors():
        ranks = start_ranks(config["device"])
        lock = lock_folder(config["out_dir"])
    with lock:
        train(config, ranks)


def train(config, ranks):
    device, rank, world = ranks
    with one_line_errors():
        base, resumed, vocabulary = start(config, device)
        check_objective(config, NETWORKS)
        train_set, val_set = (open_dataset(config, split) for split in ("train", "val"))
        tokenizer = get_tokenizer(config["tokenizer"], vocabulary)
        if config["dataset"] == "shards" and train_set.latent:  # for whoever decodes what the model samples
            config["latents"] = {"mean": train_set.mean.flatten().tolist(), "scale": train_set.scale.flatten().tolist()}
        decode = load_decoder(config, device) if config["decoder"] else None
        model_config = NTMConfig(vocab_size=tokenizer.vocab_size, **{
            name: config[name] for name in NTMConfig.__dataclass_fields__ if name in config})
        ts = model_config.time_grid(config["t_min"]).to(device)
        path = Path(config["out_dir"]) / "ckpt.pt"

        torch.manual_seed(config["seed"])  # the same initial weights on every rank
        model, frozen = NETWORKS[config["objective"]](model_config).to(device), None
        if model_config.parametrization == "posterior" and config["aux_weight"]:
            frozen = NTM(replace(model_config, transporter_blocks=0)).to(device).requires_grad_(False).eval()
            if resumed and "frozen" not in resumed:
                raise ValueError(f"{path} was trained with aux_weight 0: resume it with --aux_weight=0")
        if isinstance(base, NTM):
            model.go_on_from(base)
        elif base:
            base.hand_over(model.predictor)
        if frozen:
            frozen.predictor.load_state_dict(resumed["frozen"] if resumed else model.predictor.state_dict())
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        optimizers = make_optimizers(model, config["optimizer"], config["weight_decay"], device,
                                     in_bfloat16(config, device), words_lr=config["words_lr"])
        if resumed:
            checkpoint.resume(resumed, path, model, ema, optimizers, config, "objective", "optimizer", "tokenizer")
        kept = resumed or {}
        first, counts, words = kept.get("iter", 0), kept.get("counts", {}), kept.get("words", ())
        alike(model, ema, *filter(None, [frozen]))
        base = resumed = kept = None  # whose weights would stay in memory as long as the run
        notes = examine(train_set, val_set, tokenizer, model_config.text_len, config["bad_captions"])
        batches = Batches(train_set, tokenizer, model_config.text_len, config, first, ranks, words)
        progress = Progress(path, "log.jsonl", config, first, counts, rank)

    network = for_training(model, config, device)
    couple = for_training(ema.couple, config, device) if model_config.first_noise < 1 else None
    if rank == 0:
        describe(model, config, train_set, f"{world} x {device.type}", first)
        for line in notes:
            print(line)

    def save(i):
        words = sorted(set().union(*gathered(batches.words)))  # of all captions so far, for whoever writes prompts
        if rank == 0:
            checkpoint.save(path, kind=config["objective"], model=model, ema=ema, optimizers=optimizers, iter=i,
                            settings=config, vocabulary=tokenizer.vocabulary, words=words, job=job(),
                            counts=progress.counts,
                            **({"frozen": frozen.predictor.state_dict()} if frozen else {}))

    def check(i):
        """Validates the averaged model, and leaves samples for held-out captions."""
        held_out = val_set, tokenizer, model_config.text_len
        if rank == 0:
            with progress.a_sheet(i):
                count = config["num_samples"]
                _, text, captions, generator = next(validation_batches(*held_out, count, device, batch_size=count))
                images = sample_images(ema, text, ts, generator, config["chunk"])
                sheet = contact_sheet(decode(images) if decode else images, captions)
                progress.show(i, sheet, path.parent / "samples" / f"{i:06d}.png")
        of_this_rank = validation_batches(*held_out, config["val_examples"], device, rank, world,
                                          bad_limit=config["bad_limit"])
        progress.validated(i, validate(ema, of_this_rank, ts, config))

    with batches.interrupt, batches, progress:
        if progress.validation_missing():
            check(first)
        for i in range(first, config["max_iters"]):
            # The batch, and all that is random about it: sampled for the whole batch, of which a rank keeps its rows.
            images, text, generator = next(batches)
            randomness = model.randomness(config["batch_size"], device, generator, batches.rows, batches.randn)
            if couple:
                with autocast(config, device):
                    couple(images, text, randomness)

            # Forward and backward, in as many passes as memory needs; the ranks' gradients meet in the last one.
            losses = Counter()
            for k, (images, text, *randomness) in enumerate(batches.chunks(images, text, *randomness), 1):
                with gradients_meet(network, k == batches.passes):
                    with autocast(config, device):
                        parts = training_losses(network, frozen, images, text, randomness, config, i)
                    (parts.get("objective", parts["loss"]) / batches.passes).backward()
                for name, part in parts.items():
                    losses[name] += part.detach() / (batches.passes * world)

            # Clip the gradient, and guard: every rank has the same numbers, so all of them skip an update or none does.
            grad_norm = clip_grad_norm_(model.parameters(), config["grad_clip"]) / world
            asked = {"asked": batches.must_end(), **progress.asks()}
            totals = all_sums({**losses, "grad_norm": grad_norm, **asked, **batches.counts}, device)
            losses = {name: totals[name] for name in losses}
            finite = math.isfinite(losses["loss"]) and math.isfinite(totals["grad_norm"])

            # Step, and average.
            lr = learning_rate(config, i)
            if finite:
                step(optimizers, lr)
                update_average(ema, model, config["ema"], i)
            model.zero_grad(set_to_none=True)

            # Log, save, validate; leave where an end was asked for.
            totals["skipped"] = not finite
            if progress.ends(i + 1, losses, lr, totals, batches, save, check):
                break
        leave_ranks()


def describe(model, config, train_set, where, first):
    """Says what is about to be trained, on what, and from where: iteration `first` of a run that continues."""
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    parts = ", ".join(f"{name} {size:.2f}M" for name, size in sizes.items())
    print(f"{sum(sizes.values()):.2f}M parameters ({parts}); {len(train_set):,} examples; on {where}")
    if first:
        print(f"continues {config['out_dir']} at iteration {first}")
    elif config["init_from"] != "scratch":
        decided = ", ".join(f"{key} {config[key]}" for key in (*NETWORK, *TRANSPORTER))
        print(f"starts from {config['init_from']}: {decided}")


if __name__ == "__main__":
    main(configure(globals()))
