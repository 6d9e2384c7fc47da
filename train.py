"""Trains a Normalizing Trajectory Model from scratch; without arguments, on handwritten digits, minutes on a CPU.

    python train.py config/shapes.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/shapes32.py

Leaves in out_dir: ckpt.pt, log.jsonl and, from every validation, samples/ITERATION.png.
"""

from pathlib import Path

import torch

import pictures
from configurator import configure
from flow import forward_log_prob, forward_trajectory, time_grid
from loop import all_sum, autocast, fit, load_data, one_line_errors, start_ranks, validation_batches
from model import NTM, NTMConfig

# ---- run
out_dir = "out/digits"
init_from = "scratch"  # or "resume": continue out_dir/ckpt.pt; or "auto": resume if there is something to resume
seed = 0  # with the iteration, all of a run's randomness
device = ""  # cuda, mps or cpu; empty: the best there is
bfloat16: bool | None = None  # autocast; None: on CUDA only
compile: bool | None = None  # torch.compile; None: on CUDA only
workers = 0  # processes that load data, per rank; 0: load in the training process

# ---- data
dataset = "digits"
data_dir = ""  # where fashion's files are; empty: where Debian's package puts them
image_size: int | tuple = 8
channels = 1
tokenizer = "captions"  # or "gpt2"
text_len = 4  # caption tokens; longer captions are cut
caption_dropout = 0.1  # share of captions replaced by the null caption, which guidance needs

# ---- model
patch_size = 2
width = 96  # of the predictor, as depth and heads
depth = 4
heads = 4
transporter_width = 64
transporter_blocks = 3  # 0: no transporter, the plain Gaussian step of a diffusion model
transporter_layers = 2  # in each block
transporter_heads = 2
steps: int | tuple = 4  # T; a tuple of several makes one model for all of them
shift: float | None = 0.5  # e^m of the time grid, low for toy pictures; None: from the number of tokens
max_t_min = 0.05  # training draws t_0 uniformly below this
pairs = True  # train on one random step of each trajectory instead of all T

# ---- optimisation
batch_size = 64  # examples per update, over all ranks and accumulation passes
grad_accum = 1  # passes per update and rank
max_iters = 2000
optimizer = ""  # "muon" or "adamw"; empty: muon where torch has it (2.9 or newer)
lr = 5e-3  # for muon; adamw wants about 2e-3
min_lr = 1e-6
warmup_iters = 100
weight_decay = 1e-4
grad_clip = 1.0
ema = 0.999  # decay of the averaged weights that sampling uses

# ---- log
log_interval = 50
val_interval = 500  # iterations between validations, each with a sample grid and a checkpoint
val_examples = 297
t_min = 0.02  # where validation's trajectories and the sample grid end
num_samples = 25  # in the grid

config = configure(globals())

with one_line_errors():
    device, rank, world = start_ranks(config["device"])
    train_set, val_set, tokenizer = load_data(config)
    model_config = NTMConfig(vocab_size=tokenizer.vocab_size, **{
        name: config[name] for name in NTMConfig.__dataclass_fields__ if name in config})
    torch.manual_seed(seed)  # the same initial weights on every rank
    model = NTM(model_config).to(device)
    grid = time_grid(model_config.steps[0], t_min, model_config.num_tokens, shift).to(device)


def objective(network, images, text, draws):
    return network(images, text, draws)


@torch.no_grad()
def validate(ema, i):
    """Held-out nats per dimension: -log p of each step of a trajectory, cleanest first, their mean val_loss, and
    val_bound, the upper bound on -log p(x_{t_min}), which unlike the loss does not depend on the time grid."""
    sums = torch.zeros(len(grid) + 1, device=device)  # of the steps, the bound, and the examples
    for images, text, _, generator in validation_batches(
            val_set, tokenizer, text_len, val_examples, device, rank, world):
        ts = grid.expand(len(images), -1)
        x = forward_trajectory(ema.patchify(images), ts, generator)
        with autocast(config, device):
            nll = ema.trajectory_nll(x, ts, text)
        bound = nll.sum(dim=1, keepdim=True) + forward_log_prob(x, ts)[:, None]
        sums += torch.cat([nll[:, :-1], bound, torch.ones_like(bound)], dim=1).sum(dim=0)
    numbers = model_config.num_tokens * model_config.token_dim
    *nll, bound = (all_sum(sums)[:-1] / sums[-1] / numbers).tolist()
    if rank == 0:
        draw_samples(ema, f"{i:06d}")
    return {"val_loss": sum(nll) / len(nll), "val_bound": bound, **{f"val_step_{k}": v for k, v in enumerate(nll)}}


def draw_samples(ema, name):
    """A grid of score-denoised samples for held-out captions, always from the same noise."""
    _, text, captions, generator = next(validation_batches(
        val_set, tokenizer, text_len, num_samples, device, batch_size=num_samples))
    x = ema.invert(ema.sample(text, grid, generator=generator), grid)
    images = ema.unpatchify(ema.score_denoise(x, grid, text))
    pictures.save(pictures.grid(images, captions), Path(out_dir) / "samples" / f"{name}.png")


if rank == 0:
    parameters = sum(p.numel() for p in model.parameters())
    transporter = sum(p.numel() for p in model.transporter.parameters())
    print(f"{parameters / 1e6:.2f}M parameters, {transporter / 1e6:.2f}M of them in the transporter; "
          f"{len(train_set):,} examples; on {world} x {device.type}")
fit(config, "ntm", model, train_set, tokenizer, model.draw, objective, validate, (device, rank, world))
