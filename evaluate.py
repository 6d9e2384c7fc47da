"""Measures a trained model: its likelihood, its pictures, and what its likelihood is good for.

    python evaluate.py --out_dir=out/fashion
    python evaluate.py --out_dir=out/shapes --steps=4 --denoise=learned --parts=pictures --num_samples=600
    python evaluate.py --out_dir=out/fashion_fm --steps=4,8,50

Prints a table and leaves out_dir/evaluate.json and out_dir/evaluate/, a row of pictures for each way to draw them. The
parts:
- likelihood: nats of each step, of the trajectory, and the bound on the data's own, on held-out pictures
- pictures: do they look like the data, and do they show what the captions say? By no learned judge: Frechet distance
  between Gaussians fitted to pixels, the class of the nearest training picture, the exact detector of shapes
- classifier: which of ten captions makes a held-out picture most likely
- outliers: can the likelihood tell pictures of another set?

A flow-matching model has pictures only.
"""

import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import pictures
from configurator import at_least_one, configure, one_line_errors
from data import dataset_class_captions, get_dataset
from detector import TASKS, follows, task_prompts
from flow import forward_log_prob, forward_trajectory
from loop import collate, open_dataset, validation_batches
from model import gaussian_nll, null_caption
from pictures import dequantize
from ranks import gathered, leave_ranks, rank_and_world, start_ranks
from sampler import Sampler

out_dir = "out/digits"  # holds ckpt.pt and, for denoise "learned", denoiser.pt
parts = "likelihood,pictures,classifier,outliers"
val_examples = 500  # held-out pictures for the likelihood, and for what it is good for
num_samples = 1000  # pictures drawn for each step count and way to clean them
steps: int | tuple = 0  # T, or several; 0: as trained, or 50 for flow matching
denoise = "none,score,learned"  # of an NTM; what has no denoiser.pt is left out
guidance = 1.0
t_min = 0.02  # where trajectories end
draws = 4  # of noise for each picture, shared by its captions
data_dir = ""  # where fashion's files are; empty: as for the model
seed = 0
batch_size = 100
device = ""  # cuda, mps or cpu; empty: the best there is

# ---------------------------------------------------------------------------------------------------------------
# Likelihood


def trajectory_bound(model, x, ts, text):
    """-log p of each part of trajectories x (B, T+1, N, D) drawn at times ts (B, T+1), (B, T+1), and the single-sample
    upper bound on -log p(x_{t_0}) that they make with log q(x_{t_1:T} | x_{t_0}), (B,); both in nats."""
    nll = model.trajectory_nll(x, ts, text)
    return nll, nll.sum(dim=1) + forward_log_prob(x, ts)


def bits_per_dim(nats, dims):
    """Nats of dequantised 8-bit data in [-1, 1], whose bins are 2^-7 wide, to bits for each of its numbers."""
    return nats / dims / math.log(2) + 7


def caption_log_likelihoods(model, x, ts, candidates):
    """log p(x_{t_0:T} | caption), (B, K), of trajectories x (B, T+1, N, D), ts (B, T+1), candidates (B, K, L).

    What no caption changes, the transporter's work, is done once.
    """
    B, levels = x.shape[:2]
    steps = torch.full((B,), levels - 1, device=x.device)
    u, logdet = model.transporter(x.flatten(0, 1), ts.flatten(), steps.repeat_interleave(levels))
    u, logdet = u.unflatten(0, (B, levels)), logdet.unflatten(0, (B, levels))
    nll = [model.transitions_in_u(u, logdet, ts, text, steps)[0].sum(dim=1) for text in candidates.unbind(dim=1)]
    return -torch.stack(nll, dim=1) - gaussian_nll(x[:, -1:])


def auroc(inside, outside):
    """The chance that a number of `outside` exceeds one of `inside`, both (n,): 0.5 says nothing, 1 tells all."""
    return ((outside[:, None] > inside).double() + 0.5 * (outside[:, None] == inside).double()).mean().item()


# ---------------------------------------------------------------------------------------------------------------
# Pictures


def frechet_distance(a, b):
    """Between the Gaussians fitted to the pixels of two sets of pictures, (n, C, H, W) and (m, C, H, W):
    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Blur shows in it as missing variance."""
    (mean_a, S_a), (mean_b, S_b) = ((x.mean(0), x.T.cov()) for x in (a.flatten(1).double(), b.flatten(1).double()))
    values, vectors = torch.linalg.eigh(S_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ S_b @ root).clamp(min=0).sqrt().sum()  # of S_a S_b the same eigenvalues
    return ((mean_a - mean_b).square().sum() + S_a.trace() + S_b.trace() - 2 * cross).item()


def nearest_labels(images, examples, labels):
    """For each picture (n, C, H, W) the label (n,) of the nearest of the examples (m, C, H, W), by squared distance."""
    return labels[torch.cdist(images.flatten(1), examples.flatten(1)).argmin(dim=1)]


def share(hits):
    """The mean of a list of booleans and its standard error."""
    mean = sum(hits) / len(hits)
    return {"mean": mean, "standard_error": math.sqrt(mean * (1 - mean) / len(hits))}


def average(values):
    """The mean of a tensor (n,) and its standard error."""
    return {"mean": values.mean().item(), "standard_error": (values.std() / math.sqrt(len(values))).item()}


# ---------------------------------------------------------------------------------------------------------------
# The parts, each {name: what was measured}; `model` etc. are those of a Sampler


def held_out(sampler, dataset, count, bar):
    """This rank's share of the held-out pictures (tokens, text, captions, generator), always with the same noise."""
    for images, text, captions, generator in validation_batches(
            dataset, sampler.tokenizer, sampler.model.config.text_len, count, sampler.device, *rank_and_world(),
            batch_size=batch_size):
        yield sampler.model.patchify(images), text, captions, generator
        advance(bar)


def advance(bar):
    """A batch is done, and probably one on each other rank."""
    bar.update(min(rank_and_world()[1], bar.total - bar.n))


def together(batches):
    """The batches of all ranks, a list of tensors each, as one tensor on the CPU."""
    return torch.cat([batch for share in gathered([batch.cpu() for batch in batches]) for batch in share])


def evaluate_likelihood(sampler, dataset, bar):
    """Nats of each step, cleanest first, of the trajectory and of the bound; and bits per dimension at t_min = 0."""
    model, config = sampler.model, sampler.model.config
    dims = config.num_tokens * config.token_dim
    grids = {"bound": sampler.grid}
    if config.parametrization == "direct" and dataset.eight_bit:
        grids["bits per dimension"] = config.time_grid(0.0, len(sampler.grid) - 1).to(sampler.device)
    results = {}
    for name, grid in grids.items():
        nlls, bounds = [], []
        for x0, text, _, generator in held_out(sampler, dataset, val_examples, bar):
            ts = grid.expand(len(x0), -1)
            nll, bound = trajectory_bound(model, forward_trajectory(x0, ts, generator), ts, text)
            nlls.append(nll)
            bounds.append(bound)
        nll, bound = together(nlls), together(bounds)
        if name == "bound":
            columns = {f"step {k}": nll[:, k] for k in range(nll.shape[1] - 1)}
            for key, values in {**columns, "trajectory": nll.sum(dim=1), "bound": bound}.items():
                results[key] = average(values) | {"per_dimension": values.mean().item() / dims}
        else:
            results[name] = average(bits_per_dim(bound, dims))
    return results


def evaluate_pictures(sampler, bar, train_set, val_set):
    """How fast they are drawn, how near to the data they are, and whether they show what the captions say."""
    classes = dataset_class_captions(sampler.settings["dataset"])
    is_shapes = sampler.settings["dataset"] == "shapes"
    if is_shapes:
        prompts = task_prompts(-(-num_samples // len(TASKS)))
        captions = [caption for _, caption in prompts]
    elif classes:
        captions = [classes[i % len(classes)] for i in range(num_samples)]
    else:
        captions = [val_set[i % len(val_set)][1] for i in range(num_samples)]
    drawn, (rank, world) = {}, rank_and_world()
    for start in range(0, len(captions), batch_size)[rank::world]:
        numbers = range(start, min(start + batch_size, len(captions)))
        drawn[start] = sampler.draw([captions[i] for i in numbers], numbers, guidance, seed)[0].cpu()
        advance(bar)
    drawn = {start: images for share in gathered(drawn) for start, images in share.items()}
    images = torch.cat([drawn[start] for start in sorted(drawn)])
    seconds = max(gathered(sum(sampler.seconds.values())))
    name = f"{sampler.kind}_{len(sampler.grid) - 1}_{sampler.denoise}.png"
    if rank == 0:
        pictures.save(pictures.grid(images[:10], captions[:10], columns=10), Path(out_dir) / "evaluate" / name)
    results = {"images_per_s": len(images) / seconds}
    if is_shapes:
        whole = [follows(image, caption) for image, caption in zip(images, captions)]
        results["strictly"] = share(whole)
        hits = {task: [follows(image, caption, task) for image, (name, caption) in zip(images, prompts) if name == task]
                for task in TASKS}
        results |= {task: share(hits[task]) for task in TASKS}
        # GenEval's overall score: the mean of the tasks'
        errors = [results[task]["standard_error"] for task in TASKS]
        results["overall"] = {"mean": sum(results[task]["mean"] for task in TASKS) / len(TASKS),
                              "standard_error": math.hypot(*errors) / len(TASKS)}
    elif classes:
        real = collate(val_set.__getitems__(list(range(min(5000, len(val_set))))))[0]
        results["frechet_distance"] = frechet_distance(images, real)
        examples = collate(train_set.__getitems__(list(range(len(train_set)))))[0]
        found = nearest_labels(images, examples, torch.as_tensor(train_set.labels.copy()))
        hits = [label == i % len(classes) for i, label in enumerate(found.tolist())]
        results["nearest_is_of_the_class"] = share(hits)
    return results


def evaluate_classifier(sampler, dataset, bar):
    """How often the true caption is the likeliest of ten: of the classes', or of ten held-out pictures'."""
    classes, (rank, world) = dataset_class_captions(sampler.settings["dataset"]), rank_and_world()
    pool = sorted({dataset[i][1] for i in range(min(max(1000, val_examples), len(dataset)))})
    hits, first = [], rank * batch_size
    for x0, _, captions, noise in held_out(sampler, dataset, val_examples, bar):
        if classes:
            candidates = [classes] * len(x0)
            truth = torch.tensor([dataset.label(first + i) for i in range(len(x0))])
        else:
            generator = np.random.default_rng([seed, first])
            others = [generator.permutation([c for c in pool if c != caption])[:9].tolist() for caption in captions]
            candidates, truth = [[caption, *nine] for caption, nine in zip(captions, others)], torch.zeros(len(x0))
        text = torch.stack([sampler.encode(ten) for ten in candidates])
        ts, total = sampler.grid.expand(len(x0), -1), 0
        for _ in range(draws):
            total = total + caption_log_likelihoods(sampler.model, forward_trajectory(x0, ts, noise), ts, text)
        hits += (total.argmax(dim=1).cpu() == truth).tolist()
        first += world * batch_size
    return {"accuracy": share(sum(gathered(hits), []))}


def outlier_sets(name, image_size, channels, count, data_dir):
    """Pictures (count, C, H, W) that are not of the data set `name`: noise, and another set brought to its size."""
    yield "noise", 2 * torch.rand(count, channels, *image_size, generator=torch.Generator().manual_seed(seed)) - 1
    other, size = ("fashion", 28) if name == "digits" else ("digits", 8)
    try:
        ds = get_dataset(other, "val", size, 1, data_dir=data_dir)
    except OSError:  # fashion's files are not on every machine
        return
    images = collate(ds.__getitems__(list(range(min(count, len(ds))))))[0]
    images = F.interpolate(images, image_size, mode="bilinear", antialias=True)
    yield other, dequantize(images, torch.Generator().manual_seed(seed)).expand(-1, channels, -1, -1)


def evaluate_outliers(sampler, dataset, bar):
    """AUROC of telling another set's pictures from held-out ones, without a caption, by -log p of the trajectory, by
    the bound, and by a single step's."""
    model, (height, width) = sampler.model, sampler.model.config.image_size

    def scores(x0, generator):
        ts = sampler.grid.expand(len(x0), -1)
        text = null_caption(torch.zeros(len(x0), model.config.text_len, dtype=torch.long, device=x0.device))
        nll, bound = trajectory_bound(model, forward_trajectory(x0, ts, generator), ts, text)
        columns = {f"step {k}": nll[:, k] for k in range(nll.shape[1] - 1)}
        return {"trajectory": nll.sum(dim=1), "bound": bound, **columns}

    def scores_of(batches):
        parts = [scores(x0, generator) for x0, generator in batches]
        names = next(filter(None, gathered([*parts[0]] if parts else [])))
        return {name: together([part[name] for part in parts]) for name in names}

    inside = scores_of((x0, generator) for x0, _, _, generator in held_out(sampler, dataset, val_examples, bar))
    results, (rank, world) = {}, rank_and_world()
    for name, images in outlier_sets(sampler.settings["dataset"], (height, width), model.config.channels,
                                     val_examples, data_dir or sampler.settings["data_dir"]):
        x0 = model.patchify(images.to(sampler.device))
        chunks = x0.split(batch_size)[rank::world]
        outside = scores_of((chunk, torch.Generator(sampler.device).manual_seed(seed)) for chunk in chunks)
        results |= {f"{name}, by {key}": auroc(inside[key], outside[key]) for key in inside}
    return results


# ---------------------------------------------------------------------------------------------------------------
# python evaluate.py


def rows(results):
    """The results as lines of a table, name and number."""
    for part, measured in results.items():
        yield part
        for name, value in measured.items():
            if isinstance(value, dict):
                error = f" ± {value['standard_error']:.4f}"
                per_dimension = f"  ({value['per_dimension']:.4f} per dimension)" if "per_dimension" in value else ""
                yield f"  {name:28} {value['mean']:12.4f}{error}{per_dimension}"
            else:
                yield f"  {name:28} {value:12.4f}"


@torch.no_grad()
def main(config):
    where, rank, world = start_ranks(config["device"])
    chosen = parts.split(",")
    known = ["likelihood", "pictures", "classifier", "outliers"]
    for name in chosen:
        if name not in known:
            raise ValueError(f"part {name!r} is unknown: choose among {', '.join(known)}")
    at_least_one(config, "val_examples", "num_samples", "draws", "batch_size")
    counts = steps if isinstance(steps, tuple) else (steps,)
    sampler = Sampler(out_dir, where, counts[0], "none", t_min)
    settings = sampler.settings
    train_set, val_set = (open_dataset(settings, split, data_dir) for split in ("train", "val"))

    if sampler.kind == "fm":
        chosen, ways = ["pictures"], ["none"]
    else:
        ways = [way for way in denoise.split(",") if way != "learned" or (Path(out_dir) / "denoiser.pt").exists()]
    drawers = {f"pictures, {len(s.grid) - 1} steps" + (f", {way}" if s.kind == "ntm" else ""): s
               for count in counts for way in ways for s in [Sampler(out_dir, where, count, way, t_min)]}
    if sampler.latents:
        chosen = [name for name in chosen if name == "likelihood" and sampler.kind == "ntm"]
        if not chosen:
            raise ValueError(f"{out_dir} holds a model of latents: only an NTM's likelihood can be measured")

    batches = -(-min(val_examples, len(val_set)) // batch_size)
    likelihoods = batches * (1 + (sampler.kind == "ntm" and sampler.model.config.parametrization == "direct"))
    drawn = -(-num_samples // batch_size) * len(drawers)
    work = {"likelihood": likelihoods, "pictures": drawn, "classifier": batches, "outliers": batches}
    results = {}
    total = sum(work[name] for name in chosen)
    with tqdm(total=total, unit="batch", dynamic_ncols=True, disable=rank > 0) as bar:
        for name in chosen:
            bar.set_description(name)
            if name == "likelihood":
                results[name] = evaluate_likelihood(sampler, val_set, bar)
            elif name == "pictures":
                results |= {key: evaluate_pictures(drawer, bar, train_set, val_set) for key, drawer in drawers.items()}
            elif name == "classifier":
                results[name] = evaluate_classifier(sampler, val_set, bar)
            else:
                results[name] = evaluate_outliers(sampler, val_set, bar)
    if rank == 0:
        print("\n".join(rows(results)))
        path = Path(out_dir) / "evaluate.json"
        path.write_text(json.dumps({"config": config, "iteration": sampler.iteration, **results}, indent=1))
        print(f"wrote {path}")
    leave_ranks()


if __name__ == "__main__":
    config = configure(globals())
    with one_line_errors():
        main(config)
