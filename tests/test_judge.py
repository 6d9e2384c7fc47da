"""The judge of labelled shards: what it learns, and what evaluate.py makes of it."""
import json

import numpy as np
import pytest
import torch
from helpers import SMALL, fails, png, run

from evidence import judge
from plumbing import checkpoint
from plumbing.shards import Shards, write_shards

COLOURS = {"red": (230, 40, 30), "green": (60, 200, 60), "blue": (30, 60, 230)}


def example(i):
    """A picture of one colour, with labels that follow from it; "style" is its brightness."""
    name, bright = list(COLOURS)[i % 3], i % 2
    colour = tuple(int(value * (1 if bright else 0.4)) for value in COLOURS[name])
    record = {"captions": [f"{name} {bright}"], "style": "bright" if bright else "dark", "group": name, "concept": name}
    return f"{i:04d}", {"png": png(colour, (16, 16)), "json": json.dumps(record).encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    write_shards(folder / "train", map(example, range(120)))
    write_shards(folder / "val", map(example, range(30)))
    write_shards(folder / "combinations" / "val", map(example, range(12)))
    return folder


@pytest.fixture(scope="module")
def trained(shards):
    """The file of a judge, and what its training printed."""
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        judge.main([f"--data_dir={shards}", f"--out={shards / 'judge.pt'}", "--image_size=16", "--iterations=60"])
    return shards / "judge.pt", "\n".join(printed)


def test_a_judge_learns_what_pictures_show(shards, trained):
    path, printed = trained
    assert f"{shards}/val, 30 images: style 1.000, group 1.000, concept 1.000" in printed
    assert f"{shards}/combinations/val, 12 images: style 1.000" in printed
    learned, held_out = judge.load(path), Shards(str(shards), "val", 3, 16, 16)
    images, records = judge.images_of(held_out, 30), judge.labels_of(held_out, 30)
    features, hits = judge.judged(learned, images, records)
    assert features.shape == (30, 192) and all(all(hit) and len(hit) == 30 for hit in hits.values())
    _, hits = judge.judged(learned, images, records[1:] + records[:1])  # the captions of other pictures
    assert not any(hits["group"]) and not any(hits["style"])
    _, hits = judge.judged(learned, images, [{**record, "concept": "unseen"} for record in records])
    assert hits.keys() == {"style", "group"}  # of an emoji that it does not know it says nothing


def test_evaluate_asks_the_judge(shards, trained, tmp_path):
    settings = [*SMALL, "--dataset=shards", f"--data_dir={shards}", "--image_size=16", "--patch_size=8", "--channels=3"]
    run("train.py", *settings, "--objective=fm", "--max_iters=1", f"--out_dir={tmp_path}")
    run("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", f"--judge={trained[0]}", "--steps=2",
        "--num_samples=24")
    found = json.loads((tmp_path / "evaluate.json").read_text())["samples, 2 steps"]
    for label in judge.LABELS:
        assert found[f"{label}, of real images"]["mean"] == 1 and found[label]["mean"] < 0.8  # noise
    assert found["frechet_distance"] > 10 * found["frechet_distance, of real images"] >= 0
    # a model that is passed on does not know where its training images are
    checkpoint.slim(tmp_path / "ckpt.pt", tmp_path / "passed_on" / "ckpt.pt")
    run("evaluate.py", "--device=cpu", f"--out_dir={tmp_path / 'passed_on'}", f"--data_dir={shards}",
        f"--judge={trained[0]}", "--steps=2", "--num_samples=24")
    again = json.loads((tmp_path / "passed_on" / "evaluate.json").read_text())["samples, 2 steps"]
    assert again.keys() == found.keys() - {"frechet_distance, of real images"}
    assert again["frechet_distance"] == pytest.approx(found["frechet_distance"], rel=1e-2)  # weights in float16


def test_copies_are_left_out_of_the_distance_between_real_images(shards, trained, tmp_path):
    _, members = example(0)
    copy = {**members, "json": json.dumps(json.loads(members["json"]) | {"copy": 1}).encode()}
    write_shards(tmp_path / "train", [*((f"copy{i}", copy) for i in range(20)), *map(example, range(120))])
    held_out = Shards(str(shards), "val", 3, 16, 16)
    found = [judge.compare(trained[0], judge.images_of(held_out, 30), held_out, Shards(str(folder), "train", 3, 16, 16))
             for folder in (shards, tmp_path)]
    assert found[0] == found[1]


def test_what_a_judge_cannot_use_is_named(shards, trained, tmp_path):
    write_shards(tmp_path / "plain" / "train", [(str(i), {"png": png(), "txt": b"a"}) for i in range(2)])
    with pytest.raises(SystemExit, match="example 0 has no style in its .json"):
        judge.main([f"--data_dir={tmp_path / 'plain'}", f"--out={tmp_path / 'judge.pt'}"])
    settings = [*SMALL, "--dataset=shards", f"--data_dir={shards}", "--image_size=16", "--patch_size=8", "--channels=3"]
    run("train.py", *settings, "--objective=fm", "--max_iters=1", f"--out_dir={tmp_path}")
    line = fails("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", f"--judge={tmp_path / 'none.pt'}", "--steps=2")
    assert "none.pt: make it with python -m evidence.judge" in line
    line = fails("evaluate.py", "--device=cpu", f"--out_dir={tmp_path}", f"--judge={tmp_path / 'ckpt.pt'}", "--steps=2",
                 "--num_samples=4")
    assert "is no checkpoint of a judge of" in line


def test_training_moves_images_and_keeps_their_labels():
    """One pixel tells two classes apart; found in every place that a shift can bring it to."""
    images = torch.ones(2, 3, 16, 16)
    images[0, :, 6:10, 6:10] = -1
    learned = judge.Judge(16, {"group": ["dot", "nothing"]}, width=8)
    torch.manual_seed(0)
    judge.train(learned, images, {"group": torch.tensor([0, 1])}, 60, batch_size=16, lr=1e-2)
    moved = torch.stack([images[0].roll(shift, (1, 2)) for shift in np.ndindex(2, 2)])
    assert learned.eval().judge(moved)[1]["group"] == ["dot"] * 4
