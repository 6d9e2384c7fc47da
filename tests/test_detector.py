"""The detector on images whose content is known: rendered scenes, scenes made by hand, and images that are no scene."""
from collections import Counter

import numpy as np
import pytest
import torch

import data
from evidence import detector
from evidence.detector import TASKS, detect, follows, parse, task_prompts
from plumbing import shapes
from plumbing.images import to_pixels
from plumbing.shapes import COLOURS, KINDS, NUMBERS, RELATIONS, SHAPES


def scene_image(*things, size=16):
    """An image (3, S, S) in [-1, 1] of things (colour, shape, x, y[, radius])."""
    things = [(*thing, 0.15)[:5] for thing in things]
    rows = [[*column, *[column[0]] * (4 - len(things))] for column in zip(*things)]
    colour, shape = ([list(names).index(name) for name in row] for names, row in zip((COLOURS, SHAPES), rows))
    scene = shapes.Scene(*(np.array(a)[None] for a in (0, 0, len(things), shape, colour, *rows[2:])))
    return to_pixels(shapes.render(scene, size)[0])


def paint(mask, colour):
    """A boolean mask (S, S) in one paint (three 8-bit numbers) on the ground."""
    return to_pixels(np.where(mask, np.reshape(colour, (3, 1, 1)), np.reshape(shapes.GROUND, (3, 1, 1))))


def changed(caption):
    """All captions with one word (or the order of a relation) changed, so that what they say is something else."""
    words, plural = caption.split(), "s" * (parse(caption)[0] == "several")
    alike = [list(COLOURS), [shape + plural for shape in SHAPES], list(NUMBERS.values())]
    captions = [" ".join([*words[:i], other, *words[i + 1:]]) for i, word in enumerate(words)
                for names in alike if word in names for other in names if other != word]
    for relation in RELATIONS:
        if relation in caption:
            first, second = caption.split(f" {relation} ")
            captions += [f"{first} {other} {second}" for other in RELATIONS if other != relation]
            captions += [f"{second} {relation} {first}"]
    return captions


@pytest.mark.slow
@pytest.mark.parametrize("size, count", [(16, 1_000), (32, 300)])
@pytest.mark.parametrize("noise", [0, 0.1])
def test_every_true_caption_holds_and_no_changed_one(size, count, noise, monkeypatch):
    ds = data.get_dataset("shapes", "val", size, 3)
    generator = torch.Generator().manual_seed(0)
    for image, caption in ds.__getitems__(range(count)):
        objects = detect(image + noise * torch.randn(image.shape, generator=generator))
        with monkeypatch.context() as patch:  # one look is enough for a dozen captions
            patch.setattr(detector, "detect", lambda image: objects)
            assert follows(image, caption), caption
            assert [c for c in changed(caption) if follows(image, c)] == [], caption


def test_changed_captions_are_captions_of_all_kinds():
    assert len(changed("a red circle")) == 5 + 2
    assert len(changed("two red circles")) == 5 + 2 + 2
    assert len(changed("a red circle and a blue square")) == 2 * (5 + 2)
    assert len(changed("a red circle left of a blue square")) == 2 * (5 + 2) + 3 + 1
    assert "three red circles" in changed("two red circles")
    assert "a blue square left of a red circle" in changed("a red circle left of a blue square")


@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.slow
def test_objects_are_found_where_they_are(size):
    scene = shapes.scenes(0, range(300))
    for b, image in enumerate(to_pixels(shapes.render(scene, size))):
        for thing in detect(image):
            miss = np.hypot(scene.x[b] - thing.x, scene.y[b] - thing.y)[:scene.count[b]]
            k = miss.argmin()
            assert miss[k] * size < 0.3  # pixels
            assert (thing.colour, thing.shape) == (list(COLOURS)[scene.colour[b, k]], SHAPES[scene.shape[b, k]])
            area = scene.radius[b, k] ** 2 * [np.pi, 4, 2][scene.shape[b, k]]
            assert thing.area == pytest.approx(area, rel=0.15)


def test_no_more_and_no_less():
    circle, other = ("red", "circle", 0.25, 0.25), ("red", "circle", 0.75, 0.75)
    square = ("blue", "square", 0.75, 0.25)
    assert follows(scene_image(circle, other), "two red circles")
    assert not follows(scene_image(circle), "two red circles")
    assert not follows(scene_image(circle, other), "a red circle")
    assert not follows(scene_image(circle, other, square), "two red circles")
    assert not follows(scene_image(circle, other, square), "a red circle and a blue square")
    assert follows(scene_image(circle, square), "a blue square and a red circle")
    assert not follows(scene_image(square), "a red circle and a blue square")


def test_speck_is_no_object_but_a_stranger_is():
    image = scene_image(("red", "circle", 0.3, 0.3), size=32)
    assert follows(image, "a red circle")
    image[:, 25, 25] = 1
    assert follows(image, "a red circle")
    image[:, 22:29, 22:29] = 1  # white is no colour of the palette
    assert not follows(image, "a red circle")
    assert [(thing.colour, thing.shape) for thing in detect(image)] == [("red", "circle"), (None, "square")]


@pytest.mark.parametrize("image", [
    torch.full((3, 16, 16), -1.0), torch.ones(3, 16, 16), torch.zeros(3, 16, 16), torch.full((3, 16, 16), torch.nan),
    paint(np.ones((16, 16)), COLOURS["red"]),
    torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0)),
    torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1])
def test_what_is_no_scene_follows_no_caption(image):
    captions = {caption for _, caption in task_prompts(54)}
    assert not any(follows(image, caption) for caption in captions)
    assert not any(follows(image, caption, task) for task, caption in task_prompts(18))


def test_other_shapes_and_colours_have_no_name():
    y, x = np.mgrid[:32, :32] - 15.5  # pixels from the middle, y down
    red = COLOURS["red"]
    assert detect(paint(x**2 + y**2 < 100, red))[0].shape == "circle"
    assert detect(paint(x**2 / 1.1 + y**2 * 1.1 < 100, red))[0].shape == "circle"  # samples are not exact
    for mask in (abs(x) + abs(y) < 10,  # a square on its corner
                 (2 * abs(x) + y < 10) & (abs(y) < 10),  # a triangle on its head
                 (abs(x) < 6) & (abs(y) < 12),  # twice as high as it is wide
                 (x**2 + y**2 < 100) & (x**2 + y**2 > 25),
                 (x**2 + (y - 5) ** 2 < 30) | (x**2 + (y + 5) ** 2 < 30),  # two merged circles
                 abs(x) < 99):  # all of the image
        assert [thing.shape for thing in detect(paint(mask, red))] == [None]
    assert detect(paint(x**2 + y**2 < 100, (200, 60, 50)))[0].colour == "red"
    for colour in ((255, 130, 0), (160, 160, 160), (255, 255, 255), (150, 30, 25)):
        assert [thing.colour for thing in detect(paint(x**2 + y**2 < 100, colour))] == [None]


def test_components_are_eight_connected():
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 1, 0], [1, 0, 0, 0, 0]], dtype=bool)
    labels = detector.components(mask)
    assert (labels > 0).tolist() == mask.tolist()
    assert sorted(Counter(labels[mask].tolist()).values()) == [1, 2, 7]


def test_one_relation_holds_at_a_time():
    for dx, dy, relation in [(0.5, 0.2, "left of"), (-0.5, 0.2, "right of"), (0.2, 0.5, "above"), (0.2, -0.5, "below")]:
        image = scene_image(("red", "circle", 0.5 - dx / 2, 0.5 - dy / 2), ("blue", "square", 0.5 + dx / 2, 0.5 + dy / 2))
        assert [r for r in RELATIONS if follows(image, f"a red circle {r} a blue square")] == [relation]


def test_tasks_look_at_one_side_of_the_caption():
    red, blue = ("red", "circle", 0.25, 0.25), ("blue", "square", 0.75, 0.25)
    swapped = scene_image(("blue", "circle", 0.25, 0.25), ("red", "square", 0.75, 0.25))
    both, two = scene_image(red, blue), scene_image(red, ("cyan", "circle", 0.75, 0.75))
    assert follows(both, "a green circle", "single object")
    assert not follows(both, "a red triangle", "single object")

    pair = "a red circle and a blue square"
    assert follows(both, pair, "two objects") and follows(swapped, pair, "two objects")
    assert not follows(two, pair, "two objects")
    assert follows(both, pair, "colour attribution") and not follows(swapped, pair, "colour attribution")

    assert follows(two, "two green circles", "counting") and not follows(two, "three green circles", "counting")
    assert follows(scene_image(red, blue, ("red", "circle", 0.75, 0.75)), "two red circles", "counting")
    assert not follows(scene_image(red, ("red", "circle", 0.75, 0.25), ("red", "circle", 0.75, 0.75)), "two red circles",
                       "counting")

    assert follows(both, "a red circle", "colours") and not follows(swapped, "a red circle", "colours")
    assert not follows(both, "a blue circle", "colours")

    assert follows(both, "a red circle left of a blue square", "position")
    assert follows(swapped, "a red circle left of a blue square", "position")
    assert not follows(both, "a red circle right of a blue square", "position")
    assert not follows(both, "a red circle above a blue square", "position")
    assert not follows(two, "a red circle left of a blue square", "position")


def test_task_prompts_are_captions_of_the_data_set():
    prompts = task_prompts(60)
    assert prompts == task_prompts(60) != task_prompts(60, seed=1)
    assert Counter(task for task, _ in prompts) == dict.fromkeys(TASKS, 60)
    known = set(shapes.captions(shapes.scenes(0, range(100_000))))
    for task, caption in prompts:
        assert caption in known and parse(caption)[0] == TASKS[task][0]
    distinct = Counter(task for task, _ in set(prompts))
    assert distinct == {"single object": 18, "two objects": 60, "counting": 54, "colours": 18, "position": 60,
                        "colour attribution": 60}
    assert {kind for kind, _, _ in TASKS.values()} == set(KINDS)


def test_arrays_and_tensors_of_any_kind_are_alike():
    image = scene_image(("green", "triangle", 0.4, 0.5, 0.2))
    for same in (image.numpy(), image.bfloat16(), image.double().requires_grad_(), image.numpy()[:, ::-1][:, ::-1]):
        assert follows(same, "a green triangle")
    assert detect(image * 5)[0][:2] == detect((image * 5).clamp(-1, 1))[0][:2]


@pytest.mark.parametrize("caption", ["", "red circle", "a red circles", "two red circle", "five red circles",
                                     "a pink circle", "a red circle near a blue square", "A red circle", "a circle"])
def test_other_captions_are_refused_in_one_line(caption):
    with pytest.raises(ValueError, match="is not a caption of the shapes data set; 'a red circle'") as error:
        follows(scene_image(("red", "circle", 0.5, 0.5)), caption)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 16, 16), (16, 16), (3, 16, 8), (2, 3, 16, 16)])
def test_other_images_are_refused(shape):
    with pytest.raises(ValueError, match=r"square images \(3, S, S\)"):
        follows(torch.zeros(shape), "a red circle")


def test_tasks_refuse_captions_of_other_kinds():
    image = scene_image(("red", "circle", 0.5, 0.5))
    for task in ("counting", "colour"):
        with pytest.raises(ValueError, match=f"task '{task}' is not for 'a red circle'.*counting .several."):
            follows(image, "a red circle", task)


def test_images_of_integers_are_refused():
    """Clipped to [-1, 1], all of 0 to 255 but 0 would be white."""
    for image in np.zeros((3, 16, 16), dtype=np.uint8), torch.zeros(3, 16, 16, dtype=torch.uint8):
        with pytest.raises(ValueError, match="of integers"):
            detect(image)
