"""Train the Denoiser to do in one pass what the model's own score does by back-propagation: self-distillation.

    python distill.py --out_dir=out/digits
    torchrun --nproc_per_node=8 distill.py --out_dir=out/t2i --batch_size=512

Reads out_dir/ckpt.pt, whose averaged weights stay frozen: real images are noised along the forward trajectory, and the
target is the frozen model's score denoising of that trajectory. Writes into out_dir: denoiser.pt,
denoiser_log.jsonl, denoiser_log.png and, from every validation, samples/denoiser_ITERATION.png.
"""

import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from beyond import ResidualDenoiser
from configurator import configure
from data import get_tokenizer, open_dataset
from networks import NTMS
from plumbing import checkpoint
from plumbing.images import contact_sheet
from plumbing.kept import Kept
from plumbing.latents import load_decoder
from plumbing.loader import Batches, validation_batches
from plumbing.lock import run_alone
from plumbing.log import Progress
from plumbing.memory import score_denoise
from plumbing.optim import learning_rate, make_optimizers, update_average, update_weights
from plumbing.runtime import (
    accumulate,
    alike,
    all_sum,
    all_sums,
    coarse_products,
    for_training,
    in_bfloat16,
    job,
    meet_ranks,
)
from plumbing.settings import check_init_from
from predictor import NTMConfig

# ---- run
out_dir = "out/digits"  # the folder of the model's ckpt.pt, which gets denoiser.pt
init_from = ""  # denoiser.pt of a similar model to start from; empty: start from random weights
resume = "no"  # "yes": continue out_dir/denoiser.pt; "auto": continue it if it exists
seed = 0  # the seed and the iteration determine every random number of a run
device = ""  # cuda, mps or cpu; empty: the best available
bfloat16: bool | None = None  # train in bfloat16 by autocast; None: on CUDA only
compile: bool | str | None = None  # use torch.compile; "layers": by layer, ready sooner; None: on CUDA with Triton
workers = 0  # processes per rank that load data; 0: the training process loads them
in_memory = False  # decode the shards once, at the start, and keep them in each rank's memory
data_dir = ""  # where the model's data are now; empty: where they were when it was trained
bad_limit = 0.01  # fraction of unusable examples above which a run stops; each is replaced by a usable one
caption_dropout = 0.1  # fraction of captions replaced by the null caption

# ---- denoiser
width = 96  # numbers per token in the denoiser
depth = 4  # layers of the denoiser
heads = 4  # attention heads of the denoiser
residual: bool | None = None  # (ours) the denoiser emits what to add to its input; None: if there is no transporter
steps = 0  # T of the trajectories that the denoiser learns from; 0: the first of the model's step counts
t_min = 0.02  # noise level of the samples that the denoiser gets

# ---- optimisation
batch_size = 64  # examples per update, over all ranks and accumulation passes
grad_accum = 1  # forward and backward passes per update on each rank
max_iters = 200  # updates in all
minutes = 0.0  # above 0: max_iters becomes what fits into so many minutes at the speed of the first updates
optimizer = "muon"  # or "adamw"
lr = 5e-3  # peak learning rate of muon; adamw needs about 2e-3
min_lr = 1e-6  # learning rate at the end of its cosine schedule
warmup_iters = 20  # updates in which the learning rate rises from 0 to its peak
weight_decay = 1e-4  # decoupled weight decay of all weights
grad_clip = 1.0  # scale the gradient down to this norm if it is larger
ema = 0.98  # decay of the averaged weights, which sampling uses

# ---- log
log_interval = 50  # iterations between lines of the log
val_interval = 100  # iterations between validations, each with a sheet of samples and a checkpoint
save_minutes = 15.0  # also save if so many minutes have passed since the last checkpoint; 0: at validations only
keep = 1  # checkpoints of validations to keep, as denoiser_000100.pt and so on; 1: denoiser.pt alone, the newest
val_examples = 297  # held-out examples that a validation reads
num_samples = 25  # images on the sheet of samples
decoder = ""  # decodes latents for the sheet: a torch.export program from (B, C, h, w) to images in [-1, 1]
chunk = 0  # examples that are score-denoised at once; 0: as many as fit into about 4 GB
wandb_log = False  # send the log and the sheets to Weights & Biases as well


# ---------------------------------------------------------------------------------------------------------------
# The loss


def input_and_target(teacher, images, text, ts, noise, chunk=0):
    """The denoiser's input u_0 and its target, the score-denoised tokens of a real trajectory: Eqs. (27) and (21).

    teacher: an NTM. images (B, channels, H, W), text (B, L), ts (T+1,), noise (B, T+1, N, D). Returns two (B, N, D).
    """
    # in bfloat16 the score would be mostly rounding error
    with coarse_products(ts.device), torch.autocast(ts.device.type, enabled=False):
        times = ts.expand(len(images), -1)
        x = teacher.noised(teacher.patchify(images), text, times, noise)
        with torch.no_grad():
            u, _ = teacher.transport(x[:, :1], times[:, :1], teacher.step_count(times))
        return u[:, 0], score_denoise(teacher, x, ts, text, chunk)


def losses_of_batch(network, teacher, ts, chunk, images, text, noise):
    """{"loss": mean squared error}, Eq. (27), of the denoiser `network`; the other arguments are input_and_target's."""
    u0, target = input_and_target(teacher, images, text, ts, noise, chunk)
    error = network(u0, text) - target
    return {"loss": error.square().mean()}


@torch.no_grad()
def validate(ema, teacher, batches, ts, chunk=0):
    """The mean squared error and the PSNR in dB against score-denoised targets, on held-out data: {name: float}."""
    sums = torch.zeros(2, device=ts.device)  # the squared errors, and how many there are
    for images, text, _, generator in batches:
        shape = len(images), len(ts), teacher.config.num_tokens, teacher.config.token_dim
        noise = torch.randn(shape, generator=generator, device=ts.device)
        u0, target = input_and_target(teacher, images, text, ts, noise, chunk)
        error = (ema(u0, text) - target).square()
        sums += torch.tensor([error.sum(), error.numel()], device=ts.device)
    squares, count = all_sum(sums)
    mse = (squares / count).item()
    return {"val_mse": mse, "val_psnr": 10 * math.log10(2**2 / mse)}  # images span 2, from -1 to 1


# ---------------------------------------------------------------------------------------------------------------
# The run


class Run:
    """What a run holds: teacher, denoiser, its average, optimisers, data, and the log. ranks: device, rank, world."""

    def __init__(self, config, ranks):
        self.config = config
        self.device, self.rank, self.world = ranks
        self.path = Path(config["out_dir"]) / "denoiser.pt"
        self.teacher, trained = checkpoint.load_network(self.path.with_name("ckpt.pt"), NTMS, self.device)
        self.teacher_iter = trained["iter"]
        self.fingerprint = checkpoint.fingerprint(self.teacher)
        resumed = checkpoint.find_resumable(config["resume"], self.path, "denoiser") or {}
        if resumed:
            resumed["settings"].setdefault("residual", False)  # as it was before there was a choice
            checkpoint.keep_settings(config, resumed)
            checkpoint.check_teacher(self.path, resumed, self.teacher_iter, self.fingerprint)
        if config["t_min"] == 0 and not self.teacher.config.transporter_blocks:
            raise ValueError("t_min is 0, but without a transporter there is then no noise to remove: choose one above "
                             "0, such as 0.02")
        for name, value in trained["settings"].items():  # the data and the captions are the model's
            config.setdefault(name, value)
        config["data_dir"] = config["data_dir"] or trained["settings"]["data_dir"]
        train_set = open_dataset(config, "train")
        if config["in_memory"]:
            train_set = Kept(train_set)
        self.val_set = open_dataset(config, "val")
        self.tokenizer = get_tokenizer(config["tokenizer"], trained.get("vocabulary"))
        self.decode = load_decoder(config, self.device) if config["decoder"] else None
        self.ts = self.teacher.config.time_grid(config["t_min"], config["steps"]).to(self.device)

        self.denoiser = build_denoiser(config, self.teacher.config).to(self.device)
        if config["init_from"] and not resumed:
            start_from(self.denoiser, config["init_from"])
        self.ema = copy.deepcopy(self.denoiser).eval().requires_grad_(False)
        bfloat16 = in_bfloat16(config, self.device)
        self.optimizers = make_optimizers(
            self.denoiser, config["optimizer"], config["weight_decay"], self.device, bfloat16
        )
        if resumed:
            fixed = "optimizer", "t_min", "steps"
            checkpoint.resume(resumed, self.path, self.denoiser, self.ema, self.optimizers, config, *fixed)
        alike(self.teacher, self.denoiser, self.ema)
        self.first = resumed.get("iter", 0)
        self.batches = Batches(train_set, self.tokenizer, self.teacher.config.text_len, config, self.first, ranks)
        counts = resumed.get("counts", {})
        self.progress = Progress(self.path, "denoiser_log.jsonl", config, self.first, counts, self.rank)
        if self.rank == 0:
            self.describe()

    def describe(self):
        size = sum(parameter.numel() for parameter in self.denoiser.parameters()) / 1e6
        print(
            f"a denoiser of {size:.2f}M parameters learns from {self.config['out_dir']}/ckpt.pt of iteration "
            f"{self.teacher_iter}; on {self.world} x {self.device.type}"
        )

    def save(self, i):
        """Write the checkpoint of iteration i."""
        if self.rank == 0:
            checkpoint.save(
                self.path,
                kind="denoiser",
                model=self.denoiser,
                ema=self.ema,
                optimizers=self.optimizers,
                iter=i,
                settings=self.config,
                vocabulary=self.tokenizer.vocabulary,
                teacher=self.teacher_iter,
                teacher_sha256=self.fingerprint,
                job=job(),
                counts=self.progress.counts,
            )
        self.progress.saved(i)

    def validate(self, i):
        """Validate the averaged denoiser of iteration i, and write a sheet of samples for held-out captions."""
        config = self.config
        held_out = self.val_set, self.tokenizer, self.teacher.config.text_len
        shared = config["val_examples"], self.device, self.rank, self.world
        batches = validation_batches(*held_out, *shared, bad_limit=config["bad_limit"])
        values = validate(self.ema, self.teacher, batches, self.ts, config["chunk"])
        if self.rank == 0:
            with self.progress.a_sheet(i):
                count = config["num_samples"]
                batches = validation_batches(*held_out, count, self.device, batch_size=count)
                _, text, captions, generator = next(batches)
                u = self.teacher.sample(text, self.ts, generator=generator)
                images = self.ema.unpatchify(self.ema(u[:, 0], text))
                if self.decode:
                    images = self.decode(images)
                sheet = contact_sheet(images, captions)
                self.progress.show(i, sheet, self.path.parent / "samples" / f"denoiser_{i:06d}.png")
        self.progress.validated(i, values)


def build_denoiser(config, teacher_config):
    """A new denoiser of config's size for samples of a teacher; None for config's residual becomes True or False."""
    fields = {name: getattr(teacher_config, name) for name in NTMConfig.__dataclass_fields__}
    for name in ("width", "depth", "heads"):
        fields[name] = config[name]
    if config["residual"] is None:
        config["residual"] = teacher_config.transporter_blocks == 0  # where u_0 is almost the image
    fields["residual"] = max(config["t_min"], 0.01) if config["residual"] else 0.0  # of the size of the noise
    torch.manual_seed(config["seed"])  # the same initial weights on every rank
    return ResidualDenoiser(ResidualDenoiser.config_class(**fields))


def start_from(denoiser, path):
    """Gives a new denoiser the averaged weights of the checkpoint `path`. Raises ValueError if they do not fit."""
    check_init_from(path)
    other = checkpoint.load(path, "denoiser")
    theirs = other["model_config"].get("residual", 0.0)
    if theirs != denoiser.config.residual:
        raise ValueError(f"{path} has residual {theirs}, the settings make it {denoiser.config.residual}: set "
                         f"--residual={theirs > 0}, and --t_min as there")
    checkpoint.restore(denoiser, other["ema"], path)


def distill(run):
    """The training loop, as train.py's."""
    config, device = run.config, run.device
    denoiser, ema = run.denoiser, run.ema
    batches, progress = run.batches, run.progress
    network = for_training(denoiser, config, device)
    losses_of = partial(losses_of_batch, network, run.teacher, run.ts, config["chunk"])

    with batches.interrupt, batches, progress:
        if progress.validation_missing():
            run.validate(run.first)
        for i in progress.iterations():
            # The batch, and the noise of its trajectories.
            images, text, generator = next(batches)
            shape = config["batch_size"], len(run.ts), denoiser.config.num_tokens, denoiser.config.token_dim
            noise = batches.randn(shape, generator=generator, device=device)

            # Forward and backward.
            losses = accumulate(losses_of, network, batches, config, device, images, text, noise)

            # Clip the gradient, and guard.
            norm = clip_grad_norm_(denoiser.parameters(), config["grad_clip"])
            grad_norm = norm / run.world  # each rank's share: all_sums adds them up
            batches.load_next()  # while the device computes
            asked = {"asked": batches.must_end, **progress.asks()}
            totals = all_sums({**losses, "grad_norm": grad_norm, **asked, **batches.counts}, device)
            finite = math.isfinite(totals["loss"]) and math.isfinite(totals["grad_norm"])

            # Step, and average.
            lr = learning_rate(config, i)
            if finite:
                update_weights(run.optimizers, lr)
                update_average(ema, denoiser, config["ema"], i)
            denoiser.zero_grad(set_to_none=True)

            # Log, save, validate, stop.
            done = i + 1
            progress.record(done, {"loss": totals["loss"]}, lr, totals, finite, batches.waited)
            if progress.save_due(done, totals):
                run.save(done)
            progress.stop_if_hopeless(done, totals, batches.faults)
            if progress.validation_due(done):
                run.validate(done)
            if progress.stopped(done, totals):
                break
        meet_ranks()


def main(config):
    run_alone(config, Run, distill)


if __name__ == "__main__":
    main(configure(globals()))
