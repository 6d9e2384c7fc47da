"""Does an image show what its caption says? An exact detector for the shapes data set; nothing in it is learned.

Objects never touch, so each is a connected component of the pixels that are mostly paint. Its shape is that of the
nearest template, rendered with the same area and centre of mass; its colour is the nearest to its paint; what is far
from all of them still counts, without a name. `follows` requires what the caption says and nothing else; the six tasks
of GenEval (Ghosh, Hajishirzi and Schmidt 2023) each test one aspect of it, by captions of the data set.
"""
from collections import Counter
from itertools import permutations, product
from typing import NamedTuple

import numpy as np
import torch
from numpy.lib.stride_tricks import sliding_window_view

from plumbing import shapes
from plumbing.shapes import COLOURS, GROUND, LONE_RADIUS, MIN_RADIUS, NUMBERS, RELATIONS, SHAPES

PAINTS = np.array(list(COLOURS.values()), dtype=float) - GROUND  # 8-bit units, relative to the ground

# Measured on thousands of validation images at 16x16, clean and with noise of standard deviation 0.1, and on 841
# objects in the samples of a small model.
MIN_COVER = 0.6  # of a pixel, to belong to an object: at 0.5 more neighbours in samples merge
MIN_AREA = MIN_RADIUS**2 / 2  # of the image: less than a quarter of the smallest triangle is a speck, not an object
MAX_AREA = 5 * LONE_RADIUS[1] ** 2  # of the image: the largest square has 4; an all red image is not a red square
MAX_COLOUR_ERROR = 70  # 8-bit units: less than half of the 151 between the two closest colours
MAX_MISFIT = 0.09  # half of the 0.17 between circle and square; clean images reach 0.02, noisy ones 0.06

TASKS = {  # name: (kind of its captions, whether colours matter, whether there may be no more than the caption says)
    "single object": ("one", False, False),
    "two objects": ("and", False, False),
    "counting": ("several", False, True),
    "colours": ("one", True, False),
    "position": ("relation", False, False),
    "colour attribution": ("and", True, False),
}

THINGS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
CAPTIONS = {  # all that the data set has: (one of KINDS, things, relation or None)
    **{"a %s %s" % a: ("one", [a], None) for a in THINGS},
    **{f"{word} %s %ss" % a: ("several", [a] * number, None) for number, word in NUMBERS.items() for a in THINGS},
    **{"a %s %s and a %s %s" % (*a, *b): ("and", [a, b], None) for a, b in product(THINGS, repeat=2)},
    **{f"a %s %s {relation} a %s %s" % (*a, *b): ("relation", [a, b], relation)
       for relation in RELATIONS for a, b in product(THINGS, repeat=2)},
}


class Object(NamedTuple):
    """A detected object; lengths are in image widths, and a colour or shape that has no name is None."""
    colour: str | None
    shape: str | None
    x: float  # the centre of the bounding square, as in shapes.Scene
    y: float
    area: float


def dilate(labels):
    """Each pixel (H, W) takes the largest number among itself and its eight neighbours."""
    return sliding_window_view(np.pad(labels, 1), (3, 3)).max((2, 3))


def components(mask):
    """Boolean (H, W) -> labels (H, W): a positive number for each 8-connected component, 0 outside of them."""
    labels, before = mask * np.arange(1, mask.size + 1).reshape(mask.shape), None
    while not np.array_equal(labels, before):
        before, labels = labels, mask * dilate(labels)
    return labels


def detect(image):
    """The objects in an image (3, S, S), array or tensor, a list of Object. Values outside [-1, 1] are clipped.
    Raises ValueError for another shape, a grey image has no colours, and for integers, which are not in [-1, 1]."""
    integers = "int" in str(getattr(image, "dtype", ""))
    image = image.detach().cpu().double().numpy() if torch.is_tensor(image) else np.asarray(image, dtype=float)
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2] or integers:
        raise ValueError("the detector needs square images (3, S, S) in colour, floats in [-1, 1], but this one is "
                         f"{image.shape}{', of integers' if integers else ''}")
    size = image.shape[1]
    away = np.moveaxis((image.clip(-1, 1) + 1) * 128 - 0.5, 0, -1) - GROUND  # (S, S, 3)

    # the amount of each paint that explains a pixel best, and what it leaves unexplained: both (S, S, 6)
    cover = away @ (PAINTS / (PAINTS**2).sum(1, keepdims=True)).T
    rest = ((away[:, :, None] - cover[..., None] * PAINTS) ** 2).sum(-1)
    labels = components(np.take_along_axis(cover, rest.argmin(-1)[..., None], -1)[..., 0] > MIN_COVER)
    edges = dilate(labels)  # anti-aliasing extends one pixel further
    middles = (np.arange(size) + 0.5) / size

    objects = []
    for label, pixels in zip(*np.unique(labels[labels > 0], return_counts=True)):
        if pixels < MIN_AREA * size**2:
            continue
        mine = np.where(labels > 0, labels, edges) == label
        mask = mine * cover[..., rest[labels == label].sum(0).argmin()]  # soft: about 1 inside, 0 to 1 at the edge
        area, x, y = mask.mean(), mask.sum(0) @ middles / mask.sum(), mask.sum(1) @ middles / mask.sum()

        # templates of all shapes; the area of each is radius**2 times a constant
        radius = np.sqrt(area / [np.pi, 4, 2])
        centre_y = y - radius * [0, 0, 1 / 3]  # a triangle's centre of mass is below that of its bounding square
        templates = shapes.coverage(range(3), x, centre_y, radius, size)
        misfit = ((mask - templates) ** 2).sum((1, 2)) / (mask**2).sum()
        best = misfit.argmin()

        template = mine * templates[best]
        paint = np.tensordot(template, away) / (template**2).sum()  # the least-squares fit to `away`
        error = np.linalg.norm(PAINTS - paint, axis=1)
        colour = list(COLOURS)[error.argmin()] if error.min() < MAX_COLOUR_ERROR else None
        shape = SHAPES[best] if misfit[best] < MAX_MISFIT and area < MAX_AREA else None
        objects.append(Object(colour, shape, x, centre_y[best], area))
    return objects


def parse(caption):
    """A caption as (one of KINDS, list of (colour, shape), relation or None). Raises ValueError for any other text."""
    if caption not in CAPTIONS:
        raise ValueError(f"{caption!r} is not a caption of the shapes data set; 'a red circle', 'two red circles', "
                         "'a red circle and a blue square' and 'a red circle left of a blue square' are")
    return CAPTIONS[caption]


def holds(relation, a, b):
    """Is object a in that relation to b? The longer of the two distances decides, so only one relation holds."""
    dx, dy = b.x - a.x, b.y - a.y
    ahead, aside = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead > abs(aside)


def follows(image, caption, task=None):
    """Does the image (3, S, S) in [-1, 1], array or tensor, show exactly the objects that the caption says?

    task: one of TASKS, to test one aspect only, as GenEval does: objects of other shapes are ignored, and so are
    colours but for "colours" and "colour attribution"; only "counting" also refuses more objects than the caption says.
    Raises ValueError for a caption that is not of the data set or not of the task, and as detect() does.
    """
    kind, things, relation = parse(caption)
    if task is not None and (task not in TASKS or TASKS[task][0] != kind):
        raise ValueError(f"task {task!r} is not for {caption!r}: tasks and their kinds of caption are "
                         + ", ".join(f"{name} ({of_task})" for name, (of_task, _, _) in TASKS.items()))
    _, coloured, exact = TASKS[task] if task else (kind, True, True)
    name = slice(2) if coloured else 1  # of a thing and of an Object: colour and shape, or the shape alone
    objects, names = detect(image), [thing[name] for thing in things]
    said, seen = Counter(names), Counter(thing[name] for thing in objects)
    if task:
        seen = Counter({thing: seen[thing] for thing in said})
    if not (seen == said if exact else seen >= said):
        return False
    return relation is None or any(holds(relation, a, b) for a, b in permutations(objects, 2)
                                   if [a[name], b[name]] == names)


def task_prompts(count, seed=0):
    """`count` captions for each of the six tasks, a list of (task, caption), the same at every call. A task repeats a
    caption only once it has used all. Pairs differ in both shape and colour, so that no answer is ambiguous."""
    prompts = []
    for number, (task, (of_task, _, _)) in enumerate(TASKS.items()):
        captions = [caption for caption, (kind, (a, *others), _) in CAPTIONS.items() if kind == of_task
                    and (kind == "several" or all(a[0] != b[0] and a[1] != b[1] for b in others))]
        order = np.argsort(shapes.uniforms(seed, [number], len(captions))[0])
        prompts += [(task, captions[i]) for i in np.resize(order, count)]
    return prompts
