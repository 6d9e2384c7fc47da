"""Self-distillation: trains the Denoiser to do in one pass what the model's own score does by back-propagation.

    python distill.py --out_dir=out/digits
    torchrun --nproc_per_node=8 distill.py --out_dir=out/t2i --batch_size=512

Reads out_dir/ckpt.pt, whose averaged weights stay frozen: real images are noised along the forward trajectory, and the
target is the frozen model's score denoising of that trajectory. Leaves in out_dir: denoiser.pt, denoiser_log.jsonl,
denoiser_log.png and, from every validation, samples/denoiser_ITERATION.png.
"""

import copy
import math
from dataclasses import replace
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from configurator import configure
from data import get_tokenizer, open_dataset
from flow import forward_trajectory
from model import NTM, Denoiser
from plumbing import checkpoint
from plumbing.images import contact_sheet
from plumbing.latents import load_decoder
from plumbing.loader import Batches, validation_batches
from plumbing.lock import lock_folder
from plumbing.log import Progress
from plumbing.optim import learning_rate, make_optimizers, step, update_average
from plumbing.runtime import (alike, all_sum, all_sums, autocast, coarse_products, for_training, gradients_meet,
                              in_bfloat16, job, leave_ranks, one_line_errors, start_ranks)

# ---- run
out_dir = "out/digits"  # holds the model's ckpt.pt, and gets denoiser.pt
resume = "no"  # "yes": continue out_dir/denoiser.pt; "auto": if there is one
seed = 0  # with the iteration, all of a run's randomness
device = ""  # cuda, mps or cpu; empty: the best there is
bfloat16: bool | None = None  # autocast; None: on CUDA only
compile: bool | None = None  # torch.compile; None: on CUDA only
workers = 0  # processes that load data, per rank; 0: load in the training process
data_dir = ""  # where the model's data are now; empty: as for the model
bad_limit = 0.01  # the fraction of unusable examples, replaced by others, at which a run stops
caption_dropout = 0.1  # fraction of captions replaced by the null caption

# ---- denoiser
width = 96
depth = 4
heads = 4
steps = 0  # T of the trajectories it learns from; 0: the first that the model was trained with
t_min = 0.02  # the noise level it starts from

# ---- optimisation
batch_size = 64  # examples per update, over all ranks and accumulation passes
grad_accum = 1  # passes per update and rank
max_iters = 200
optimizer = "muon"  # or "adamw"
lr = 5e-3  # for muon; adamw wants about 2e-3
min_lr = 1e-6
warmup_iters = 20
weight_decay = 1e-4
grad_clip = 1.0
ema = 0.98  # decay of the averaged weights that sampling uses

# ---- log
log_interval = 50
val_interval = 100  # iterations between validations, each with a sheet of samples and a checkpoint
save_minutes = 15.0  # a checkpoint after so many minutes without one, too; 0: those of validations alone
keep = 1  # checkpoints of validations that stay, as denoiser_000100.pt and so on; 1: denoiser.pt alone, the newest
val_examples = 297
num_samples = 25  # on the sheet
decoder = ""  # of latents, for the sheet: a program saved by torch.export, latents (B, C, h, w) to images in [-1, 1]
chunk = 0  # examples that are score-denoised at once; 0: what fits into about 4 GB
wandb_log = False  # the log and the sheets to Weights & Biases as well


def lesson(teacher, images, text, ts, noise, chunk=0):
    """The denoiser's input u_0 and its target, the score-denoised tokens of a real trajectory: Eq. (27) and (21)."""
    with coarse_products(ts.device), torch.autocast(ts.device.type, enabled=False):  # bfloat16: mostly rounding
        times = ts.expand(len(images), -1)
        x = teacher.coupled(forward_trajectory(teacher.patchify(images), times, noise=noise), times, text)
        return teacher.distillation_pair(x, ts, text, chunk)


@torch.no_grad()
def validate(ema, teacher, batches, ts, chunk=0):
    """Mean squared error and PSNR in dB against the score-denoised targets, on held-out data."""
    sums = torch.zeros(2, device=ts.device)  # of the squared error, and the numbers it is of
    for images, text, _, generator in batches:
        noise = torch.randn(len(images), len(ts), *teacher.patchify(images)[0].shape, generator=generator,
                            device=ts.device)
        u0, target = lesson(teacher, images, text, ts, noise, chunk)
        error = (ema(u0, text) - target).square()
        sums += torch.tensor([error.sum(), error.numel()], device=ts.device)
    mse = (all_sum(sums)[0] / sums[1]).item()
    return {"val_mse": mse, "val_psnr": 10 * math.log10(2**2 / mse)}  # images span 2, from -1 to 1


def main(config):
    with one_line_errors():
        ranks = start_ranks(config["device"])
        lock = lock_folder(config["out_dir"])
    with lock:
        distill(config, ranks)


def distill(config, ranks):
    device, rank, world = ranks
    with one_line_errors():
        path = Path(config["out_dir"]) / "denoiser.pt"
        teacher, trained = checkpoint.load_network(path.with_name("ckpt.pt"), {"ntm": NTM}, device)
        fingerprint = checkpoint.fingerprint(teacher)
        resumed = checkpoint.find_start(config["resume"], path, "denoiser")
        if resumed:
            checkpoint.keep_settings(config, resumed)
            if (theirs := resumed.get("teacher", trained["iter"])) != trained["iter"]:
                raise ValueError(f"{path} learns from iteration {theirs}, but the model is at {trained['iter']}: "
                                 "remove it, to distil anew")
            if resumed.get("teacher_sha256", fingerprint) != fingerprint:  # older ones have none
                raise ValueError(f"{path} learns from another model than {path.with_name('ckpt.pt')}, which has the "
                                 "same iteration and other weights: remove it, to distil anew")
        for name, value in trained["settings"].items():  # the data and the captions are the model's
            config.setdefault(name, value)
        config["data_dir"] = config["data_dir"] or trained["settings"]["data_dir"]
        train_set, val_set = (open_dataset(config, split) for split in ("train", "val"))
        tokenizer = get_tokenizer(config["tokenizer"], trained.get("vocabulary"))
        decode = load_decoder(config, device) if config["decoder"] else None
        ts = teacher.config.time_grid(config["t_min"], config["steps"]).to(device)

        torch.manual_seed(config["seed"])  # the same initial weights on every rank
        model_config = replace(teacher.config, **{name: config[name] for name in ("width", "depth", "heads")})
        denoiser = Denoiser(model_config).to(device)
        ema = copy.deepcopy(denoiser).eval().requires_grad_(False)
        optimizers = make_optimizers(denoiser, config["optimizer"], config["weight_decay"], device,
                                     in_bfloat16(config, device))
        if resumed:
            checkpoint.resume(resumed, path, denoiser, ema, optimizers, config, "optimizer", "t_min", "steps")
        first, counts = (resumed["iter"], resumed.get("counts", {})) if resumed else (0, {})
        alike(teacher, denoiser, ema)
        resumed = None  # whose weights would stay in memory as long as the run
        batches = Batches(train_set, tokenizer, model_config.text_len, config, first, ranks)
        progress = Progress(path, "denoiser_log.jsonl", config, first, counts, rank)

    network = for_training(denoiser, config, device)
    if rank == 0:
        print(f"a denoiser of {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f}M parameters learns from "
              f"{config['out_dir']}/ckpt.pt of iteration {trained['iter']}; on {world} x {device.type}")

    def save(i):
        if rank == 0:
            checkpoint.save(path, kind="denoiser", model=denoiser, ema=ema, optimizers=optimizers, iter=i,
                            settings=config, vocabulary=tokenizer.vocabulary, teacher=trained["iter"],
                            teacher_sha256=fingerprint, job=job(), counts=progress.counts)

    def check(i):
        """Validates the averaged denoiser, and leaves samples for held-out captions."""
        held_out = val_set, tokenizer, model_config.text_len
        of_this_rank = validation_batches(*held_out, config["val_examples"], device, rank, world,
                                          bad_limit=config["bad_limit"])
        values = validate(ema, teacher, of_this_rank, ts, config["chunk"])
        if rank == 0:
            with progress.a_sheet(i):
                count = config["num_samples"]
                _, text, captions, generator = next(validation_batches(*held_out, count, device, batch_size=count))
                images = ema.unpatchify(ema(teacher.sample(text, ts, generator=generator)[:, 0], text))
                sheet = contact_sheet(decode(images) if decode else images, captions)
                progress.show(i, sheet, path.parent / "samples" / f"denoiser_{i:06d}.png")
        progress.validated(i, values)

    with batches.interrupt, batches, progress:
        if progress.validation_missing():
            check(first)
        for i in range(first, config["max_iters"]):
            images, text, generator = next(batches)
            shape = config["batch_size"], len(ts), model_config.num_tokens, model_config.token_dim
            noise = batches.randn(shape, generator=generator, device=device)
            loss = 0
            for k, (images, text, noise) in enumerate(batches.chunks(images, text, noise), 1):
                u0, target = lesson(teacher, images, text, ts, noise, config["chunk"])
                with gradients_meet(network, k == batches.passes):
                    with autocast(config, device):
                        part = (network(u0, text) - target).square().mean() / batches.passes
                    part.backward()
                loss += part.detach() / world

            grad_norm = clip_grad_norm_(denoiser.parameters(), config["grad_clip"]) / world
            losses = {"loss": loss, "grad_norm": grad_norm}
            totals = all_sums({**losses, "asked": batches.must_end(), **progress.asks(), **batches.counts}, device)
            finite = math.isfinite(totals["loss"]) and math.isfinite(totals["grad_norm"])
            lr = learning_rate(config, i)
            if finite:
                step(optimizers, lr)
                update_average(ema, denoiser, config["ema"], i)
            denoiser.zero_grad(set_to_none=True)

            # Log, save, validate; leave where an end was asked for.
            totals["skipped"] = not finite
            if progress.ends(i + 1, {"loss": totals["loss"]}, lr, totals, batches, save, check):
                break
        leave_ranks()


if __name__ == "__main__":
    main(configure(globals()))
