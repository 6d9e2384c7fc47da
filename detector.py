"""Does a picture show what its caption says? An exact detector for the shapes data set; nothing in it is learned.

- objects never touch: each is a connected component of the pixels that are mostly paint and little ground
- its shape is the one whose template, drawn by the renderer with the same area and centre of mass, is nearest to its
  soft mask; its colour is the nearest to its paint. What is far from all of them is still an object, without a name.
- `follows` is strict: what the caption says and nothing else. The six tasks of GenEval (Ghosh, Hajishirzi and Schmidt
  2023), asked in the data set's own captions, each look at one side of it.
"""
import re
from collections import Counter
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch

import shapes
from shapes import COLOURS, GROUND, LONE_RADIUS, MIN_RADIUS, NUMBERS, RELATIONS, SHAPES

PAINTS = np.array(list(COLOURS.values()), dtype=float) - GROUND  # 8-bit units, as a way from the ground

# Measured on thousands of validation pictures at 16x16, clean and with noise of standard deviation 0.1, and on 841
# objects that a small model drew.
MIN_COVER = 0.6  # of a pixel, to belong to an object: at 0.5 the model's neighbours grow together more often
MIN_AREA = MIN_RADIUS**2 / 2  # of the picture: less than a quarter of the smallest triangle is a speck, no object
MAX_AREA = 5 * LONE_RADIUS[1] ** 2  # of the picture: the largest square has 4; a picture all in red is no red square
MAX_COLOUR_ERROR = 70  # 8-bit units: less than half of the 151 between the two closest colours
MAX_MISFIT = 0.09  # half of the 0.17 between circle and square; clean pictures reach 0.02, noisy 0.06

TASKS = {  # name: kind of its captions; does colour matter; must the number be exact, or may there be more
    "single object": ("one", False, False),
    "two objects": ("and", False, False),
    "counting": ("several", False, True),
    "colours": ("one", True, False),
    "position": ("relation", False, False),
    "colour attribution": ("and", True, False),
}


class Object(NamedTuple):
    """What was found: lengths in units of the picture's width, None for a colour or shape that has no name."""
    colour: str | None
    shape: str | None
    x: float  # the centre of the bounding square, as in shapes.Scene
    y: float
    area: float


# ---------------------------------------------------------------------------------------------------------------
# pixels to objects


def spread(labels):
    """Each pixel (H, W) takes the largest number among itself and its eight neighbours."""
    wide = np.pad(labels, 1)
    tall = np.maximum(np.maximum(wide[:-2], wide[1:-1]), wide[2:])
    return np.maximum(np.maximum(tall[:, :-2], tall[:, 1:-1]), tall[:, 2:])


def components(mask):
    """Boolean (H, W) -> labels (H, W): one positive number for each 8-connected component, 0 outside of them."""
    labels = mask * np.arange(1, mask.size + 1).reshape(mask.shape)
    while True:
        before, labels = labels, mask * spread(labels)
        if (labels == before).all():
            return labels


def detect(image):
    """The objects of a picture (3, S, S) in [-1, 1], array or tensor, as a list of Object. What lies outside [-1, 1] is
    clipped. Raises ValueError for another shape: in grey, colours cannot be told."""
    image = image.detach().cpu().double().numpy() if torch.is_tensor(image) else np.asarray(image, dtype=float)
    if image.ndim != 3 or image.shape[0] != 3 or image.shape[1] != image.shape[2]:
        raise ValueError(f"the detector tells colours in square pictures (3, S, S), but this one is {image.shape}")
    size = image.shape[1]
    away = np.moveaxis((image.clip(-1, 1) + 1) * 128 - 0.5, 0, -1) - GROUND  # (S, S, 3)

    # how much paint of each colour explains a pixel best, and what it leaves unexplained: both (S, S, 6)
    cover = away @ (PAINTS / (PAINTS**2).sum(1, keepdims=True)).T
    rest = ((away[:, :, None] - cover[..., None] * PAINTS) ** 2).sum(-1)
    labels = components(np.take_along_axis(cover, rest.argmin(-1)[..., None], -1)[..., 0] > MIN_COVER)
    edges = spread(labels)  # anti-aliasing goes on for one pixel more
    middles = (np.arange(size) + 0.5) / size

    objects = []
    for label, pixels in zip(*np.unique(labels[labels > 0], return_counts=True)):
        if pixels < MIN_AREA * size**2:
            continue
        mine = np.where(labels > 0, labels, edges) == label
        mask = mine * cover[..., rest[labels == label].sum(0).argmin()]  # soft: about 1 inside, 0 to 1 at the edge
        area, x, y = mask.mean(), mask.sum(0) @ middles / mask.sum(), mask.sum(1) @ middles / mask.sum()

        # templates of all shapes; the area of each is radius**2 times a number
        radius = np.sqrt(area / [np.pi, 4, 2])
        centre_y = y - radius * [0, 0, 1 / 3]  # a triangle's centre of mass is below that of its bounding square
        templates = shapes.coverage(range(3), x, centre_y, radius, size)
        misfit = ((mask - templates) ** 2).sum((1, 2)) / (mask**2).sum()
        best = misfit.argmin()

        template = mine * templates[best]
        paint = np.tensordot(template, away) / (template**2).sum()  # of all paints the one that explains `away` best
        error = np.linalg.norm(PAINTS - paint, axis=1)
        colour = list(COLOURS)[error.argmin()] if error.min() < MAX_COLOUR_ERROR else None
        shape = SHAPES[best] if misfit[best] < MAX_MISFIT and area < MAX_AREA else None
        objects.append(Object(colour, shape, x, centre_y[best], area))
    return objects


# ---------------------------------------------------------------------------------------------------------------
# objects and captions


def parse(caption):
    """What a caption says: (one of KINDS, list of (colour, shape), relation or None). Raises ValueError for any other
    text."""
    thing = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
    if m := re.fullmatch(rf"({'|'.join(NUMBERS.values())}) {thing}s", caption):
        return "several", [m.groups()[1:]] * next(n for n, word in NUMBERS.items() if word == m[1]), None
    if m := re.fullmatch(rf"a {thing}", caption):
        return "one", [m.groups()], None
    if m := re.fullmatch(rf"a {thing} (and|{'|'.join(RELATIONS)}) a {thing}", caption):
        relation = None if m[3] == "and" else m[3]
        return "relation" if relation else "and", [m.groups()[:2], m.groups()[3:]], relation
    raise ValueError(f"{caption!r} is no caption of the shapes data set; 'a red circle', 'two red circles', "
                     "'a red circle and a blue square' and 'a red circle left of a blue square' are")


def holds(relation, a, b):
    """Is object a in that relation to b? Of two that stand askew, the longer way decides: one relation at a time."""
    dx, dy = b.x - a.x, b.y - a.y
    ahead, aside = {"left of": (dx, dy), "right of": (-dx, dy), "above": (dy, dx), "below": (-dy, dx)}[relation]
    return ahead > abs(aside)


def follows(image, caption, task=None):
    """Does the picture (3, S, S) in [-1, 1], array or tensor, show what the caption says?

    task: None asks for all of it and nothing else: just these objects, of these shapes and colours, in this relation.
    One of TASKS asks for one side only, as GenEval does; other objects are then no fault.
        single object       an object of that shape, in whatever colour
        two objects         objects of both shapes, in whatever colours
        counting            as many objects of that shape as the caption says, no more, in whatever colours
        colours             an object of that shape and colour
        position            objects of both shapes in that relation, in whatever colours
        colour attribution  objects of both shapes, each in its own colour
    Raises ValueError for a caption the data set does not make, or the task does not ask, and as detect() does.
    """
    kind, things, relation = parse(caption)
    if task is not None and (task not in TASKS or TASKS[task][0] != kind):
        raise ValueError(f"task {task!r} does not ask {caption!r}: tasks and their kinds of caption are "
                         + ", ".join(f"{name} ({asked})" for name, (asked, _, _) in TASKS.items()))
    _, coloured, exact = TASKS[task] if task else (kind, True, True)

    def name(thing):
        colour, shape = thing[:2]
        return (colour, shape) if coloured else shape

    objects = detect(image)
    said, seen = Counter(map(name, things)), Counter(map(name, objects))
    if task:  # other objects are no fault
        seen = Counter({n: seen[n] for n in said})
    if not (seen == said if exact else seen >= said):
        return False
    return relation is None or any(holds(relation, a, b) for a, b in permutations(objects, 2)
                                   if [name(a), name(b)] == [name(t) for t in things])


def task_prompts(count, seed=0):
    """`count` captions for each of the six tasks: a list of (task, caption), the same at every call. A task repeats a
    caption only after it has asked all. Pairs differ in both shape and colour, so that no answer is ambiguous."""
    things = [(colour, shape) for colour in COLOURS for shape in SHAPES]
    pairs = [(a, b) for a, b in permutations(things, 2) if a[0] != b[0] and a[1] != b[1]]
    captions = {
        "one": ["a %s %s" % thing for thing in things],
        "several": [f"{number} %s %ss" % thing for number in NUMBERS.values() for thing in things],
        "and": ["a %s %s and a %s %s" % (*a, *b) for a, b in pairs],
        "relation": [f"a %s %s {relation} a %s %s" % (*a, *b) for relation in RELATIONS for a, b in pairs],
    }
    prompts = []
    for number, (task, (kind, _, _)) in enumerate(TASKS.items()):
        order = np.argsort(shapes.uniforms(seed, [number], len(captions[kind]))[0])
        prompts += [(task, captions[kind][i]) for i in np.resize(order, count)]
    return prompts
