"""Evaluate a trained model: its likelihood, its samples, and how well its likelihood classifies.

    python evaluate.py --out_dir=out/fashion
    python evaluate.py --out_dir=out/shapes --parts=samples --steps=1,2,4,8 --denoise=learned --num_samples=600
    python evaluate.py --out_dir=out/t2i --parts=samples --decoder=decoder.pt2 --num_samples=10000

- likelihood: -log p of held-out images in nats: of each step and of the trajectory; and the bound for the image alone
- samples: do they look like the data, and do they show what their captions say? Depending on the data set, the measure
  is a Frechet distance between Gaussians fitted to pixels or latents, the class of the nearest training image, the
  exact detector of shapes, or the judge of emoji
- classifier: how often the true caption of a held-out image is the likeliest of ten

Prints each part when it is done. Writes out_dir/evaluate.json and, into out_dir/evaluate/, the first samples and, for
several step counts, quality.png. With --decoder, a model of latents also writes its samples there as a folder of PNGs,
and as many real images into evaluate/real, for clean-fid or torch-fidelity (docs/data.md). A flow-matching model has
the part "samples" only.
"""

import copy
import itertools
import json
import math
from collections import ChainMap
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from beyond import restarted_steps
from configurator import configure
from data import dataset_class_captions, open_dataset
from evidence import judge as judges
from evidence.detector import TASKS, task_prompts
from evidence.judge import frechet_distance, nearest_labels
from evidence.scores import (credits, curves_of, first_images, mean_and_error, proportion, scores_of_tasks, show,
                             shrunk)
from flow import forward_trajectory
from model import bits_per_dim
from pipeline import TrainedModel
from plumbing.comparison import empty_folder, open_real_images, write_folder, write_real_images
from plumbing.images import contact_sheet, save_image
from plumbing.layouts import make_folder
from plumbing.loader import validation_batches
from plumbing.plots import plot_quality
from plumbing.runtime import (exact_products, from_first_rank, gathered, leave_ranks, meet_ranks, note, one_line_errors,
                              rank_and_world, start_ranks)

out_dir = "out/digits"  # the folder of ckpt.pt and denoiser.pt; gets evaluate.json
parts = ""  # some of likelihood,samples,classifier; empty: all that the model has
val_examples = 500  # held-out images for likelihood and classifier
num_samples = 1000  # samples for each combination of steps, denoise and guidance
steps: int | tuple = 0  # T, the number of reverse steps, or several to compare; 0: as trained, or 50 for flow matching
denoise = "none,score,learned"  # how to denoise an NTM's samples; "learned" is skipped without denoiser.pt
guidance: float | tuple = 1.0  # weight of classifier-free guidance for samples, one or several
beside = ""  # evaluate.json of another model whose samples the figure shows too
restarts = 0  # (ours) times to add noise back and repeat a step; in the first half of the steps, except the first
temperature = 1.0  # (ours) factor on the noise of the last step; 0.3: less grain, but no longer exact sampling
best_of = 1  # (ours) candidates per sample, of which the likeliest under the model is kept
judge = ""  # for shards with labels: a classifier made by `python -m evidence.judge`, to score samples
decoder = ""  # for a model of latents: a program saved by torch.export, from latents (B, C, h, w) to images in [-1, 1]
real_dir = ""  # with decoder: shards of the real images (a judge needs labels); empty: those that `data.py encode` read
t_min = 0.02  # noise level where trajectories end
shift = 1.0  # e^m of flow matching's time grid for samples; 1: equal steps
trajectories = 4  # trajectories per image, for the tighter bound and for the classifier
data_dir = ""  # the model's data, if they have moved; empty: where they were in training
seed = 0  # the seed of samples and of the noise of held-out images
batch_size = 100  # images sampled or scored at once
device = ""  # cuda, mps or cpu; empty: the best available

# ---------------------------------------------------------------------------------------------------------------
# The likelihood


def held_out(model, dataset):
    """Yield this rank's batches of held-out images, (tokens, text, captions, generator), always with the same noise."""
    rank, world = rank_and_world()
    length = model.network.config.text_len
    batches = validation_batches(dataset, model.tokenizer, length, val_examples, model.device, rank, world, batch_size)
    total = len(range(0, min(val_examples, len(dataset)), batch_size)[rank::world])
    for images, *rest in tqdm(batches, "held-out images", total, leave=False, unit="batch", disable=rank > 0):
        yield model.network.patchify(images), *rest


def trajectories_of(network, x0, ts, text, generator, several):
    """-log p of a trajectory's parts, (B, T+1), and bounds (several, B), Eq. (14), in nats, of images x0 (B, N, D).

    Each image has `several` trajectories from one x_{t_0}, each with a bound; the parts are those of the first, which
    is the trajectory of train.py's validation.
    """
    times, bounds = ts.expand(len(x0), -1), []
    with exact_products(x0.device):
        for k in range(several):
            noise = torch.randn(*times.shape, *x0.shape[1:], generator=generator, device=x0.device)
            if k == 0:
                of_x_t0 = noise[:, 0].clone()
            noise[:, 0] = of_x_t0
            x = forward_trajectory(x0, times, noise=noise)
            nll, bound = network.trajectory_bound(x, times, text)
            bounds.append(bound)
            if k == 0:
                of_the_first = nll
    return of_the_first, torch.stack(bounds)


def nats_of(model, batches, ts, several=1):
    """{name: nats (n,)} of all ranks' images: -log p of each step, cleanest first, of the trajectory, and the bounds.

    Eqs. (11), (12) and (14). batches: as of held_out. several: from 2 on, a tighter bound is added, -log of the mean of
    exp(-bound) over so many trajectories from the same x_{t_0}. It lies between the bound and -log p(x_{t_0}), and more
    trajectories bring it nearer to the latter (arXiv:1509.00519).
    """
    nats = []
    for x0, text, _, generator in batches:
        nll, bounds = trajectories_of(model.network, x0, ts, text, generator, several)
        tighter = math.log(several) - torch.logsumexp(-bounds, dim=0)
        nats.append(torch.cat([nll, bounds[0][:, None], tighter[:, None]], dim=1).cpu())
    nats = torch.cat(sum(gathered(nats), []))
    if not nats.isfinite().all():
        raise ValueError("the likelihood of some images is not finite: training diverged, use another checkpoint")
    found = {f"step {k}": nats[:, k] for k in range(len(ts) - 1)}
    found |= {"trajectory": nats[:, :-2].sum(dim=1), "bound": nats[:, -2]}
    if several > 1:
        found[f"bound of {several} trajectories"] = nats[:, -1]
    return found


def evaluate_likelihood(model, dataset):
    """Means of nats_of, in nats and per dimension, with standard errors; and bits per dimension, Eq. (15), of 8-bit
    images if the model has a density at t_min = 0."""
    config = model.network.config
    dims = config.num_tokens * config.token_dim
    results = {}
    for name, nats in nats_of(model, held_out(model, dataset), model.ts, several=trajectories).items():
        results[name] = mean_and_error(nats) | {"per_dimension": nats.mean().item() / dims}
    if config.parametrization == "direct" and dataset.eight_bit:
        ts = config.time_grid(0.0, len(model.ts) - 1).to(model.device)
        bound = nats_of(model, held_out(model, dataset), ts)["bound"]
        results["bits per dimension"] = mean_and_error(bits_per_dim(bound, dims))
    return results


def caption_log_likelihoods(network, x, ts, candidates):
    """Lower bounds (B, K) on log p(x_{t_0} | caption) in nats, Eq. (14), for K captions of each image.

    x (B, T+1, N, D) at ts (B, T+1): one trajectory of each image, the same for its K captions, except for a coupled
    x_1, which depends on the caption, Eq. (36). candidates: ids (B, K, L).
    """
    with exact_products(x.device):
        bounds = [network.trajectory_bound(x, ts, text)[1] for text in candidates.unbind(dim=1)]
    return -torch.stack(bounds, dim=1)


def evaluate_classifier(model, dataset):
    """How often an image's own caption is the likeliest of ten: one per class, or its own and nine of other images."""
    classes = dataset_class_captions(model.settings["dataset"])
    rank, world = rank_and_world()
    pool = classes or sorted({dataset[i][1] for i in range(min(max(1000, val_examples), len(dataset)))})
    if len(pool) < 10:
        note(f"there are only {len(pool)} held-out captions: the classifier chooses among these")
    model.warn_about_captions(pool)
    hits = []
    for batch, (x0, _, captions, generator) in enumerate(held_out(model, dataset)):
        first = (rank + batch * world) * batch_size
        if classes:
            candidates = [classes] * len(x0)
            truth = torch.tensor(dataset.labels[first:first + len(x0)]).long()
        else:
            candidates = []
            truth = torch.zeros(len(x0), dtype=torch.long)
            rng = np.random.default_rng([seed, first])
            for caption in captions:
                others = [other for other in pool if other != caption]
                candidates.append([caption, *rng.permutation(others)[:9].tolist()])
        text = torch.stack([model.encode(ten) for ten in candidates])
        ts = model.ts.expand(len(x0), -1)
        log_p = 0.0
        for _ in range(trajectories):
            x = forward_trajectory(x0, ts, generator)
            log_p = log_p + caption_log_likelihoods(model.network, x, ts, text)
        if not log_p.isfinite().all():
            raise ValueError("the likelihood of some captions is not finite: training diverged, use another checkpoint")
        hits += credits(log_p, text, truth.to(text.device))
    return {"accuracy": proportion(sum(gathered(hits), []))}


# ---------------------------------------------------------------------------------------------------------------
# Samples


def captions_of_samples(model, dataset):
    """The caption of each sample, and for shapes the GenEval task of each."""
    if model.settings["dataset"] == "shapes":
        tasks, captions = zip(*task_prompts(-(-num_samples // len(TASKS))))
        return captions, tasks
    if judge:
        return [record["captions"][0] for record in judges.labels_of(dataset, num_samples)], ()
    classes = dataset_class_captions(model.settings["dataset"])
    if classes:
        return [classes[i % len(classes)] for i in range(num_samples)], ()
    return [dataset[i % len(dataset)][1] for i in range(num_samples)], ()


def draw_samples(model, captions, strength, folder):
    """Draw a sample for each caption, on all ranks together: (n, C, H, W) on the CPU. strength: of guidance.

    With a decoder, the decoded images are also written into a folder, and returned if there is a judge.
    """
    rank, world = rank_and_world()
    if decoder:
        from_first_rank(empty_folder, folder)
    samples = {}
    for start in tqdm(range(0, len(captions), batch_size)[rank::world], "samples", leave=False, unit="batch",
                      disable=rank > 0):
        numbers = range(len(captions))[start:start + batch_size]
        of_batch = [captions[i] for i in numbers]
        how = strength, seed, False, best_of, restarts, temperature
        drawn, *_ = model.sample_trajectories(of_batch, numbers, *how)
        if decoder:
            images = model.to_images(drawn)
            write_folder(folder, numbers, images)
            drawn = images if judge else drawn
        samples[start] = model.clipped(drawn).cpu()
    samples = ChainMap(*gathered(samples))
    return torch.cat([samples[start] for start in sorted(samples)])


def labelled_images(model, latents):
    """The held-out images that latents were made of, with labels for the judge. Raises ValueError if there are none."""
    images = open_real_images(latents, model.to_images, model.device, real_dir)
    if images is None:
        raise ValueError(f"judge is {judge!r}, which needs the labels of real images: name their shards by --real_dir")
    return images


def scores_of_judge(model, images, dataset):
    """The judge's scores of samples: whether they show the labels of their captions, and how far from real images."""
    train_set = None
    if model.settings["data_dir"] and not model.latents:  # data_dir is empty in a checkpoint made for sampling
        try:
            train_set = open_dataset(model.settings, "train")
        except (OSError, ValueError) as error:
            note(f"without the model's training images their distance is left out: {error}")
    found = judges.compare(judge, images, dataset, train_set)
    return {key: proportion(value) if type(value) is list else value for key, value in found.items()}


def scores_by_the_data(model, images, dataset):
    """The Frechet distance of samples to held-out images, and for a data set with classes how often the nearest
    training image is of the class asked for."""
    results = {}
    real = first_images(dataset, 5000)
    if min(len(images), len(real)) >= 10:
        results["frechet_distance"] = frechet_distance(shrunk(images), real)
    else:
        note(f"a Frechet distance needs 10 samples and held-out images, but there are {len(images)} and {len(real)}")
    classes = dataset_class_captions(model.settings["dataset"])
    if classes:
        train_set = open_dataset(model.settings, "train", data_dir)
        examples = first_images(train_set, len(train_set))
        nearest = nearest_labels(images, examples, torch.tensor(train_set.labels)).tolist()
        hits = [label == i % len(classes) for i, label in enumerate(nearest)]
        results["nearest_is_of_the_class"] = proportion(hits)
    return results


def evaluate_samples(model, dataset, strength):
    """Images/s of samples with a strength of guidance, and their scores by detector, judge or data."""
    captions, tasks = captions_of_samples(model, dataset)
    name = f"{model.kind}_{len(model.ts) - 1}_{model.denoise}"
    if isinstance(guidance, tuple) and len(guidance) > 1:
        name += f"_guidance_{strength:g}"
    path = Path(out_dir) / "evaluate" / name
    images = draw_samples(model, captions, strength, path)
    seconds = max(gathered(sum(model.seconds.values())))
    if rank_and_world()[0] == 0:
        shown = model.to_images(images[:10].to(model.device)) if decoder and not judge else images[:10]
        save_image(contact_sheet(shown, captions[:10], columns=10), path.with_name(f"{name}.png"))
    if tasks:
        scores = scores_of_tasks(images, captions, tasks)
    elif judge:
        scores = scores_of_judge(model, images, dataset)
    else:
        scores = scores_by_the_data(model, images, dataset)
    return {"images_per_s": len(images) / seconds} | scores


# ---------------------------------------------------------------------------------------------------------------
# The script

PARTS = {"likelihood": evaluate_likelihood, "samples": evaluate_samples, "classifier": evaluate_classifier}


def parts_of(model):
    """The parts to evaluate: those asked for, or all that the model has. Raises ValueError for an unknown part."""
    possible = list(PARTS) if model.kind == "ntm" else ["samples"]
    chosen = parts.split(",") if parts else possible
    wrong = [part for part in chosen if part not in possible]
    if wrong:
        what = "flow matching" if model.kind == "fm" else "an NTM"
        raise ValueError(f"part {wrong[0]!r} is unknown for {what}: choose among {', '.join(possible)}")
    return chosen


def load_decoder(model):
    """Load the decoder, if there is one. Raises ValueError for settings that need a decoder."""
    if decoder:
        model.load_decoder(decoder)
    elif judge and model.latents:
        raise ValueError(f"judge is {judge!r}, but a judge needs images and this model makes latents: give --decoder "
                         "as well, or leave it out")
    elif real_dir:
        raise ValueError(f"real_dir is {real_dir!r}, but only decoded samples are compared with real images: give "
                         "--decoder as well, or leave it out")


def sampling_runs(model, counts, strengths):
    """A (model, guidance) for each combination of settings. Raises ValueError if none is left or one is impossible."""
    data = model.settings["dataset"]
    if judge and data != "shards":
        raise ValueError(f"judge is {judge!r}, which needs labels, but the model's data are {data}: leave it out")
    runs = []
    ways = denoise.split(",") if model.kind == "ntm" else ["none"]
    for count, way, strength in itertools.product(counts, ways, strengths):
        reason = model.why_no_denoiser(count) if way == "learned" else ""
        if reason:
            note(f"{reason}: its samples are left out")
            continue
        run = copy.copy(model)  # the copy shares the networks
        run.set_sampling(count, way, t_min, shift)
        run.check_sampling(strength, best_of, restarts, temperature)
        runs.append((run, strength))
    if not runs:
        raise ValueError(f"denoise is {denoise!r}, which leaves no samples to measure: add 'score' or 'none'")
    return runs


def measure_samples(runs, dataset, strengths):
    """Yield for each run its title, its results, and the results as a row for plot_quality."""
    for model, strength in runs:
        found = evaluate_samples(model, dataset, strength)
        count = len(model.ts) - 1
        row = {"curve": "flow matching" if model.kind == "fm" else f"NTM, {model.denoise}",
               "passes": count + restarts * len(restarted_steps(count)) + (model.denoise == "learned"),
               "guidance": strength, **found}
        title = f"samples, {count} steps" + (f", {model.denoise}" if model.kind == "ntm" else "")
        if len(strengths) > 1:
            title += f", guidance {strength:g}"
        yield title, found, row


@one_line_errors()
@torch.no_grad()
def main(config):
    where, rank, _ = start_ranks(config["device"])
    counts = steps if isinstance(steps, tuple) else (steps,)
    strengths = guidance if isinstance(guidance, tuple) else (guidance,)
    if len(counts) > 1 and len(strengths) > 1:
        raise ValueError(f"steps is {steps} and guidance {guidance}, which are both several values: vary one at a time")
    model = TrainedModel(out_dir, where, counts[0], "none", t_min, shift)
    chosen = parts_of(model)
    load_decoder(model)
    dataset = open_dataset(model.settings, "val", data_dir)
    others = curves_of(beside) if beside else []
    folder = Path(out_dir) / "evaluate"
    make_folder(folder)
    runs = sampling_runs(model, counts, strengths) if "samples" in chosen else []
    if decoder and runs:
        from_first_rank(empty_folder, folder / "real")
        write_real_images(folder / "real", dataset, num_samples, model.to_images, model.device, real_dir, batch_size)

    results = {"config": config, "iteration": model.iteration}
    curves = []
    for part in chosen:
        if part == "samples":
            labelled = labelled_images(model, dataset) if judge and model.latents else dataset
            for title, found, row in measure_samples(runs, labelled, strengths):
                results[title] = found
                curves.append(row)
                show(title, found)
        else:
            results[part] = PARTS[part](model, dataset)
            show(part, results[part])
    if curves:
        results["curves"] = curves
    if rank == 0:
        figure = plot_quality(curves + others)
        (folder / "quality.png").unlink(missing_ok=True)  # left by an earlier evaluation
        if figure:
            save_image(figure, folder / "quality.png")
        path = Path(out_dir) / "evaluate.json"
        path.write_text(json.dumps(results, indent=1, allow_nan=False), "utf-8")
        print(f"wrote {path}")
    meet_ranks()
    leave_ranks()


if __name__ == "__main__":
    main(configure(globals()))
