"""Measures a trained model: its likelihood, its samples, and what its likelihood is good for.

    python evaluate.py --out_dir=out/fashion
    python evaluate.py --out_dir=out/shapes --parts=samples --steps=1,2,4,8 --denoise=learned --num_samples=600
    python evaluate.py --out_dir=out/shapes --parts=samples --guidance=0,1,2,4 --denoise=learned --num_samples=600

- likelihood: nats of each step and of the trajectory, and the bound on the image's own, of held-out images
- samples: do they look like the data, and show what their captions say? By Frechet distance between Gaussians fitted to
  pixels, class of the nearest training image, the exact detector of shapes, or the judge of emoji (plumbing/judge.py)
- classifier: which of ten captions makes a held-out image most likely
- truth: of shapes, whose true density is known, how many nats each step is above it (plumbing/truth.py); takes minutes

Prints each part as it is done, and leaves out_dir/evaluate.json and in out_dir/evaluate/ the first samples and, for
several step counts, quality.png. Flow matching has samples only, a model of latents the likelihood only.
"""

import copy
import functools
import itertools
import json
import math
from collections import ChainMap, defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from configurator import configure
from data import dataset_class_captions, open_dataset
from flow import bits_per_dim, forward_log_prob, forward_trajectory, reverse_posterior, taken_again
from pipeline import TrainedModel
from plumbing import judge as judges
from plumbing import shapes, truth
from plumbing.detector import TASKS, follows, task_prompts
from plumbing.images import contact_sheet, plot_quality, save_image
from plumbing.judge import frechet_distance, nearest_labels
from plumbing.layouts import make_folder
from plumbing.loader import collate, validation_batches
from plumbing.runtime import gathered, leave_ranks, note, one_line_errors, rank_and_world, start_ranks

out_dir = "out/digits"  # holds ckpt.pt and, for denoise "learned", denoiser.pt
parts = ""  # some of likelihood,samples,classifier,truth; empty: all that the model has
val_examples = 500  # held-out images for the likelihood, and for what it is good for
num_samples = 1000  # for each step count and way to denoise
steps: int | tuple = 0  # T, or for samples several; 0: as trained, or 50 for flow matching
denoise = "none,score,learned"  # of an NTM's samples; "learned" is left out where there is no denoiser.pt
guidance: float | tuple = 1.0  # of samples; or several
beside = ""  # evaluate.json of another model, whose samples join the figure
restarts = 0  # times that each step of a sample's first half but the first is taken again
best_of = 1  # candidates for each sample, of which the likeliest is kept
judge = ""  # of shards with labels: a file of `python -m plumbing.judge`, which says what samples show
t_min = 0.02  # where trajectories end
shift = 1.0  # e^m of the time grid of flow matching's samples
truth_examples = 50  # held-out images that steps are compared with the truth on
trajectories = 4  # of each image, for the classifier, its captions sharing them, and for the tighter bound
data_dir = ""  # where fashion's files are; empty: as for the model
seed = 0
batch_size = 100
device = ""  # cuda, mps or cpu; empty: the best there is


def mean_and_error(values):
    """The mean of a tensor (n,) and, of more than one value, its standard error."""
    error = {"standard_error": (values.std() / math.sqrt(len(values))).item()} if len(values) > 1 else {}
    return {"mean": values.mean().item()} | error


def proportion(hits):
    """The proportion of true ones in a list of booleans, or fractions, and its standard error. Of none or all of n that
    would be 0: there it is Agresti and Coull's, the error with half a hit and half a miss more."""
    n, mean = len(hits), sum(hits) / len(hits)
    p, n = (mean, n) if 0 < mean < 1 else ((n * mean + 0.5) / (n + 1), n + 1)
    return {"mean": mean, "standard_error": math.sqrt(p * (1 - p) / n)}


def shrunk(images):
    """Images (n, C, H, W), the mean of their pixels where they are larger than 32x32."""
    return F.interpolate(images, [min(size, 32) for size in images.shape[2:]], mode="area")


@functools.lru_cache(2)
def first_images(dataset, count):
    """The first images of a data set, or all if there are fewer, shrunk: (count, C, H, W)."""
    numbers = range(min(count, len(dataset)))
    return torch.cat([shrunk(collate(dataset.__getitems__(list(numbers[start:start + 100])))[0])
                      for start in numbers[::100]])


def held_out(model, dataset, count=0):
    """This rank's batches of held-out images (tokens, text, captions, generator), always with the same noise."""
    (rank, world), length, count = rank_and_world(), model.network.config.text_len, count or val_examples
    batches = validation_batches(dataset, model.tokenizer, length, count, model.device, rank, world, batch_size)
    total = len(range(0, min(count, len(dataset)), batch_size)[rank::world])
    for images, *rest in tqdm(batches, "held-out images", total, leave=False, unit="batch", disable=rank > 0):
        yield model.network.patchify(images), *rest


def nats_of(model, batches, ts, several=1):
    """{name: nats (n,)} of all ranks' images: -log p of each step, cleanest first, and of the trajectory, Eqs. (11) and
    (12), and the bound, Eq. (14). batches: as held_out's.

    several: a tighter bound as well, -log of the mean of exp(-bound) over so many trajectories from the same x_{t_0}:
    between the bound and -log p(x_{t_0}), nearer to it the more there are (arXiv:1509.00519)."""
    nats = []
    for x0, text, _, generator in batches:
        noise = torch.randn(several, len(x0), len(ts), *x0.shape[1:], generator=generator, device=x0.device)
        noise[:, :, 0], times = noise[0, :, 0].clone(), ts.expand(len(x0), -1)
        nll, bounds = zip(*(model.network.trajectory_bound(forward_trajectory(x0, times, noise=of_one), times, text)
                            for of_one in noise))
        tighter = math.log(several) - torch.logsumexp(-torch.stack(bounds), dim=0)
        nats.append(torch.cat([nll[0], bounds[0][:, None], tighter[:, None]], dim=1).cpu())
    nats = torch.cat(sum(gathered(nats), []))
    if not nats.isfinite().all():
        raise ValueError("the likelihood of some images is not finite: the model is spoilt")
    by_step = {f"step {k}": nats[:, k] for k in range(len(ts) - 1)}
    tighter = {f"bound of {several} trajectories": nats[:, -1]} if several > 1 else {}
    return {**by_step, "trajectory": nats[:, :-2].sum(dim=1), "bound": nats[:, -2], **tighter}


def curves_of(path):
    """What evaluate.json holds of samples, for plot_quality. Raises ValueError for another file."""
    try:
        return json.loads(Path(path).read_text())["curves"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"beside is {path}, which is no evaluate.json with samples ({error!r})") from error


def evaluate_likelihood(model, dataset):
    """Nats of nats_of; and bits per dimension, Eq. (15), of 8-bit images if the model has a density at t_min = 0."""
    config, nats = model.network.config, nats_of(model, held_out(model, dataset), model.ts, several=trajectories)
    dims = config.num_tokens * config.token_dim
    results = {name: mean_and_error(value) | {"per_dimension": value.mean().item() / dims}
               for name, value in nats.items()}
    if config.parametrization == "direct" and dataset.eight_bit:
        ts = config.time_grid(0.0, len(model.ts) - 1).to(model.device)
        bound = nats_of(model, held_out(model, dataset), ts)["bound"]
        results["bits per dimension"] = mean_and_error(bits_per_dim(bound, dims))
    return results


def caption_log_likelihoods(network, x, ts, candidates):
    """Lower bounds on log p(x_{t_0} | caption) in nats, Eq. (14), (B, K), by one trajectory x (B, T+1, N, D) each at ts
    (B, T+1), the same for K captions each, (B, K, L), but for an x_1 that follows from the caption, Eq. (36)."""
    return -torch.stack([network.trajectory_bound(x, ts, text)[1] for text in candidates.unbind(dim=1)], dim=1)


def credits(log_p, text, truth):
    """A list of B: 1 where the true one, truth (B,), of candidates text (B, K, L) alone has the greatest log_p (B, K),
    1/k if k have, else 0. Candidates of equal ids, captions that are cut alike, have equal log_p but for rounding."""
    alike = (text[:, :, None] == text[:, None]).all(dim=-1)
    greatest = (alike & (log_p == log_p.amax(dim=1, keepdim=True))[:, None]).any(dim=-1)
    return (greatest.gather(1, truth[:, None])[:, 0] / greatest.sum(dim=1)).tolist()


def evaluate_classifier(model, dataset):
    """How often the true caption is the likeliest of ten: one for each class, or those of ten held-out images."""
    classes, (rank, world) = dataset_class_captions(model.settings["dataset"]), rank_and_world()
    pool = classes or sorted({dataset[i][1] for i in range(min(max(1000, val_examples), len(dataset)))})
    if len(pool) < 10:
        note(f"there are only {len(pool)} held-out captions: the classifier chooses among these")
    model.note_what_is_lost(pool)
    hits = []
    for batch, (x0, _, captions, generator) in enumerate(held_out(model, dataset)):
        first = (rank + batch * world) * batch_size
        if classes:
            candidates = [classes] * len(x0)
            truth = torch.tensor(dataset.labels[first:first + len(x0)]).long()
        else:
            rng, truth = np.random.default_rng([seed, first]), torch.zeros(len(x0), dtype=torch.long)
            candidates = [[caption, *rng.permutation([other for other in pool if other != caption])[:9].tolist()]
                          for caption in captions]
        text, ts = torch.stack([model.encode(ten) for ten in candidates]), model.ts.expand(len(x0), -1)
        log_p = sum(caption_log_likelihoods(model.network, forward_trajectory(x0, ts, generator), ts, text)
                    for _ in range(trajectories))
        if not log_p.isfinite().all():
            raise ValueError("the likelihood of some captions is not finite: the model is spoilt")
        hits += credits(log_p, text, truth.to(text.device))
    return {"accuracy": proportion(sum(gathered(hits), []))}


def evaluate_truth(model, dataset):
    """Nats by which -log p(x_s | x_t, caption) of each step but the last is above the true one, cleanest first; and by
    which the Gaussians nearest to the truth are, that with independent numbers and that with the full covariance."""
    network, ts, (rank, world), rows = model.network, model.ts, rank_and_world(), []
    for batch, (x0, text, _, generator) in enumerate(held_out(model, dataset, truth_examples)):
        grid, first = ts.expand(len(x0), -1), (rank + batch * world) * batch_size
        x = forward_trajectory(x0, grid, generator)
        nll, x = network.trajectory_nll(x, grid, text)[:, 1:-1].cpu(), x[:, 1:].cpu()
        forward = [forward_log_prob(x[:, k:k + 2], grid[:, k + 1:k + 3].cpu()) for k in range(len(ts) - 2)]
        for i, levels in enumerate(tqdm(x, "truth", leave=False, disable=rank > 0)):
            draws = shapes.uniforms(dataset.seed, dataset.numbers([first + i]), shapes.DRAWS)[0]
            rng, images = np.random.default_rng([seed, first + i]), network.unpatchify(levels)
            log_q, *scenes = zip(*(truth.posterior(image.numpy(), t, draws, rng)
                                   for image, t in zip(images, ts[1:].tolist())))
            for k, (s, t) in enumerate(itertools.pairwise(ts[1:].cpu())):
                true = log_q[k] + forward[k][i].item() - log_q[k + 1]
                nearest = truth.log_gaussians(*images[k:k + 2], *reverse_posterior(t, s), *(of[k + 1] for of in scenes))
                rows.append([true + nll[i, k].item(), true - nearest[0], true - nearest[1]])
    rows = torch.tensor(sum(gathered(rows), [])).view(-1, len(ts) - 2, 3)
    return {f"step {k + 1}{name}": mean_and_error(rows[:, k, column]) for k in range(len(ts) - 2)
            for column, name in enumerate(["", ", nearest diagonal Gaussian", ", nearest full Gaussian"])}


def evaluate_samples(model, dataset, guidance):
    """Images/s; of shapes, the proportions that show exactly what they should and that pass each GenEval task, and the
    tasks' mean; of others how near the samples are to the data and, if labelled, whether they are of their class."""
    classes, tasks = dataset_class_captions(model.settings["dataset"]), ()
    if model.settings["dataset"] == "shapes":
        tasks, captions = zip(*task_prompts(-(-num_samples // len(TASKS))))
    elif judge:
        captions = [record["captions"][0] for record in judges.labels_of(dataset, num_samples)]
    else:
        captions = [classes[i % len(classes)] if classes else dataset[i % len(dataset)][1] for i in range(num_samples)]
    samples, (rank, world) = {}, rank_and_world()
    starts = range(0, len(captions), batch_size)[rank::world]
    for start in tqdm(starts, "samples", leave=False, unit="batch", disable=rank > 0):
        numbers = range(len(captions))[start:start + batch_size]
        samples[start] = model.sample_trajectories([captions[i] for i in numbers], numbers, guidance, seed,
                                                   False, best_of, restarts)[0].cpu()
    samples = ChainMap(*gathered(samples))
    images, seconds = torch.cat([samples[start] for start in sorted(samples)]), gathered(sum(model.seconds.values()))
    if rank == 0:
        path = Path(out_dir) / "evaluate" / f"{model.kind}_{len(model.ts) - 1}_{model.denoise}.png"
        save_image(contact_sheet(images[:10], captions[:10], columns=10), path)
    results = {"images_per_s": len(images) / max(seconds)}
    if tasks:
        hits = defaultdict(list)
        for image, caption, task in zip(images, captions, tasks):
            hits["strictly"].append(follows(image, caption))
            hits[task].append(follows(image, caption, task))
        results |= {name: proportion(found) for name, found in hits.items()}
        means, errors = zip(*(results[task].values() for task in TASKS))
        results["overall"] = {"mean": sum(means) / len(TASKS), "standard_error": math.hypot(*errors) / len(TASKS)}
        return results
    if judge:
        known = model.settings["data_dir"]  # which a model that was passed on has forgotten
        found = judges.compare(judge, images, dataset, open_dataset(model.settings, "train") if known else None)
        return results | {key: proportion(value) if type(value) is list else value for key, value in found.items()}
    truth = first_images(dataset, 5000)
    if min(len(images), len(truth)) >= 10:
        results["frechet_distance"] = frechet_distance(shrunk(images), truth)
    else:
        note(f"a Frechet distance needs 10 samples and held-out images, but there are {len(images)} and {len(truth)}")
    if classes:
        train_set = open_dataset(model.settings, "train", data_dir)
        examples, labels = first_images(train_set, len(train_set)), torch.tensor(train_set.labels)
        nearest = nearest_labels(images, examples, labels).tolist()
        results["nearest_is_of_the_class"] = proportion([label == i % len(classes) for i, label in enumerate(nearest)])
    return results


PARTS = {"likelihood": evaluate_likelihood, "samples": evaluate_samples, "classifier": evaluate_classifier,
         "truth": evaluate_truth}


@one_line_errors()
@torch.no_grad()
def main(config):
    where, rank, _ = start_ranks(config["device"])
    counts, strengths = (value if isinstance(value, tuple) else (value,) for value in (steps, guidance))
    if len(counts) > 1 and len(strengths) > 1:
        raise ValueError(f"there are several steps, {steps}, and several guidances, {guidance}: vary one at a time")
    model = TrainedModel(out_dir, where, counts[0], "none", t_min, shift)
    possible = [part for part in PARTS if (model.kind == "ntm" or part == "samples")
                and (not model.latents or part == "likelihood")
                and (part != "truth" or (model.settings["dataset"], model.network.config.channels) == ("shapes", 3)
                     and len(model.ts) > 2 and model.network.config.first_noise == 1)]  # steps whose truth is known
    chosen = parts.split(",") if parts else possible or ["samples"]
    if wrong := [part for part in chosen if part not in possible]:
        what = ("flow matching" if model.kind == "fm" else "an NTM") + (" on latents" if model.latents else "")
        raise ValueError(f"part {wrong[0]!r} is unknown of {what}: choose among {', '.join(possible) or 'none'}")
    dataset, others = open_dataset(model.settings, "val", data_dir), curves_of(beside) if beside else []
    make_folder(Path(out_dir) / "evaluate")
    runs, ways = [], denoise.split(",") if model.kind == "ntm" else ["none"]
    for count, way, w in itertools.product(counts, ways, strengths) if "samples" in chosen else ():
        if way == "learned" and (reason := model.why_no_denoiser(count)):
            note(f"{reason}: its samples are left out")
            continue
        runs.append((copy.copy(model), w))  # which shares the networks
        runs[-1][0].set_sampling(count, way, t_min, shift)
    if "samples" in chosen and not runs:
        raise ValueError(f"denoise is {denoise!r}, and there are no samples to measure: add 'score' or 'none'")
    results, measured = {"config": config, "iteration": model.iteration}, []

    def report(title, found):
        results[title] = found
        if rank == 0:
            print(title)
            for name, value in found.items():
                value = value if isinstance(value, dict) else {"mean": value}
                error = f" ± {value['standard_error']:.4f}" if "standard_error" in value else ""
                per_dimension = f"  ({value['per_dimension']:.4f} per dimension)" if "per_dimension" in value else ""
                print(f"  {name:28} {value['mean']:12.4f}{error}{per_dimension}", flush=True)

    for part in chosen:
        if part != "samples":
            report(part, PARTS[part](model, dataset))
            continue
        for m, w in runs:
            found, count = evaluate_samples(m, dataset, w), len(m.ts) - 1
            passes = count + restarts * len(taken_again(count)) + (m.denoise == "learned")
            measured.append({"curve": "flow matching" if m.kind == "fm" else f"NTM, {m.denoise}",
                             "passes": passes, "guidance": w, **found})
            report(f"samples, {count} steps" + (f", {m.denoise}" if m.kind == "ntm" else "")
                   + (f", guidance {w:g}" if len(strengths) > 1 else ""), found)
    results |= {"curves": measured} if measured else {}
    if rank == 0:
        if figure := plot_quality(measured + others):
            save_image(figure, Path(out_dir) / "evaluate" / "quality.png")
        (path := Path(out_dir) / "evaluate.json").write_text(json.dumps(results, indent=1, allow_nan=False))
        print(f"wrote {path}")
    leave_ranks()


if __name__ == "__main__":
    main(configure(globals()))
