"""Self-distillation: trains the Denoiser to do in one pass what the model's own score does by back-propagation.

    python distill.py --out_dir=out/digits
    torchrun --nproc_per_node=8 distill.py --out_dir=out/shapes32 --batch_size=512

Reads out_dir/ckpt.pt, whose averaged weights stay frozen: real pictures are noised along the forward trajectory, and
the target is the frozen model's score denoising of that trajectory. Leaves in out_dir: denoiser.pt, denoiser_log.jsonl
and, from every validation, samples/denoiser_ITERATION.png.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch

import checkpoint
import pictures
from configurator import configure, one_line_errors
from flow import forward_trajectory
from loop import find_start, fit, load_data, validation_batches
from model import Denoiser
from ranks import all_sum, start_ranks

# ---- run
out_dir = "out/digits"  # holds the model's ckpt.pt, and gets denoiser.pt
init_from = "scratch"  # or "resume": continue out_dir/denoiser.pt; or "auto": resume if there is something to resume
seed = 0  # with the iteration, all of a run's randomness
device = ""  # cuda, mps or cpu; empty: the best there is
bfloat16: bool | None = None  # autocast; None: on CUDA only
compile: bool | None = None  # torch.compile; None: on CUDA only
workers = 0  # processes that load data, per rank; 0: load in the training process
data_dir = ""  # where the model's data are now; empty: as for the model
bad_limit = 0.01  # the share of unusable examples, replaced by others, at which a run stops
caption_dropout = 0.1  # share of captions replaced by the null caption

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
optimizer = ""  # "muon" or "adamw"; empty: muon where torch has it (2.9 or newer)
lr = 5e-3  # for muon; adamw wants about 2e-3
min_lr = 1e-6
warmup_iters = 20
weight_decay = 1e-4
grad_clip = 1.0
ema = 0.98  # decay of the averaged weights that sampling uses

# ---- log
log_interval = 50
val_interval = 100  # iterations between validations, each with a sample grid and a checkpoint
val_examples = 297
num_samples = 25  # in the grid
wandb_log = False  # the log to Weights & Biases as well
wandb_project = "ntm"
wandb_run_name = ""

config = configure(globals())

with one_line_errors():
    device, rank, world = start_ranks(config["device"])
    trained = checkpoint.load(Path(out_dir) / "ckpt.pt", "ntm", device=device)
    config = {**trained["settings"], **config, "data_dir": data_dir or trained["settings"]["data_dir"]}
    teacher = checkpoint.network_of(trained, Path(out_dir) / "ckpt.pt", device)
    train_set, val_set, tokenizer = load_data(config)
    grid = teacher.config.time_grid(t_min, steps).to(device)
    torch.manual_seed(seed)  # the same initial weights on every rank
    denoiser = Denoiser(replace(teacher.config, width=width, depth=depth, heads=heads)).to(device)
    resumed = find_start(init_from, Path(out_dir) / "denoiser.pt", "denoiser", device)


def draw(batch, device, generator):
    shape = batch, len(grid), teacher.config.num_tokens, teacher.config.token_dim
    return (torch.randn(shape, generator=generator, device=device),)


def lesson(images, text, noise):
    """What the denoiser sees and what it should say: u_0 and the score-denoised tokens of a real trajectory."""
    with torch.autocast(grid.device.type, enabled=False):  # a score in bfloat16 would be mostly rounding
        ts = grid.expand(len(images), -1)
        x = forward_trajectory(teacher.patchify(images), ts, noise=noise)
        steps = torch.full((len(x),), len(grid) - 1, device=x.device)
        u0, _ = teacher.transporter(x[:, 0], ts[:, 0], steps)
        return u0, teacher.score_denoise(x, ts, text)


def losses(network, images, text, draws, i):
    u0, target = lesson(images, text, *draws)
    return {"loss": (network(u0, text) - target).square().mean()}


@torch.no_grad()
def validate(ema, i):
    """Mean squared error and PSNR in dB against the score-denoised targets, on held-out data."""
    sums = torch.zeros(2, device=grid.device)  # of the squared error, and the numbers it is of
    for images, text, _, generator in validation_batches(
            val_set, tokenizer, ema.config.text_len, config["val_examples"], grid.device, rank, world):
        u0, target = lesson(images, text, *draw(len(images), grid.device, generator))
        error = (ema(u0, text) - target).square()
        sums += torch.tensor([error.sum(), error.numel()], device=grid.device)
    mse = (all_sum(sums)[0] / sums[1]).item()
    if rank == 0:
        draw_samples(ema, f"denoiser_{i:06d}")
    return {"val_mse": mse, "val_psnr": 10 * math.log10(2**2 / mse)}  # images span 2, from -1 to 1


def draw_samples(ema, name):
    """A grid of four-step samples for held-out captions, cleaned by the denoiser."""
    _, text, captions, generator = next(validation_batches(
        val_set, tokenizer, ema.config.text_len, num_samples, grid.device, batch_size=num_samples))
    u = teacher.sample(text, grid, generator=generator)
    pictures.save(pictures.grid(teacher.unpatchify(ema(u[:, 0], text)), captions),
                  Path(out_dir) / "samples" / f"{name}.png")


if rank == 0:
    print(f"a denoiser of {sum(p.numel() for p in denoiser.parameters()) / 1e6:.2f}M parameters learns from "
          f"{out_dir}/ckpt.pt of iteration {trained['iter']}; on {world} x {device.type}")
fit(config, "denoiser", denoiser, train_set, tokenizer, draw, losses, validate, (device, rank, world), resumed)
