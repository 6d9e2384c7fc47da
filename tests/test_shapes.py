"""Captions are true of their images: by the scene's numbers, and by the pixels alone."""
import re
from collections import Counter

import numpy as np
import pytest

from plumbing import rng, shapes
from plumbing.shapes import COLOURS, GROUND, KINDS, MARGIN, MIN_RADIUS, NUMBERS, RELATIONS, SHAPES

THING = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"


def read_caption(caption):
    """What a caption claims: (list of (colour, shape), relation or None)."""
    if m := re.fullmatch(rf"a {THING}", caption):
        return [m.groups()], None
    if m := re.fullmatch(rf"({'|'.join(NUMBERS.values())}) {THING}s", caption):
        count = next(n for n, word in NUMBERS.items() if word == m[1])
        return [(m[2], m[3])] * count, None
    m = re.fullmatch(rf"a {THING} (and|{'|'.join(RELATIONS)}) a {THING}", caption)
    assert m, caption
    return [(m[1], m[2]), (m[4], m[5])], None if m[3] == "and" else m[3]


def holds(relation, dx, dy):
    """Is the first object, (dx, dy) away from the second, plainly in that relation to it?"""
    ahead, aside = {"left of": (-dx, dy), "right of": (dx, dy), "above": (-dy, dx), "below": (dy, dx)}[relation]
    return ahead > 1.5 * abs(aside)


def components(colours):
    """Colour numbers (B, H, W), -1 for ground -> labels (B, H, W): one for each connected colour, 0 for ground."""
    labels = np.where(colours >= 0, 1 + np.arange(colours[0].size).reshape(colours.shape[1:]), 0)
    while True:
        before = labels.copy()
        for axis in (1, 2):
            for view, hue in ((labels, colours), (np.flip(labels, axis), np.flip(colours, axis))):
                a, b = np.moveaxis(view, axis, 0), np.moveaxis(hue, axis, 0)
                for k in range(1, len(a)):
                    a[k] = np.where((b[k] == b[k - 1]) & (b[k] >= 0), np.maximum(a[k], a[k - 1]), a[k])
        if (labels == before).all():
            return labels


def read_pixels(images):
    """uint8 (B, 3, H, W) -> for every image a list of (colour, shape, x, y) of what can be seen, in pixels."""
    away = images.astype(float).transpose(0, 2, 3, 1) - GROUND
    paint = np.array(list(COLOURS.values()), dtype=float) - GROUND
    cover = away @ paint.T / (paint**2).sum(1)  # (B, H, W, 6): how much paint of each colour explains the pixel
    misfit = ((away[..., None, :] - cover[..., None] * paint) ** 2).sum(-1)
    best = misfit.argmin(-1)
    cover = np.take_along_axis(cover, best[..., None], -1)[..., 0]
    labels = components(np.where(cover > 0.5, best, -1))

    seen = []
    for label, amount, colour in zip(labels, cover, best):
        things = []
        for k in np.unique(label[label > 0]):
            ys, xs = np.nonzero(label == k)
            box = slice(ys.min() - 1, ys.max() + 2), slice(xs.min() - 1, xs.max() + 2)  # with its soft edge
            mine = (label[box] == k) | (label[box] == 0) & (colour[box] == colour[ys[0], xs[0]])
            own = np.where(mine, amount[box], 0)
            full = own.sum() / (own.sum(0).max() * own.sum(1).max())  # fraction of its bounding box: 1 or pi/4
            rows = own.sum(1) / own.sum()
            up = rows @ np.arange(len(rows)) - np.arange(len(rows))
            skew = rows @ up**3 / (rows @ up**2) ** 1.5  # 0.57 for a triangle, apex up; 0 for the others
            shape = "triangle" if skew > 0.28 else "square" if full > 0.92 else "circle"
            things.append((list(COLOURS)[colour[ys[0], xs[0]]], shape, xs.mean(), ys.mean()))
        seen.append(things)
    return seen


def test_hash_is_splitmix64():
    golden = 0x9E3779B97F4A7C15
    states = np.array([golden, (1234567 + golden) % 2**64], dtype=np.uint64)
    assert rng.mix(states).tolist() == [0xE220A8397B1DCDAF, 6457827717110365317]


def test_uniforms_are_uniform_and_uncorrelated():
    u = rng.uniforms(3, range(50_000), 6)
    assert 0 <= u.min() and u.max() < 1
    counts = np.stack([np.histogram(column, 20, (0, 1))[0] for column in u.T])
    assert ((counts - 2500) ** 2 / 2500).sum(1).max() < 50  # chi-squared, 19 degrees of freedom
    several = np.concatenate([u, u[np.r_[1:len(u), 0]], rng.uniforms(4, range(50_000), 6)], 1)
    assert np.abs(np.corrcoef(several.T) - np.eye(18)).max() < 0.025


def test_captions_state_the_scene():
    scene = shapes.scenes(0, range(5_000))
    for b, caption in enumerate(shapes.captions(scene)):
        things, relation = read_caption(caption)
        n = scene.count[b]
        truth = [(list(COLOURS)[c], SHAPES[s]) for c, s in zip(scene.colour[b, :n], scene.shape[b, :n])]
        assert things == truth
        assert (relation is not None) == (KINDS[scene.kind[b]] == "relation")
        if relation:
            assert relation == RELATIONS[scene.relation[b]]
            assert holds(relation, scene.x[b, 0] - scene.x[b, 1], scene.y[b, 0] - scene.y[b, 1])
        if KINDS[scene.kind[b]] in ("and", "relation"):
            assert truth[0] != truth[1]


def test_objects_are_apart_inside_and_large_enough():
    scene = shapes.scenes(1, range(20_000))
    there = np.arange(4) < scene.count[:, None]
    assert (scene.radius >= MIN_RADIUS)[there].all()
    for place in (scene.x, scene.y):
        assert (place - scene.radius >= MARGIN - 1e-9)[there].all()
        assert (place + scene.radius <= 1 - MARGIN + 1e-9)[there].all()
    for i in range(4):
        for j in range(i):
            gap = np.maximum(abs(scene.x[:, i] - scene.x[:, j]), abs(scene.y[:, i] - scene.y[:, j]))
            gap -= scene.radius[:, i] + scene.radius[:, j]
            assert gap[there[:, i]].min() >= 2 * MARGIN - 1e-9
    assert 2 * MARGIN * 16 > 1.25  # pixels at 16x16


def test_places_and_sizes_vary():
    scene = shapes.scenes(2, range(20_000))
    for n in range(1, 5):
        some = scene.count == n
        assert min(scene.x[some, 0].std(), scene.y[some, 0].std()) > 0.08
        assert scene.radius[some, 0].std() > 0.015


@pytest.mark.slow
@pytest.mark.parametrize("image_size, count", [(16, 4_000), (32, 500)])
def test_pixels_alone_tell_the_caption(image_size, count):
    scene = shapes.scenes(4, range(count))
    seen = read_pixels(shapes.render(scene, image_size))
    for caption, things in zip(shapes.captions(scene), seen):
        claimed, relation = read_caption(caption)
        assert Counter(claimed) == Counter((colour, shape) for colour, shape, _, _ in things), caption
        if relation:
            place = {(colour, shape): np.array([x, y]) for colour, shape, x, y in things}
            assert holds(relation, *(place[claimed[0]] - place[claimed[1]])), caption


def test_explicit_scenes_are_rendered():
    def scene(shape):
        row = np.zeros((1, 4))
        return shapes.Scene(np.array([0]), np.array([0]), np.array([1]), row.astype(int) + SHAPES.index(shape),
                            row.astype(int), row + 0.5, row + 0.5, row + 0.25)

    paint, ground = np.array(COLOURS["red"]), np.array(GROUND)
    for shape, area in {"circle": np.pi / 16, "square": 1 / 4, "triangle": 1 / 8}.items():
        image = shapes.render(scene(shape), 128)[0]
        assert image.shape == (3, 128, 128) and image.dtype == np.uint8
        assert (image[:, 64, 64] == paint).all() and (image[:, 0, 0] == ground).all()
        covered = (image[0] - float(ground[0])).mean() / (paint[0] - ground[0])
        assert covered == pytest.approx(area, rel=0.01)
    rows = (shapes.render(scene("triangle"), 128)[0, 0] == paint[0]).sum(1)
    assert rows[40] < rows[60] < rows[90]  # apex up


def test_scene_is_a_function_of_seed_and_number():
    batch = shapes.scenes(5, [7, 3, -1, 10**12])
    for b, i in enumerate([7, 3, -1, 10**12]):
        for whole, alone in zip(batch, shapes.scenes(5, [i])):
            assert (whole[b] == alone[0]).all()
    images = shapes.render(batch, 16)
    assert (images[1] == shapes.render(shapes.scenes(5, [3]), 16)[0]).all()
    assert not (shapes.scenes(6, [7, 3, -1, 10**12]).x == batch.x).any()


def test_scenes_stay_what_they_were():
    """Checkpoints and reported numbers rest on these very scenes."""
    assert shapes.captions(shapes.scenes(0, [0, 1, 4, 5])) == [
        "two blue triangles", "a cyan square", "a purple square above a cyan triangle",
        "a blue circle above a green circle"]


def test_all_captions_occur_and_kinds_are_equally_frequent():
    scene = shapes.scenes(0, range(100_000))
    # 18 alone, 18 in three numbers, 18 x 17 pairs joined by "and" or by one of four relations
    assert len(set(shapes.captions(scene))) == 18 + 3 * 18 + 5 * 18 * 17
    assert np.abs(np.bincount(scene.kind) / 100_000 - 0.25).max() < 0.01


def test_colours_are_separable_in_colour_and_in_grey():
    palette = np.array([GROUND, *COLOURS.values()], dtype=float)
    far = np.linalg.norm(palette[:, None] - palette, axis=-1) + 1e3 * np.eye(7)
    assert far.min() > 140
    assert np.diff(np.sort(palette @ [0.299, 0.587, 0.114])).min() > 15
