"""The "shapes" data set: coloured circles, squares and triangles on a dark ground, with a caption that is always true.

- four kinds of caption, equally frequent: one object ("a red circle"), two to four alike ("three blue circles"), two
  joined by "and" ("a red circle and a blue square"), two in a relation ("a red square left of a green circle")
- scene i of a seed is a pure function of (seed, i): a hash stands in for a random generator
- objects never touch: the image is cut at random into as many rectangles, and each object stays well inside its own
- lengths are in image widths, x to the right and y down, so a scene can be rendered at any size
"""
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle")
COLOURS = {"red": (230, 40, 30), "green": (60, 200, 60), "blue": (30, 60, 230),  # far apart, and so are their greys
           "yellow": (250, 225, 50), "purple": (180, 60, 210), "cyan": (70, 225, 240)}
GROUND = (16, 16, 24)
NUMBERS = {2: "two", 3: "three", 4: "four"}
RELATIONS = ("left of", "right of", "above", "below")  # of the first object to the second
KINDS = ("one", "several", "and", "relation")

MAX_OBJECTS = 4
MARGIN = 0.045  # from an object to its rectangle's edge: at 16x16, 1.4 pixels of ground between any two objects
MIN_RADIUS = 0.15  # 2.4 pixels at 16x16: below that a circle is a square
LONE_RADIUS = 0.19, 0.36  # a single object is larger
DRAWS = 8 + 3 * MAX_OBJECTS  # random numbers that make a scene
CUT = 0.4, 0.6  # where a cut may fall; the narrowest rectangle still holds 2 (MIN_RADIUS + MARGIN)


class Scene(NamedTuple):
    """B scenes of up to 4 objects each. Columns from `count` on are meaningless, and so is `relation` where `kind` is
    not 3. Integers index the constants above; x, y and radius are in image widths."""
    kind: np.ndarray  # (B,)
    relation: np.ndarray  # (B,)
    count: np.ndarray  # (B,)
    shape: np.ndarray  # (B, 4)
    colour: np.ndarray  # (B, 4)
    x: np.ndarray  # (B, 4) the centre of the bounding square
    y: np.ndarray  # (B, 4)
    radius: np.ndarray  # (B, 4) half the side of the bounding square


def mix(z):
    """The finalizer of splitmix64: uint64 -> uint64, in which every input bit affects every output bit."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed, indices, n):
    """Numbers in [0, 1), float64 (B, n), that depend on (seed, indices[b], column) alone. Any integers will do."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    start = mix(np.array([seed % 2**64], dtype=np.uint64) + golden)
    stream = mix(start + np.asarray(indices, dtype=np.int64).astype(np.uint64) * golden)
    bits = mix(stream[:, None] + np.arange(1, n + 1, dtype=np.uint64) * golden)
    return (bits >> np.uint64(11)) * 2.0**-53


def scenes(seed, indices):
    """Scenes number `indices` (B integers, which may be negative) of the endless sequence `seed`, as a Scene."""
    return compose(uniforms(seed, indices, DRAWS))


def compose(u):
    """The Scene that B rows of uniform numbers, (B, DRAWS) in [0, 1), stand for."""
    kind, relation = (u[:, 0] * len(KINDS)).astype(int), (u[:, 1] * len(RELATIONS)).astype(int)
    count = np.select([kind == 0, kind == 1], [1, 2 + (u[:, 2] * len(NUMBERS)).astype(int)], 2)

    # what: one of the 18 coloured shapes; "several" repeat it, the second of a pair is one of the other 17
    things = len(SHAPES) * len(COLOURS)
    first = (u[:, 3] * things).astype(int)
    second = np.where(kind == 1, first, (first + 1 + (u[:, 4] * (things - 1)).astype(int)) % things)
    colour, shape = np.divmod(np.stack([first, second, first, second], 1), len(SHAPES))

    # where: one cut makes two halves, one after the other "along" an axis; three and four objects need halves cut
    # again, "across" it. The relation determines the layout: which axis it is, and which half comes first.
    cuts = CUT[0] + (CUT[1] - CUT[0]) * u[:, 5:8]
    half, quarter = np.arange(MAX_OBJECTS) % 2, np.arange(MAX_OBJECTS) // 2
    alone, again = (count == 1)[:, None], count[:, None] > 2 + half
    cut_again = cuts[:, 1 + half]
    along_lo, along_hi = np.where(half == 0, 0, cuts[:, :1]), np.where((half == 0) & ~alone, cuts[:, :1], 1)
    across_lo = np.where(again & (quarter == 1), cut_again, 0)
    across_hi = np.where(again & (quarter == 0), cut_again, 1)

    size, place_along, place_across = u[:, 8:].reshape(-1, 3, MAX_OBJECTS).transpose(1, 0, 2)
    largest = np.minimum(np.minimum(along_hi - along_lo, across_hi - across_lo) / 2 - MARGIN, LONE_RADIUS[1])
    smallest = np.where(alone, LONE_RADIUS[0], MIN_RADIUS)
    radius = smallest + (largest - smallest) * size
    room = radius + MARGIN
    along = along_lo + room + (along_hi - along_lo - 2 * room) * place_along
    across = across_lo + room + (across_hi - across_lo - 2 * room) * place_across

    # "left of" must not be mistaken for "above": two objects are at most half as far apart across as along
    apart = (along[:, 1] - along[:, 0]) * (place_across[:, 1] - 0.5)
    beside = np.clip(across[:, 0] + apart, room[:, 1], 1 - room[:, 1])
    across[:, 1] = np.where(kind == 3, beside, across[:, 1])

    along = np.where(relation[:, None] % 2 == 0, along, 1 - along)
    x, y = np.where(relation[:, None] < 2, (along, across), (across, along))
    return Scene(kind, relation, count, shape, colour, x, y, radius)


def captions(scene):
    """The captions of a Scene, a list of B strings."""
    things = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    first, second = (scene.colour * len(SHAPES) + scene.shape)[:, :2].T.tolist()
    return [f"a {things[a]}" if kind == 0 else f"{NUMBERS[count]} {things[a]}s" if kind == 1 else
            f"a {things[a]} {'and' if kind == 2 else RELATIONS[relation]} a {things[b]}"
            for kind, relation, count, a, b in zip(*(column.tolist() for column in scene[:3]), first, second)]


def coverage(shape, x, y, radius, image_size):
    """The fraction of each pixel that a shape covers, anti-aliased: float32 (..., image_size, image_size) in [0, 1].
    `shape` indexes SHAPES; x, y and radius are as in a Scene; the four broadcast to (...,)."""
    shape, *places = np.broadcast_arrays(shape, *(np.asarray(a, dtype=np.float32) for a in (x, y, radius)))
    pixel = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    distance = np.empty((*shape.shape, image_size, image_size), dtype=np.float32)
    for k in range(len(SHAPES)):
        these = shape == k
        centre_x, centre_y, r = (a[these][:, None, None] for a in places)
        dx, dy = np.abs(pixel - centre_x), pixel[:, None] - centre_y  # (n, 1, W) and (n, H, 1)
        # signed distance to the outline, negative inside; coverage falls from one to zero across one pixel
        distance[these] = (np.sqrt(dx**2 + dy**2) - r if k == 0 else np.maximum(dx, np.abs(dy)) - r if k == 1 else
                           # base 2r, height 2r, apex up
                           np.maximum(dy - r, (2 * dx - dy - r) / np.sqrt(np.float32(5))))
    return np.clip(0.5 - distance * image_size, 0, 1)


def render(scene, image_size):
    """A Scene as images, uint8 (B, 3, image_size, image_size)."""
    most = scene.count.max(initial=0)
    cover = coverage(*(column[:, :most] for column in (scene.shape, scene.x, scene.y, scene.radius)), image_size)
    ground = np.array(GROUND, dtype=np.float32)
    paint = np.array(list(COLOURS.values()), dtype=np.float32)[scene.colour[:, :most]] - ground
    paint *= (np.arange(most) < scene.count[:, None])[:, :, None]
    images = paint.transpose(0, 2, 1) @ cover.reshape(*cover.shape[:2], -1) + ground[:, None]
    return (images + 0.5).astype(np.uint8).reshape(-1, 3, image_size, image_size)
