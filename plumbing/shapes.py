"""The "shapes" data set: coloured circles, squares and triangles on a dark ground, with a caption that is always true.

- four kinds of caption, equally frequent: one object ("a red circle"), two to four alike ("three blue circles"), two
  joined by "and" ("a red circle and a blue square"), two in a relation ("a red square left of a green circle")
- scene i is a pure function of (seed, i): a hash takes the place of a random generator
- objects never touch: the image is cut at random into as many rectangles, and each object stays well inside its own
- lengths are in image widths, x to the right and y down, so a scene can be rendered at any size
"""
from typing import NamedTuple

import numpy as np

from plumbing.rng import uniforms

SHAPES = ("circle", "square", "triangle")
COLOURS = {  # far apart, in grey as well
    "red": (230, 40, 30),
    "green": (60, 200, 60),
    "blue": (30, 60, 230),
    "yellow": (250, 225, 50),
    "purple": (180, 60, 210),
    "cyan": (70, 225, 240),
}
GROUND = (16, 16, 24)
THINGS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
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
    """B scenes of up to 4 objects each.

    Columns from `count` on are meaningless, and so is `relation` where `kind` is not 3. Integers index the constants
    above; x, y and radius are in image widths.
    """
    kind: np.ndarray  # (B,)
    relation: np.ndarray  # (B,)
    count: np.ndarray  # (B,)
    shape: np.ndarray  # (B, 4)
    colour: np.ndarray  # (B, 4)
    x: np.ndarray  # (B, 4) the centre of the bounding square
    y: np.ndarray  # (B, 4)
    radius: np.ndarray  # (B, 4) half the side of the bounding square


def scenes(seed, indices):
    """A Scene of B scenes: those with the numbers `indices`, which may be negative, of the endless sequence `seed`."""
    return compose(uniforms(seed, indices, DRAWS))


def compose(u):
    """The Scene made from B rows of uniform numbers, (B, DRAWS) in [0, 1)."""
    kind = whole(u[:, 0], len(KINDS))
    relation = whole(u[:, 1], len(RELATIONS))
    several = 2 + whole(u[:, 2], len(NUMBERS))
    count = np.select([kind == 0, kind == 1], [1, several], 2)
    colour, shape = draw_things(kind, u[:, 3], u[:, 4])
    cuts = CUT[0] + (CUT[1] - CUT[0]) * u[:, 5:8]
    places = u[:, 8:].reshape(-1, 3, MAX_OBJECTS)
    along, across, radius = place_objects(kind, count, cuts, *places.transpose(1, 0, 2))

    # the relation determines the layout: which axis is "along", and which of the first two objects comes first
    backwards = relation[:, None] % 2 == 1
    along = np.where(backwards, 1 - along, along)
    sideways = relation[:, None] < 2
    x = np.where(sideways, along, across)
    y = np.where(sideways, across, along)
    return Scene(kind, relation, count, shape, colour, x, y, radius)


def whole(u, n):
    """Uniform numbers in [0, 1) as integers from 0 to n - 1."""
    return (u * n).astype(int)


def draw_things(kind, u_first, u_second):
    """Draw the colours and shapes of 4 objects, (B, 4) each: all alike for "several", two in turn for other kinds.

    kind and both u are (B,); the two differ.
    """
    first = whole(u_first, len(THINGS))
    other = (first + 1 + whole(u_second, len(THINGS) - 1)) % len(THINGS)
    second = np.where(kind == 1, first, other)
    return np.divmod(np.stack([first, second, first, second], 1), len(SHAPES))


def place_objects(kind, count, cuts, size, place_along, place_across):
    """Place objects: positions along an axis and across it, and radii, each (B, 4). cuts: (B, 3); the rest: (B, 4).

    One cut makes two halves, one after the other "along" the axis. For three and four objects, a half is cut once more,
    "across" the axis.
    """
    half = np.arange(MAX_OBJECTS) % 2
    is_second = np.arange(MAX_OBJECTS) // 2 == 1  # the second of the two objects in its half
    alone = (count == 1)[:, None]
    shares_half = count[:, None] > 2 + half
    first_cut = cuts[:, :1]
    second_cut = cuts[:, 1 + half]
    along_lo = np.where(half == 0, 0, first_cut)
    along_hi = np.where((half == 0) & ~alone, first_cut, 1)
    across_lo = np.where(shares_half & is_second, second_cut, 0)
    across_hi = np.where(shares_half & ~is_second, second_cut, 1)

    length = along_hi - along_lo
    breadth = across_hi - across_lo
    largest = np.minimum(length, breadth) / 2 - MARGIN
    largest = np.minimum(largest, LONE_RADIUS[1])
    smallest = np.where(alone, LONE_RADIUS[0], MIN_RADIUS)
    radius = smallest + (largest - smallest) * size
    room = radius + MARGIN
    along = along_lo + room + (length - 2 * room) * place_along
    across = across_lo + room + (breadth - 2 * room) * place_across

    # "left of" must not be mistaken for "above": two objects are at most half as far apart across as along
    apart = (along[:, 1] - along[:, 0]) * (place_across[:, 1] - 0.5)
    beside = np.clip(across[:, 0] + apart, room[:, 1], 1 - room[:, 1])
    across[:, 1] = np.where(kind == 3, beside, across[:, 1])
    return along, across, radius


def captions(scene):
    """The captions of a Scene, a list of B strings."""
    numbers = scene.colour * len(SHAPES) + scene.shape
    columns = [scene.kind, scene.relation, scene.count, *numbers[:, :2].T]
    rows = np.stack(columns, 1).tolist()
    return [caption(*row) for row in rows]


def caption(kind, relation, count, first, second):
    """The caption of one scene; first and second: numbers of THINGS."""
    if KINDS[kind] == "one":
        return f"a {THINGS[first]}"
    if KINDS[kind] == "several":
        return f"{NUMBERS[count]} {THINGS[first]}s"
    link = "and" if KINDS[kind] == "and" else RELATIONS[relation]
    return f"a {THINGS[first]} {link} a {THINGS[second]}"


def distance(name, dx, dy, r):
    """Signed distance to the outline of a shape of radius r, negative inside. dx and dy: from its centre, dx >= 0."""
    if name == "circle":
        return np.sqrt(dx**2 + dy**2) - r
    if name == "square":
        return np.maximum(dx, np.abs(dy)) - r
    side = (2 * dx - dy - r) / np.sqrt(np.float32(5))  # of a triangle: base 2r, height 2r, apex up
    return np.maximum(dy - r, side)


def coverage(shape, x, y, radius, image_size):
    """The fraction of each pixel that a shape covers, anti-aliased: float32 (..., image_size, image_size) in [0, 1].
    `shape` indexes SHAPES; x, y and radius are as in a Scene; the four broadcast to (...,)."""
    places = [np.asarray(a, dtype=np.float32) for a in (x, y, radius)]
    shape, *places = np.broadcast_arrays(shape, *places)
    pixel = (np.arange(image_size, dtype=np.float32) + 0.5) / image_size
    cover = np.empty((*shape.shape, image_size, image_size), dtype=np.float32)
    for k, name in enumerate(SHAPES):
        chosen = shape == k
        centre_x, centre_y, r = (place[chosen][:, None, None] for place in places)
        dx = np.abs(pixel - centre_x)  # (n, 1, W)
        dy = pixel[:, None] - centre_y  # (n, H, 1)
        cover[chosen] = 0.5 - distance(name, dx, dy, r) * image_size  # from one to zero across one pixel
    return np.clip(cover, 0, 1)


def render(scene, image_size):
    """A Scene as images, uint8 (B, 3, image_size, image_size)."""
    most = scene.count.max(initial=0)
    columns = scene.shape, scene.x, scene.y, scene.radius
    columns = [column[:, :most] for column in columns]
    cover = coverage(*columns, image_size)
    ground = np.array(GROUND, dtype=np.float32)
    palette = np.array(list(COLOURS.values()), dtype=np.float32)
    paint = palette[scene.colour[:, :most]] - ground
    there = np.arange(most) < scene.count[:, None]
    paint *= there[:, :, None]
    pixels = cover.reshape(*cover.shape[:2], -1)
    images = paint.transpose(0, 2, 1) @ pixels + ground[:, None]
    return (images + 0.5).astype(np.uint8).reshape(-1, 3, image_size, image_size)
