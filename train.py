"""Trains a Normalizing Trajectory Model; without arguments, on handwritten digits, minutes on a CPU.

    python train.py config/shapes.py --batch_size=32
    torchrun --nproc_per_node=8 train.py config/shapes32.py
    python train.py config/digits_fm.py                              # flow matching instead: the peer
    python train.py config/digits_tune.py                            # an NTM that starts from it
    python train.py config/sit.py --init_from=sit:SiT-XL-2-256.pt    # or from published weights
    python train.py config/shapes_more.py                            # an NTM that goes on from another, on other terms

Leaves in out_dir: ckpt.pt, log.jsonl and, from every validation, samples/ITERATION.png.
"""

import math
from pathlib import Path

import torch

import checkpoint
import pictures
from configurator import configure, one_line_errors
from flow import forward_log_prob, forward_trajectory
from loop import STARTS, find_start, fit, load_data, validation_batches
from model import NTM, NTMConfig
from ranks import all_sum, autocast, start_ranks
from sit import load_sit

# ---- run
out_dir = "out/digits"
objective = "ntm"  # or "fm": flow matching, with the same network
init_from = "scratch"  # "resume": continue out_dir/ckpt.pt; "auto": if there; or any other ckpt.pt; or sit:PATH
seed = 0  # with the iteration, all of a run's randomness
device = ""  # cuda, mps or cpu; empty: the best there is
bfloat16: bool | None = None  # autocast; None: on CUDA only
compile: bool | None = None  # torch.compile; None: on CUDA only
workers = 0  # processes that load data, per rank; 0: load in the training process

# ---- data
dataset = "digits"
data_dir = ""  # which shards: a folder, a glob, or NAME-{00000..00099}.tar; or where fashion's files are
crop = "center"  # of the shards' pictures that are not square; or "random"
flip = False  # mirror every second picture of the shards
latent_scale = 0.0  # what latents are multiplied by; 0: what `data.py encode` measured. SiT's want 0.18215
bad_limit = 0.01  # the share of unusable examples, replaced by others, at which a run stops
image_size: int | tuple = 8
channels = 1
tokenizer = "captions"  # or "emoji", "gpt2", a file NAME.tiktoken; or "classes": captions are "class 0" to "class 999"
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
aux_weight = 2.5  # of staying close to the flow-matching model one starts from; goes to 0 by a cosine

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
wandb_log = False  # the log to Weights & Biases as well
wandb_project = "ntm"
wandb_run_name = ""

config = configure(globals())

NETWORK = ("image_size", "channels", "patch_size", "text_len", "width", "depth", "heads", "tokenizer")
TRANSPORTER = ("transporter_width", "transporter_blocks", "transporter_layers", "transporter_heads")


def starting_point(name):
    """The trained network that init_from names, sit:PATH or the path of a checkpoint of flow matching or of an NTM, and
    what it decides about an NTM that starts from it, {setting: value}."""
    if name.startswith("sit:"):
        network = load_sit(name.removeprefix("sit:"))
        decided = {key: getattr(network, key) for key in NETWORK if hasattr(network, key)}
        decided |= {"predictor": "sit", "tokenizer": f"classes:{network.classes}", "text_len": 1}
        return network, decided | {"parametrization": "posterior"}
    if not Path(name).exists():
        raise ValueError(f"init_from {name!r} is neither {', '.join(map(repr, STARTS))}, sit:PATH nor a file")
    trained = checkpoint.load(name, "fm", "ntm", device=device)
    network = checkpoint.network_of(trained, name, device)
    decided = {key: trained["settings"][key] for key in NETWORK}
    if trained["kind"] == "fm":
        return network, decided | {"parametrization": "posterior", "predictor": "captions"}
    decided |= {key: getattr(network.config, key) for key in (*TRANSPORTER, "parametrization", "predictor")}
    return network, decided | {"aux_weight": 0.0}  # there is no flow-matching model to stay close to


with one_line_errors():
    device, rank, world = start_ranks(config["device"])
    if objective not in ("ntm", "fm"):
        raise ValueError(f"objective {objective!r} is unknown: choose 'ntm' or 'fm'")
    base, decided, starts_anew = None, {}, init_from not in STARTS
    resumed = find_start("scratch" if starts_anew else init_from, Path(out_dir) / "ckpt.pt", objective, device)
    if starts_anew and objective == "fm":
        raise ValueError("only an NTM starts from another model: leave objective or init_from out")
    if starts_anew and not resumed:
        base, decided = starting_point(init_from)
    elif resumed:
        decided = resumed["settings"].get("decided", {})
    config |= {**decided, "decided": decided}  # a resumed run has no need of what it started from
    train_set, val_set, tokenizer = load_data(config)
    if dataset == "shards" and train_set.latent:  # for whoever decodes what the model draws
        config["latents"] = {"mean": train_set.mean.flatten().tolist(), "scale": train_set.scale.flatten().tolist()}
    model_config = NTMConfig(vocab_size=tokenizer.vocab_size, **{
        name: config[name] for name in NTMConfig.__dataclass_fields__ if name in config})
    grid = model_config.time_grid(t_min).to(device)
    torch.manual_seed(seed)  # the same initial weights on every rank
    model = checkpoint.NETWORKS[objective](model_config).to(device)

    frozen = None  # the flow-matching model one starts from, as the Gaussian reverse step that it is
    if model_config.parametrization == "posterior" and config["aux_weight"]:
        frozen = NTM(model_config).to(device).requires_grad_(False).eval()
        if resumed and "frozen" not in resumed:
            raise ValueError(f"{out_dir}/ckpt.pt was trained with aux_weight 0: resume it with --aux_weight=0")
    if isinstance(base, NTM):
        model.load_state_dict(base.state_dict())
    elif base:
        model.predictor.adopt(base)
    if frozen:
        frozen.predictor.load_state_dict(resumed["frozen"] if resumed else model.predictor.state_dict())


def losses(network, images, text, draws, i):
    """The loss; with a flow-matching model to start from, -log p plus the distance of the means to its own."""
    if not frozen:
        return {"loss": network(images, text, draws)}
    steps, ts, noise = draws
    with torch.no_grad():
        target, _ = frozen.gaussians(forward_trajectory(model.patchify(images), ts, noise=noise), ts, text, steps)
    nll, aux = network(images, text, draws, target)
    weight = config["aux_weight"] * 0.5 * (1 + math.cos(math.pi * i / config["max_iters"]))
    return {"loss": nll + weight * aux, "nll": nll, "aux": aux, "aux_weight": weight}


@torch.no_grad()
def validate(ema, i):
    """What to log about the averaged model on held-out data, always at the same noise; and a grid of its samples."""
    if rank == 0:
        draw_samples(ema, f"{i:06d}")
    batches = validation_batches(val_set, tokenizer, model_config.text_len, val_examples, device, rank, world)
    return validate_ntm(ema, batches) if objective == "ntm" else validate_fm(ema, batches)


def validate_ntm(ema, batches):
    """Nats per dimension: -log p of each step of a trajectory, cleanest first, their mean val_loss, and val_bound, the
    upper bound on -log p(x_{t_min}), which unlike the loss does not depend on the time grid."""
    sums = torch.zeros(len(grid) + 1, device=device)  # of the steps, the bound, and the examples
    for images, text, _, generator in batches:
        ts = grid.expand(len(images), -1)
        x = forward_trajectory(ema.patchify(images), ts, generator)
        with autocast(config, device):
            nll = ema.trajectory_nll(x, ts, text)
        bound = nll.sum(dim=1, keepdim=True) + forward_log_prob(x, ts)[:, None]
        sums += torch.cat([nll[:, :-1], bound, torch.ones_like(bound)], dim=1).sum(dim=0)
    numbers = model_config.num_tokens * model_config.token_dim
    *nll, bound = (all_sum(sums)[:-1] / sums[-1] / numbers).tolist()
    return {"val_loss": sum(nll) / len(nll), "val_bound": bound, **{f"val_step_{k}": v for k, v in enumerate(nll)}}


def validate_fm(ema, batches):
    """val_loss, the mean squared error of the velocity per number."""
    sums = torch.zeros(2, device=device)  # of the loss, and the examples
    for images, text, _, generator in batches:
        with autocast(config, device):
            loss = ema(images, text, ema.draw(len(images), device, generator))
        sums += torch.stack([loss * len(images), torch.tensor(len(images), device=device)])
    return {"val_loss": (all_sum(sums)[0] / sums[1]).item()}


def draw_samples(ema, name):
    """A grid of samples for held-out captions, always from the same noise; an NTM's are score-denoised."""
    _, text, captions, generator = next(validation_batches(
        val_set, tokenizer, model_config.text_len, num_samples, device, batch_size=num_samples))
    if objective == "fm":
        tokens = ema.sample(text, generator=generator)[:, 0]
    else:
        x = ema.invert(ema.sample(text, grid, generator=generator), grid)
        tokens = ema.score_denoise(x, grid, text)
    pictures.save(pictures.grid(ema.unpatchify(tokens), captions), Path(out_dir) / "samples" / f"{name}.png")


if rank == 0:
    sizes = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    parts = ", ".join(f"{name} {size:.2f}M" for name, size in sizes.items())
    print(f"{sum(sizes.values()):.2f}M parameters ({parts}); {len(train_set):,} examples; on {world} x {device.type}")
    for name, fault in list(train_set.header["faults"].items())[:10] if dataset == "shards" else ():
        print(f"{name} is damaged: {fault}")
    if base:
        print(f"starts from {init_from}: " + ", ".join(f"{key} {value}" for key, value in decided.items()))
fit(config, objective, model, train_set, tokenizer, model.draw, losses, validate, (device, rank, world), resumed,
    keep={"frozen": frozen.predictor.state_dict()} if frozen else {})
