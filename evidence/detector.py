"""Does an image show what its caption says? An exact detector for the shapes data set; nothing in it is learned.

Objects never touch, so each object is a connected component of the pixels that are mostly paint. Its shape is that of
the nearest template, rendered with the same area and centre of mass, and its colour is the one nearest to its paint. An
object far from all templates or colours still counts, but has no shape or colour. `follows` requires exactly what the
caption says; each of the six tasks of GenEval (Ghosh, Hajishirzi and Schmidt 2023) tests one aspect of it, by captions
of the data set.
"""
from collections import Counter
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from plumbing.rng import uniforms
from plumbing.shapes import COLOURS, GROUND, LONE_RADIUS, MIN_RADIUS, NUMBERS, RELATIONS, SHAPES, coverage

PAINTS = np.array(list(COLOURS.values()), dtype=float) - GROUND  # 8-bit units, relative to the ground

# Measured on thousands of validation images at 16x16, clean and with noise of standard deviation 0.1, and on 841
# objects in the samples of a small model.
MIN_COVER = 0.6  # share of paint in a pixel that belongs to an object; at 0.5, more neighbours in samples merge
MIN_AREA = MIN_RADIUS**2 / 2  # of the image; less than a quarter of the smallest triangle is a speck, not an object
MAX_AREA = 5 * LONE_RADIUS[1] ** 2  # of the image; 4 r^2 is the largest square, and an all red image is no red square
MAX_COLOUR_ERROR = 70  # 8-bit units: less than half of the 151 between the two closest colours
MAX_MISFIT = 0.09  # half of the 0.17 between circle and square; clean images reach 0.02, noisy ones 0.06


class Task(NamedTuple):
    """The aspect that one of GenEval's tasks tests."""
    kind: str  # the kind of its captions, one of KINDS
    coloured: bool  # whether colours matter
    exact: bool  # whether more objects than the caption says are an error


TASKS = {
    "single object": Task("one", False, False),
    "two objects": Task("and", False, False),
    "counting": Task("several", False, True),
    "colours": Task("one", True, False),
    "position": Task("relation", False, False),
    "colour attribution": Task("and", True, False),
}


def all_captions():
    """All captions of the data set: {caption: (one of KINDS, list of (colour, shape), relation or None)}."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    captions = {}
    for thing in things:
        captions["a %s %s" % thing] = "one", [thing], None
    for number, word in NUMBERS.items():
        for thing in things:
            captions[f"{word} %s %ss" % thing] = "several", [thing] * number, None
    for link in "and", *RELATIONS:
        kind, relation = ("and", None) if link == "and" else ("relation", link)
        for first in things:
            for second in things:
                captions[f"a %s %s {link} a %s %s" % (*first, *second)] = kind, [first, second], relation
    return captions


CAPTIONS = all_captions()


class Object(NamedTuple):
    """A detected object; lengths are in image widths, and an unknown colour or shape is None."""
    colour: str | None
    shape: str | None
    x: float  # the centre of the bounding square, as in shapes.Scene
    y: float
    area: float


def dilate(labels):
    """The largest number among each pixel (H, W) and its eight neighbours."""
    return sliding_window_view(np.pad(labels, 1), (3, 3)).max((2, 3))


def components(mask):
    """Labels (H, W) of a boolean mask: a positive number for each 8-connected component, 0 outside."""
    labels = mask * np.arange(1, mask.size + 1).reshape(mask.shape)
    before = None
    while not np.array_equal(labels, before):
        before = labels
        labels = mask * dilate(labels)
    return labels


def detect(image):
    """The objects in an image (3, S, S), array or tensor, a list of Object. Values outside [-1, 1] are clipped.

    Raises ValueError for another shape, since a grey image has no colours, and for integers, which are not in [-1, 1].
    """
    image = square_array(image)
    size = image.shape[1]
    away = np.moveaxis((image.clip(-1, 1) + 1) * 128 - 0.5, 0, -1) - GROUND  # (S, S, 3)
    cover, rest = explain(away)
    best = rest.argmin(-1)[..., None]
    best_cover = np.take_along_axis(cover, best, -1)[..., 0]
    labels = components(best_cover > MIN_COVER)
    with_edges = np.where(labels > 0, labels, dilate(labels))  # anti-aliasing extends one pixel further

    objects = []
    for label, pixels in zip(*np.unique(labels[labels > 0], return_counts=True)):
        if pixels >= MIN_AREA * size**2:
            region = with_edges == label
            paint = rest[labels == label].sum(0).argmin()
            mask = region * cover[..., paint]  # soft: about 1 inside, 0 to 1 at the edge
            objects.append(recognise(mask, region, away))
    return objects


def square_array(image):
    """The image as an array of doubles, (3, S, S). Raises ValueError as detect() does."""
    integers = "int" in str(getattr(image, "dtype", ""))
    if torch.is_tensor(image):
        image = image.detach().cpu().double()
    image = np.asarray(image, dtype=float)
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2] or integers:
        kind = ", of integers" if integers else ""
        raise ValueError("the detector needs square images (3, S, S) in colour, floats in [-1, 1], but this one is "
                         f"{image.shape}{kind}")
    return image


def explain(away):
    """The amount of each paint that explains a pixel best, and the square of the unexplained rest, both (S, S, 6).

    away: (S, S, 3), the pixels' distance from the ground, in 8-bit units.
    """
    squares = (PAINTS**2).sum(1, keepdims=True)
    cover = away @ (PAINTS / squares).T
    unexplained = away[:, :, None] - cover[..., None] * PAINTS
    return cover, (unexplained**2).sum(-1)


def recognise(mask, region, away):
    """The Object that covers a mask (S, S) in [0, 1], zero outside of a boolean region; away: as in explain."""
    size = len(mask)
    middles = (np.arange(size) + 0.5) / size
    area = mask.mean()
    x = mask.sum(0) @ middles / mask.sum()
    y = mask.sum(1) @ middles / mask.sum()

    # templates of all shapes; the area of each is radius**2 times a constant
    radius = np.sqrt(area / [np.pi, 4, 2])
    centre_y = y - radius * [0, 0, 1 / 3]  # a triangle's centre of mass is below that of its bounding square
    templates = coverage(range(3), x, centre_y, radius, size)
    misfits = ((mask - templates) ** 2).sum((1, 2)) / (mask**2).sum()
    best = misfits.argmin()
    known = misfits[best] < MAX_MISFIT and area < MAX_AREA
    shape = SHAPES[best] if known else None

    template = region * templates[best]
    paint = np.tensordot(template, away) / (template**2).sum()  # the least-squares fit to `away`
    errors = np.linalg.norm(PAINTS - paint, axis=1)
    colour = list(COLOURS)[errors.argmin()] if errors.min() < MAX_COLOUR_ERROR else None
    return Object(colour, shape, x, centre_y[best], area)


def parse(caption):
    """The meaning of a caption: (one of KINDS, list of (colour, shape), relation or None). Raises ValueError."""
    if caption not in CAPTIONS:
        raise ValueError(f"{caption!r} is not a caption of the shapes data set; 'a red circle', 'two red circles', "
                         "'a red circle and a blue square' and 'a red circle left of a blue square' are")
    return CAPTIONS[caption]


def holds(relation, a, b):
    """Whether object a is in that relation to b. The longer of the two distances decides: only one relation holds."""
    dx = b.x - a.x
    dy = b.y - a.y
    ahead, aside = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead > abs(aside)


def rule_of(task, caption, kind):
    """The Task that the name `task` stands for; None: the strict one. Raises ValueError if it is for other kinds."""
    if task is None:
        return Task(kind, coloured=True, exact=True)
    if task not in TASKS or TASKS[task].kind != kind:
        known = ", ".join(f"{name} ({rule.kind})" for name, rule in TASKS.items())
        raise ValueError(f"task {task!r} is not for {caption!r}: tasks and their kinds of caption are {known}")
    return TASKS[task]


def follows(image, caption, task=None):
    """Whether the image (3, S, S) in [-1, 1], array or tensor, shows exactly the objects that the caption says.

    task: one of TASKS, to test one aspect only, as GenEval does. Objects of other shapes are then ignored; colours
    matter in "colours" and "colour attribution" only, and additional objects in "counting" only. Raises ValueError for
    a caption that is not of the data set or not of the task, and as detect() does.
    """
    kind, things, relation = parse(caption)
    rule = rule_of(task, caption, kind)

    def name(thing):
        colour, shape, *_ = thing
        return (colour, shape) if rule.coloured else shape

    objects = detect(image)
    names = [name(thing) for thing in things]
    said = Counter(names)
    seen = Counter(map(name, objects))
    if task:
        seen = Counter({thing: seen[thing] for thing in said})
    if not (seen == said if rule.exact else seen >= said):
        return False
    if relation is None:
        return True
    pairs = permutations(objects, 2)
    return any(holds(relation, a, b) for a, b in pairs if [name(a), name(b)] == names)


def is_clear(caption):
    """Whether the objects of a pair differ in both shape and colour, so that no answer is ambiguous."""
    kind, (first, *others), _ = CAPTIONS[caption]
    if kind in ("one", "several"):
        return True
    (second,) = others
    return first[0] != second[0] and first[1] != second[1]


def task_prompts(count, seed=0):
    """`count` captions for each of the six tasks, a list of (task, caption), the same at every call.

    A task repeats a caption only after all others. The objects of a pair differ in both shape and colour.
    """
    prompts = []
    for number, (task, rule) in enumerate(TASKS.items()):
        captions = [caption for caption in CAPTIONS if CAPTIONS[caption][0] == rule.kind and is_clear(caption)]
        order = np.argsort(uniforms(seed, [number], len(captions))[0])
        prompts += [(task, captions[i]) for i in np.resize(order, count)]
    return prompts
