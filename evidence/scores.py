"""Scores of samples and captions with standard errors, the images to compare with, and how scores are printed."""

import functools
import json
import math
from collections import defaultdict
from pathlib import Path

import torch
import torch.nn.functional as F

from evidence.detector import TASKS, follows
from plumbing.loader import collate
from plumbing.runtime import rank_and_world


def mean_and_error(values):
    """The mean of a tensor (n,) and, for n > 1, its standard error."""
    found = {"mean": values.mean().item()}
    if len(values) > 1:
        found["standard_error"] = (values.std() / math.sqrt(len(values))).item()
    return found


def proportion(hits):
    """The proportion of true ones in a list of booleans or fractions, and its standard error.

    At 0 or 1 the usual error would be 0; there it is Agresti and Coull's, with half a hit and half a miss added.
    """
    n = len(hits)
    mean = sum(hits) / n
    p = mean
    if mean in (0, 1):
        p = (sum(hits) + 0.5) / (n + 1)
        n = n + 1
    return {"mean": mean, "standard_error": math.sqrt(p * (1 - p) / n)}


def shrunk(images):
    """Images (n, C, H, W) averaged down to 32x32 where they are larger."""
    return F.interpolate(images, [min(size, 32) for size in images.shape[2:]], mode="area")


@functools.lru_cache(2)
def first_images(dataset, count):
    """The first `count` images of a data set, or all if there are fewer, shrunk: (count, C, H, W)."""
    numbers = list(range(min(count, len(dataset))))
    found = []
    for start in range(0, len(numbers), 100):
        images, *_ = collate(dataset.__getitems__(numbers[start:start + 100]))
        found.append(shrunk(images))
    return torch.cat(found)


def credits(log_p, text, truth):
    """The credit of each of B choices among K candidates, a list: 1/k if the true one is among the k likeliest, else 0.

    log_p (B, K). text (B, K, L): ids of the candidates; those with equal ids, such as captions that are cut alike,
    count as equally likely despite rounding. truth (B,): which candidate is the true one.
    """
    alike = (text[:, :, None] == text[:, None]).all(dim=-1)
    at_the_top = log_p == log_p.amax(dim=1, keepdim=True)
    greatest = (alike & at_the_top[:, None]).any(dim=-1)
    hits = greatest.gather(1, truth[:, None])[:, 0]
    return (hits / greatest.sum(dim=1)).tolist()


def scores_of_tasks(images, captions, tasks):
    """The proportions of shapes' images that show exactly what they should and that pass each task; the tasks' mean."""
    hits = defaultdict(list)
    for image, caption, task in zip(images, captions, tasks):
        hits["strictly"].append(follows(image, caption))
        hits[task].append(follows(image, caption, task))
    results = {name: proportion(found) for name, found in hits.items()}
    means, errors = zip(*(results[task].values() for task in TASKS))
    n = len(TASKS)
    results["overall"] = {"mean": sum(means) / n, "standard_error": math.hypot(*errors) / n}
    return results


def curves_of(path):
    """The samples' results in an evaluate.json, for plot_quality. Raises ValueError for another file."""
    try:
        return json.loads(Path(path).read_text("utf-8"))["curves"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"beside is {path}, which is no evaluate.json with samples ({error!r})") from error


def show(title, found):
    """Print the results of a part, on the first rank."""
    if rank_and_world()[0]:
        return
    print(title)
    for name, value in found.items():
        if not isinstance(value, dict):
            value = {"mean": value}
        line = f"  {name:28} {value['mean']:12.4f}"
        if "standard_error" in value:
            line += f" ± {value['standard_error']:.4f}"
        if "per_dimension" in value:
            line += f"  ({value['per_dimension']:.4f} per dimension)"
        print(line, flush=True)
