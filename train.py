"""Train a Normalizing Trajectory Model; without arguments, on handwritten digits, which takes minutes on a CPU.

    python train.py config/shapes_scratch.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/t2i_fm.py
    torchrun --nproc_per_node=8 train.py config/t2i.py               # an NTM that starts from that model
    python train.py --out_dir=out/shapes --resume=yes                # continues a run with its own settings
    python train.py config/digits_fm.py                              # the baseline: flow matching
    python train.py config/digits_tune.py --resume=auto              # starts an NTM from the baseline, or resumes it
    python train.py config/sit.py --init_from=sit:SiT-XL-2-256.pt    # an NTM that starts from published weights

Writes into out_dir: ckpt.pt, log.jsonl, log.png and, from every validation, samples/ITERATION.png.
"""

import copy
import math
from functools import partial
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_

from beyond import CoupledNTM
from configurator import configure
from data import get_tokenizer, open_dataset
from flow import forward_trajectory, time_grid
from fm import EULER_STEPS

from losses import TrainingLoss, aux_weight_at, draw_levels, losses_of_batch
from model import NTM
from plumbing import checkpoint
from plumbing.images import contact_sheet
from plumbing.kept import Kept
from plumbing.latents import load_decoder
from plumbing.loader import Batches, examine, validation_batches
from plumbing.lock import run_alone
from plumbing.log import Progress
from plumbing.memory import examples_at_once, in_chunks, score_denoise
from plumbing.optim import learning_rate, make_optimizers, update_average, update_weights
from plumbing.runtime import (
    accumulate,
    alike,
    all_sum,
    all_sums,
    autocast,
    exact_products,
    for_training,
    gathered,
    in_bfloat16,
    job,
    meet_ranks,
    uncompiled,
)
from start import NETWORK_SETTINGS, TRANSPORTER_SETTINGS, build_model, find_start

# ---- run
out_dir = "out/digits"  # the folder of the run: checkpoint, log, sheets of samples
objective = "ntm"  # "fm": flow matching with the same network; "tarflow" (ours): no predictor, and steps must be 1
init_from = "scratch"  # "scratch", a ckpt.pt of flow matching or of an NTM, or sit:PATH, published SiT weights
resume = "no"  # "yes": continue out_dir/ckpt.pt, wherever it started from; "auto": continue it if it exists
seed = 0  # the seed and the iteration determine every random number of a run
device = ""  # cuda, mps or cpu; empty: the best available
bfloat16: bool | None = None  # train in bfloat16 by autocast; None: on CUDA only
compile: bool | str | None = None  # use torch.compile; "layers": by layer, ready sooner; None: on CUDA with Triton
workers = 0  # processes per rank that load data; 0: the training process loads them
in_memory = False  # decode the shards once, at the start, and keep them in each rank's memory

# ---- data
dataset = "digits"  # or "fashion", "shapes", or "shards": captioned images or latents of your own
data_dir = ""  # the shards: a folder, a glob or NAME-{00000..00099}.tar; or the folder of Fashion-MNIST's files
crop = "center"  # where images of shards are cropped if their shape is not that of image_size; or "random"
flip = False  # mirror half of the shards' images, chosen at random
latent_scale = 0.0  # factor that normalises latents; 0: as `data.py encode` measured it; SiT's latents need 0.18215
bad_limit = 0.01  # fraction of unusable examples above which a run stops; each is replaced by a usable one
bad_captions = 0.1  # refuse to start if more than this fraction of captions is truncated or unreadable
image_size: int | tuple = 8  # pixels a side; or height,width
channels = 1  # 1: grey, 3: RGB; latents have as many as their encoder makes
tokenizer = "captions"  # or "emoji", "gpt2", a file NAME.tiktoken; or "classes": captions are "class 0" to "class 999"
text_len = 4  # tokens of a caption that the model reads; longer captions are cut
caption_dropout = 0.1  # fraction of captions replaced by the null caption, which guidance needs

# ---- model
patch_size = 2  # pixels a side of the square that becomes one token
width = 96  # numbers per token in the predictor
depth = 4  # layers of the predictor
heads = 4  # attention heads of the predictor
transporter_width = 64  # numbers per token in the transporter
transporter_blocks = 3  # autoregressive blocks of the transporter; 0: none
transporter_layers = 2  # layers of each block
transporter_heads = 2  # attention heads of each block
parametrization = "direct"  # or "posterior": the head emits a velocity, as in runs that start from flow matching
steps: int | tuple = 4  # T, the number of reverse steps; several, such as 4,8, make one model for all of them
shift: float | None = 0.5  # e^m of the time grid; small images need a small one; None: from the number of tokens
max_t_min = 0.05  # t_0, the cleanest noise level, is uniform in (0, max_t_min]
rank = 0  # (ours) rank of the learned covariance of a step's Gaussian; 0: diagonal, as in the paper
filters = 0  # (ours) kernels of the causal filter over pixels in a step's flow; 0: no filter
filter_window = 5  # (ours) side of the filter's window in pixels
filter_leak = 0.0  # (ours) share of the filter's sums that sampling leaves out; 0.06: errors fade along the rows
logistics = 0  # (ours) logistics per number in the pointwise map of a step's flow; 0: no map
pairs = True  # train on one random step of each trajectory; False: on all T steps
level_weight = 0.0  # (ours) power p: a step that ends at noise level s has weight s^p, which balances the gradients
first_noise = 1.0  # (ours) fraction of x_1 that is fresh noise; the rest follows from the next cleaner level
closed_form = False  # (ours) train on the expected loss: its gradients have less variance; needs Gaussian steps
mirrored = False  # (ours) train on the mean loss of x_s and its mirror image: less variance, for any step
velocity_weight = 0.0  # (ours) weight of an added flow-matching loss; needs transporter_blocks 0
aux_weight = 2.5  # weight of a loss that keeps means near those of a flow-matching start; decays to 0 by a cosine

# ---- optimisation
batch_size = 64  # examples per update, over all ranks and accumulation passes
grad_accum = 1  # forward and backward passes per update on each rank
max_iters = 2000  # updates in all
minutes = 0.0  # above 0: max_iters becomes what fits into so many minutes at the speed of the first updates
optimizer = "muon"  # or "adamw"
lr = 5e-3  # peak learning rate of muon; adamw needs about 2e-3
words_lr = 1.0  # learning-rate factor for word embeddings; with many rare words try 25
min_lr = 1e-6  # learning rate at the end of its cosine schedule
warmup_iters = 100  # updates in which the learning rate rises from 0 to its peak
weight_decay = 1e-4  # decoupled weight decay of all weights
grad_clip = 1.0  # scale the gradient down to this norm if it is larger
ema = 0.999  # decay of the averaged weights, which sampling uses

# ---- log
log_interval = 50  # iterations between lines of the log
val_interval = 500  # iterations between validations, each with a sheet of samples and a checkpoint
save_minutes = 15.0  # also save if so many minutes have passed since the last checkpoint; 0: at validations only
keep = 1  # checkpoints of validations to keep, as ckpt_000500.pt and so on; 1: ckpt.pt alone, the newest
val_examples = 297  # held-out examples that a validation reads
t_min = 0.02  # noise level where the trajectories of validation and the samples end
num_samples = 25  # images on the sheet of samples
decoder = ""  # decodes latents for the sheet: a torch.export program from (B, C, h, w) to images in [-1, 1]
chunk = 0  # examples that are validated or score-denoised at once; 0: as many as fit into about 4 GB
wandb_log = False  # send the log and the sheets to Weights & Biases as well

# ---------------------------------------------------------------------------------------------------------------
# Validation


def levels_of(model, t_min):
    """The times (T+1,) that validation and sheets use: an NTM's noise levels, or those of flow matching's samples."""
    return model.config.time_grid(t_min) if isinstance(model, NTM) else time_grid(EULER_STEPS, 0.0, 0, shift=1.0)


@torch.no_grad()
def validate(ema, batches, ts, config):
    """Measure the averaged model on held-out data. Returns {name: nats per dimension} for the log.

    val_step_k is -log p of the step that ends at t_k, and val_loss the mean over steps. val_bound is the upper bound on
    -log p(x_{t_min}); unlike losses, bounds can be compared between time grids ts (T+1,). For flow matching, val_loss
    is the velocity's mean squared error. Networks run in float32, as in evaluate.py, whatever the run trains in.
    """
    count = torch.zeros((), device=ts.device)
    sums = torch.zeros(len(ts) if isinstance(ema, NTM) else 1, device=ts.device)
    for images, text, _, generator in batches:
        with exact_products(ts.device):
            if isinstance(ema, NTM):
                values = likelihoods(ema, images, text, ts, generator, config["chunk"])
                sums = sums + values.sum(dim=0)
            else:
                t = ema.draw_times(len(images), generator, ts.device)
                noise = torch.randn(ema.patchify(images).shape, generator=generator, device=ts.device)
                sums = sums + len(images) * ema(images, text, (t, noise))[None]
        count += len(images)
    means = (all_sum(sums) / all_sum(count)).tolist()
    if not isinstance(ema, NTM):
        return {"val_loss": means[0]}
    *step_nll, bound = means
    values = {"val_loss": sum(step_nll) / len(step_nll), "val_bound": bound}
    return values | {f"val_step_{k}": nll for k, nll in enumerate(step_nll)}


def likelihoods(ema, images, text, ts, generator, chunk=0):
    """-log p of each step of a trajectory of each image, and the bound, (B, T+1), nats per dimension."""
    times = ts.expand(len(images), -1)
    x = forward_trajectory(ema.patchify(images), times, generator)
    chunk = chunk or examples_at_once(ema.config, len(ts) - 1, gradients=False)
    nll, bound = in_chunks(ema.trajectory_bound, chunk, x, times, text)
    return torch.cat([nll[:, :-1], bound[:, None]], dim=1) / images[0].numel()


def sample_images(ema, text, ts, generator, chunk=0):
    """Images (B, C, H, W) sampled for captions text (B, L); an NTM's are score-denoised, `chunk` of them at once."""
    if not isinstance(ema, NTM):
        return ema.unpatchify(ema.sample(text, ts, generator=generator)[:, 0])
    u = ema.sample(text, ts, generator=generator)
    x = ema.invert(u, ts)
    return ema.unpatchify(score_denoise(ema, x, ts, text, chunk))


# ---------------------------------------------------------------------------------------------------------------
# The run


def open_data(config, vocabulary):
    """Open the training and validation set and the tokenizer. For latents, config gets their mean and scale."""
    train_set = open_dataset(config, "train")
    if config["in_memory"]:
        train_set = Kept(train_set)
    val_set = open_dataset(config, "val")
    tokenizer = get_tokenizer(config["tokenizer"], vocabulary)
    if config["dataset"] == "shards" and train_set.latent:  # for whoever decodes what the model samples
        mean, scale = train_set.mean.flatten(), train_set.scale.flatten()
        config["latents"] = {"mean": mean.tolist(), "scale": scale.tolist()}
    return train_set, val_set, tokenizer


class Run:
    """What a run holds: model, its average, optimisers, data, and the log. ranks: device, rank and world."""

    def __init__(self, config, ranks):
        self.config = config
        self.device, self.rank, self.world = ranks
        self.path = Path(config["out_dir"]) / "ckpt.pt"
        start = find_start(config, self.device)
        self.kind = start.kind
        train_set, self.val_set, self.tokenizer = open_data(config, start.vocabulary)
        self.decode = load_decoder(config, self.device) if config["decoder"] else None
        self.model, self.frozen = build_model(config, start, self.tokenizer.vocab_size, self.device)
        self.ts = levels_of(self.model, config["t_min"]).to(self.device)
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.optimizers = make_optimizers(
            self.model,
            config["optimizer"],
            config["weight_decay"],
            self.device,
            in_bfloat16(config, self.device),
            words_lr=config["words_lr"],
        )
        resumed = start.resumed or {}
        if resumed:
            fixed = "objective", "first_noise", "optimizer", "tokenizer"
            checkpoint.resume(resumed, self.path, self.model, self.ema, self.optimizers, config, *fixed)
        if resumed and self.frozen:
            checkpoint.restore_frozen(resumed, self.path, self.frozen.predictor)
        alike(*filter(None, [self.model, self.ema, self.frozen]))
        self.first = resumed.get("iter", 0)
        text_len = self.model.config.text_len
        notes = examine(train_set, self.val_set, self.tokenizer, text_len, config["bad_captions"])
        words = resumed.get("words", ())
        self.batches = Batches(train_set, self.tokenizer, text_len, config, self.first, ranks, words)
        self.progress = Progress(self.path, "log.jsonl", config, self.first, resumed.get("counts", {}), self.rank)
        if self.rank == 0:
            describe(self, len(train_set))
            print(*notes, sep="\n", end="\n" if notes else "")

    def save(self, i):
        """Write the checkpoint of iteration i."""
        words = set().union(*gathered(self.batches.words))  # of all captions so far, for whoever writes prompts
        if self.rank == 0:
            contents = dict(
                kind=self.kind,
                model=self.model,
                ema=self.ema,
                optimizers=self.optimizers,
                iter=i,
                settings=self.config,
                vocabulary=self.tokenizer.vocabulary,
                words=sorted(words),
                job=job(),
                counts=self.progress.counts,
            )
            if self.frozen:
                contents["frozen"] = self.frozen.predictor.state_dict()
            checkpoint.save(self.path, **contents)
        self.progress.saved(i)

    @uncompiled()
    def validate(self, i):
        """Validate the averaged model of iteration i, and write a sheet of samples for held-out captions."""
        if self.rank == 0:
            with self.progress.a_sheet(i):
                self.show_samples(i)
        config = self.config
        batches = validation_batches(
            *self.held_out(),
            config["val_examples"],
            self.device,
            self.rank,
            self.world,
            bad_limit=config["bad_limit"],
        )
        self.progress.validated(i, validate(self.ema, batches, self.ts, config))

    def show_samples(self, i):
        """Write a sheet of samples for the first held-out captions."""
        count = self.config["num_samples"]
        batches = validation_batches(*self.held_out(), count, self.device, batch_size=count)
        _, text, captions, generator = next(batches)
        images = sample_images(self.ema, text, self.ts, generator, self.config["chunk"])
        if self.decode:
            images = self.decode(images)
        sheet = contact_sheet(images, captions)
        self.progress.show(i, sheet, self.path.parent / "samples" / f"{i:06d}.png")

    def held_out(self):
        return self.val_set, self.tokenizer, self.model.config.text_len


def describe(run, examples):
    """Says what is about to be trained, on what, and from where."""
    config = run.config
    sizes = {}
    for name, part in run.model.named_children():
        sizes[name] = sum(parameter.numel() for parameter in part.parameters()) / 1e6
    parts = ", ".join(f"{name} {size:.2f}M" for name, size in sizes.items())
    where = f"{run.world} x {run.device.type}"
    print(f"{sum(sizes.values()):.2f}M parameters ({parts}); {examples:,} examples; on {where}")
    if run.first:
        print(f"continues {config['out_dir']} at iteration {run.first}")
    elif config["init_from"] != "scratch":
        decided = ", ".join(f"{key} {config[key]}" for key in (*NETWORK_SETTINGS, *TRANSPORTER_SETTINGS))
        print(f"starts from {config['init_from']}: {decided}")


def train(run):
    """The training loop."""
    config, device = run.config, run.device
    model, ema, frozen = run.model, run.ema, run.frozen
    batches, progress = run.batches, run.progress
    network = for_training(TrainingLoss(model, config), config, device)
    noised = getattr(ema, "noised", None)  # None for flow matching; a CoupledNTM noises by the averaged model's flow
    if isinstance(ema, CoupledNTM):  # (ours) compiled, because it takes four passes of the network
        noised = for_training(ema.noised_pairs, config, device)

    with batches.interrupt, batches, progress:
        if progress.validation_missing():
            run.validate(run.first)
        for i in progress.iterations():
            # The batch: images, captions, and the noise levels at which they are learned from.
            images, text, generator = next(batches)
            with autocast(config, device):
                drawn = draw_levels(model, noised, images, text, config, batches, generator)

            # Forward and backward, in as many passes as memory needs; the ranks' gradients meet in the last one.
            losses_of = partial(losses_of_batch, network, frozen, aux_weight_at(i, config))
            losses = accumulate(losses_of, network, batches, config, device, images, text, *drawn)

            # Clip the gradient, and guard: every rank has the same numbers, so all of them skip an update or none does.
            norm = clip_grad_norm_(model.parameters(), config["grad_clip"])
            grad_norm = norm / run.world  # each rank's share: all_sums adds them up
            batches.load_next()  # while the device computes
            asked = {"asked": batches.must_end, **progress.asks()}
            totals = all_sums({**losses, "grad_norm": grad_norm, **asked, **batches.counts}, device)
            finite = math.isfinite(totals["loss"]) and math.isfinite(totals["grad_norm"])

            # Step, and average.
            lr = learning_rate(config, i)
            if finite:
                update_weights(run.optimizers, lr)
                update_average(ema, model, config["ema"], i)
            model.zero_grad(set_to_none=True)

            # Log; save, before the validation, so that nothing that goes wrong there costs the weights; validate; stop.
            done = i + 1
            progress.record(done, {name: totals[name] for name in losses}, lr, totals, finite, batches.waited)
            if progress.save_due(done, totals):
                run.save(done)
            progress.stop_if_hopeless(done, totals, batches.faults)
            if progress.validation_due(done):
                run.validate(done)
            if progress.stopped(done, totals):
                break
        meet_ranks()


def main(config):
    run_alone(config, Run, train)


if __name__ == "__main__":
    main(configure(globals()))
