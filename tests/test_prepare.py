"""Shards from emoji packages, and from other shards by way of an autoencoder."""
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (DISTILL, ROOT, SAMPLE, SHORT, SMALL, command, contents, fails, file_of, latent_shard, npy,
                     on_ranks, pixels, png, ranks_of, run, run_with_notes)
from PIL import Image
from tiny import Encoder
from torch import nn

import data
import evidence.emoji
from evidence import blocks, judge
from evidence.judge import frechet_distance
from pipeline import load
from plumbing import checkpoint, images, latents
from plumbing.images import to_uint8
from plumbing.latents import measure_latents
from plumbing.shards import Shards, captions_of, write_shard, write_shards


# ---------------------------------------------------------------------------------------------------------------
# Emoji


STYLES = ("google", "twitter", "openmoji", "fluent")
PEOPLE = [  # as openmoji.json has them: hexcode, base, annotation
    ("1F44B", "", "waving hand"), ("1F44B-1F3FB", "1F44B", "waving hand: light skin tone"),
    ("1F44B-1F3FF", "1F44B", "waving hand: dark skin tone")]


def emoji(code, annotation, group="food-drink", tags="", base=""):
    return {"hexcode": code, "annotation": annotation, "group": group, "tags": tags, "skintone_base_hexcode": base}


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """The four packages as npm packs them, of 80 plain emoji, one with skin tones and a picture without a name."""
    folder = tmp_path_factory.mktemp("packages")
    table = [emoji(f"{0x1F500 + i:X}", f"{i} apple", tags="fruit, apple") for i in range(80)]
    table += [emoji(code, annotation, "people-body", base=base) for code, base, annotation in PEOPLE]
    table += [emoji("1F55A-FE0F", "fruit", tags="yay"), emoji("E000", "a logo", "extras-openmoji")]
    table = json.dumps(table)
    codes = [entry["hexcode"] for entry in json.loads(table)]
    webp = io.BytesIO()
    Image.new("RGBA", (256, 256), (0, 0, 0, 0)).save(webp, "webp")
    files = {"google": {f"img/google/64/{code.lower()}.png": png((i, 0, 0)) for i, code in enumerate(codes)},
             "twitter": {f"img/twitter/64/{code.lower()}.png": png((0, i, 0)) for i, code in enumerate(codes[1:])},
             "openmoji": {f"color/svg/{code}.svg": b"<svg/>" for code in codes},
             "fluent": {f"assets/{code.lower()}.webp": webp.getvalue() for code in codes}}
    files["openmoji"]["data/openmoji.json"] = table.encode()
    paths = []
    for style in STYLES:
        name = evidence.emoji.PACKAGES[style][0].rpartition("@")[0]
        files[style] |= {"package.json": json.dumps({"name": name}).encode(), f"img/{style}/sheets/64.png": b""}
        paths.append(folder / f"{style}.tgz")
        with tarfile.open(paths[-1], "w:gz") as tar:
            for path, content in files[style].items():
                info = tarfile.TarInfo(f"package/{path}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return paths


def prepared(packages, out, monkeypatch, *arguments):
    """What the command prints, and the examples, a list of (KEY.json with its key and split, pixels (64, 64, 3))."""
    monkeypatch.setattr(evidence.emoji, "rasterize", lambda svgs: {code: png((0, 0, 9)) for code in svgs})
    printed, found = command("emoji", *(f"--source={path}" for path in packages), f"--out={out}", *arguments), []
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            members = {name: tar.extractfile(name).read() for name in tar.getnames()}
        for name in members:
            if name.endswith(".json"):
                key, split = name.removesuffix(".json"), path.parent.relative_to(out).as_posix()
                picture = members.get(f"{key}.png") or members[f"{key}.webp"]
                image = np.asarray(Image.open(io.BytesIO(picture)))
                found.append(({"key": key, "split": split, **json.loads(members[name])}, image))
    return printed, found


@pytest.mark.slow
def test_emoji_become_captioned_shards(packages, tmp_path, monkeypatch):
    printed, examples = prepared(packages, tmp_path, monkeypatch)
    copies = [record["key"] for record, _ in examples if record["copy"]]
    assert len(examples) - len(copies) == 4 * 84 - 1  # one is not in twitter's package, and logos have no name
    assert {image.shape for _, image in examples} == {(64, 64, 3)}
    by_key = {record["key"]: (record, image) for record, image in examples}
    assert by_key["fluent-1f501"][1].min() == 255 and by_key["openmoji-1f501"][1].max() == 9  # transparent, over white
    assert by_key["google-1f501"][0]["captions"] == [
        "a 1 apple, google style", "a 1 apple, google style", "an apple, google style", "a fruit, google style",
        "a 1 apple", "an apple"]
    assert by_key["fluent-1f44b-1f3ff"][0]["captions"][-1] == "a waving hand with dark skin tone"
    assert by_key["fluent-1f55a"][0]["captions"] == ["a fruit, fluent style"] * 2 + ["a fruit"]  # no emoji is named yay
    plain = [r["key"] for r, _ in examples if r["split"] == "train" and "1f3f" not in r["key"] and r["key"] not in copies]
    assert sorted(copies) == sorted(f"{key}-{copy}" for key in plain for copy in (1, 2))  # as tones are many
    trained = [caption for _, caption in Shards(str(tmp_path), "train", 3, 64, 64)]
    assert any(caption.endswith(" style") for caption in trained) and not all(" style" in c for c in trained)
    licences = (tmp_path / "LICENCES.txt").read_text()
    assert "Apache" in licences and "CC BY-SA 4.0" in licences and "MIT" in licences
    assert f"train: {sum(record['split'] == 'train' for record, _ in examples)} images" in printed


@pytest.mark.slow
def test_what_is_held_out_of_emoji(packages, tmp_path, monkeypatch):
    """Emoji in every style and tone; and pairs of an emoji and a style, where both are known. Always the same."""
    (_, first), (_, again) = (prepared(packages, tmp_path / name, monkeypatch) for name in "ab")
    assert [record for record, _ in first] == [record for record, _ in again]
    concepts = {split: {record["concept"] for record, _ in first if record["split"] == split}
                for split in ("train", "val", "combinations/val")}
    pairs = {split: {(record["concept"], record["style"]) for record, _ in first if record["split"] == split}
             for split in concepts}
    assert all(concepts.values()) and not concepts["val"] & (concepts["train"] | concepts["combinations/val"])
    assert concepts["combinations/val"] <= concepts["train"]
    assert not pairs["combinations/val"] & pairs["train"]
    known = Shards(str(tmp_path / "a" / "combinations"), "val", 3, 32, 32)
    assert len(known) == sum(record["split"] == "combinations/val" for record, _ in first)


def test_styles_of_emoji_can_be_left_out(packages, tmp_path, monkeypatch):
    _, examples = prepared([packages[0], packages[2]], tmp_path, monkeypatch, "--styles=google")
    assert {record["style"] for record, _ in examples} == {"google"}
    assert {record["split"] for record, _ in examples} == {"train", "val"}  # known in no other style
    assert "OpenMoji" not in (tmp_path / "LICENCES.txt").read_text()
    source = f"--source={packages[0]}"
    assert "needs for names" in fails("data.py", "emoji", source, "--styles=google", f"--out={tmp_path / 'out'}")
    assert "'apple': choose among google," in fails("data.py", "emoji", source, "--styles=apple")


@pytest.mark.slow
def test_emoji_are_kept_in_a_file_and_taken_from_it(packages, tmp_path, monkeypatch):
    kept = tmp_path / "emoji.zip"
    _, fetched = prepared(packages, tmp_path / "fetched", monkeypatch, f"--pictures={kept}")
    monkeypatch.setattr(evidence.emoji, "fetch", None)  # no npm, no network
    printed, taken = prepared([], tmp_path / "taken", monkeypatch, f"--pictures={kept}")
    assert [record for record, _ in taken] == [record for record, _ in fetched]
    assert all(np.array_equal(a, b) for (_, a), (_, b) in zip(taken, fetched, strict=True))
    assert {path.suffix for path in tmp_path.iterdir() if path.is_file()} == {".zip"}
    _, fluent = prepared([], tmp_path / "fluent", monkeypatch, f"--pictures={kept}", "--styles=fluent")
    assert {record["style"] for record, _ in fluent} == {"fluent"}


def test_a_file_of_emoji_that_is_none_is_named(tmp_path):
    kept, out = tmp_path / "emoji.zip", f"--out={tmp_path / 'out'}"
    kept.write_bytes(b"PK")
    assert "is no file of pictures" in fails("data.py", "emoji", f"--pictures={kept}", out)
    evidence.emoji.pack(kept, {}, {("1f34e", "google"): png()})
    line = fails("data.py", "emoji", f"--pictures={kept}", "--styles=google,fluent", out)
    assert "has no pictures of the style fluent: leave it out" in line


@pytest.mark.parametrize("annotation, name, having", [
    ("red apple", "a red apple", ""), ("orange", "an orange", ""), ("women holding hands", "women holding hands", ""),
    ("glass of milk", "a glass of milk", ""), ("cactus", "a cactus", ""), ("man: red hair", "a man", " with red hair"),
    ("glasses", "glasses", ""), ("flag: Ceuta & Melilla", "the flag of ceuta & melilla", ""),
    ("man: dark skin tone, bald", "a man", " with bald head and dark skin tone"),
    ("couple with heart: woman, man, light skin tone, dark skin tone", "a couple with heart of woman and man",
     " with light and dark skin tone"),
    ("person walking: light skin tone, facing right", "a person walking facing right", " with light skin tone"),
    ("keycap: 5", "the key 5", ""), ("Japanese “bargain” button", "a japanese bargain button", ""),
])
def test_names_of_emoji(annotation, name, having):
    assert evidence.emoji.described(annotation) == (name, having)


def test_mirror_images_of_emoji():
    words = evidence.emoji.read_words([
        emoji("A", "red apple"), emoji("B", "left-facing fist", "people-body"), emoji("C", "flag: Chad", "flags"),
        emoji("D", "hundred points", "smileys-emotion")])
    assert [about["mirror"] for _, about in words.values()] == [True, False, False, False]


def test_captions_and_mirror_images_by_epoch(tmp_path):
    """One of an example's captions in each epoch, as (seed, number) has it; a flip only where the example allows it."""
    half = np.zeros((8, 8, 3), np.uint8)
    half[:, 4:] = 255
    file = io.BytesIO()
    Image.fromarray(half).save(file, "png")
    for name, mirror in ("both", {}), ("one", {"mirror": False}):
        record = json.dumps({"captions": ["a", "b", "c"], **mirror}).encode()
        write_shards(tmp_path / name / "train", [("0", {"png": file.getvalue(), "json": record})])
        shards = Shards(str(tmp_path / name), "train", 3, 8, 8, flip=True)
        epochs = shards.__getitems__(range(60))
        assert {caption for _, caption, _ in epochs} == {"a", "b", "c"} == set(shards.captions([0]))
        assert {bool(image[0, 0, 0] > 0) for image, _, _ in epochs} == ({True, False} if name == "both" else {False})
        assert [caption for _, caption, _ in shards.__getitems__(range(60))] == [caption for _, caption, _ in epochs]


def test_svg_is_drawn_by_npm_or_openmoji_left_out(tmp_path, monkeypatch):
    def npm(command, cwd, **kwargs):
        if command[0] == "node":
            assert "options = { fitTo: { mode: \"width\", value: 64 } }" in command[2]
            for path in Path(cwd).glob("*.svg"):
                path.with_suffix(".png").write_bytes(path.read_bytes()[::-1])
    monkeypatch.setattr(subprocess, "run", npm)
    assert evidence.emoji.rasterize({"1f34e": b"abc"}) == {"1f34e": b"cba"}

    def no_npm(*args, **kwargs):
        raise FileNotFoundError("npm")
    monkeypatch.setattr(subprocess, "run", no_npm)
    with pytest.raises(OSError, match="leave it out, --styles=google,twitter,fluent"):
        evidence.emoji.rasterize({"1f34e": b"abc"})


def test_sources_that_are_no_packages_are_named(packages, tmp_path, monkeypatch):
    (tmp_path / "other.tgz").write_bytes(b"nothing of the kind")
    (tmp_path / "half.tgz").write_bytes(packages[0].read_bytes()[:1000])
    with tarfile.open(tmp_path / "empty.tgz", "w:gz"):
        pass
    for name in "other", "half", "empty":
        line = fails("data.py", "emoji", f"--source={tmp_path / name}.tgz", f"--out={tmp_path / 'out'}")
        assert f"{name}.tgz cannot be read as a package of npm's" in line

    def no_npm(*args, **kwargs):
        raise FileNotFoundError("npm")
    monkeypatch.setattr(subprocess, "run", no_npm)
    line = fails("data.py", "emoji", f"--out={tmp_path}")
    assert "install npm" in line and "--source=FILE.tgz" in line


# ---------------------------------------------------------------------------------------------------------------
# Latents by an autoencoder


class Decoder(nn.Module):
    def forward(self, latents):
        return nn.functional.interpolate((latents[:, :3] - 1) / 3, scale_factor=4.0)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """encoder.pt2 and decoder.pt2 of an autoencoder 3x32x32 -> 4x8x8, for any batch size."""
    folder, batch = tmp_path_factory.mktemp("autoencoder"), torch.export.Dim("batch", min=1, max=63)
    for name, module, example in (("encoder", Encoder(), torch.zeros(2, 3, 32, 32)),
                                  ("decoder", Decoder(), torch.zeros(2, 4, 8, 8))):
        torch.export.save(torch.export.export(module, (example,), dynamic_shapes=({0: batch},)), folder / f"{name}.pt2")
    return folder


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Shards of 90 and 10 images in smooth colours, one of them not decodable."""
    folder, rng = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    for split, count in (("train", 90), ("val", 10)):
        examples = []
        for i in range(count):
            file = io.BytesIO()
            corners = Image.fromarray(rng.integers(0, 256, (2, 2, 3), dtype=np.uint8))
            corners.resize((40, 40), Image.Resampling.BILINEAR).save(file, "PNG")
            examples.append((f"{i:04d}", {"png": b"" if i == 5 else file.getvalue(), "txt": f"{split} {i}".encode()}))
        write_shards(folder / split, examples, per_shard=70)
    return folder


@pytest.fixture(scope="module")
def encoded(exported, photographs, tmp_path_factory):
    out = tmp_path_factory.mktemp("encoded")
    printed = command("encode", f"--data_dir={photographs}", f"--encoder={exported / 'encoder.pt2'}", f"--out={out}",
                      "--image_size=32", "--batch_size=80", "--device=cpu", "--workers=1")
    assert "2 unusable images were left out" in printed
    return out


def test_latents_are_the_encoders_and_normalised_by_what_was_measured(encoded, photographs):
    source = Shards(str(photographs), "train", 3, 32, 32)
    raw = Shards(str(encoded), "train", 4, 8, 8, latent_scale=1.0)
    assert len(raw) == 89 and raw[5][1] == "train 6"
    for i in (0, 41, 88):
        image, caption = source[i + (i >= 5)]
        assert raw[i][1] == caption
        torch.testing.assert_close(raw[i][0], Encoder()(image[None])[0], atol=2e-3, rtol=0)
    normalised = torch.stack([latent for latent, _ in Shards(str(encoded), "train", 4, 8, 8)])
    torch.testing.assert_close(normalised.mean(dim=(0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(normalised.std(dim=(0, 2, 3)), torch.ones(4), atol=1e-3, rtol=0)
    assert len(Shards(str(encoded), "val", 4, 8, 8)) == 9


def test_an_interrupted_encoding_goes_on(exported, photographs, encoded, tmp_path, monkeypatch):
    settings = ["encode", f"--data_dir={photographs}", f"--encoder={exported / 'encoder.pt2'}", f"--out={tmp_path}",
                "--image_size=32", "--device=cpu"]
    write = latents.write_shard

    def failing(path, examples):
        if path.name == "00001.tar":
            raise KeyboardInterrupt
        write(path, examples)
    with monkeypatch.context() as patch:
        patch.setattr(latents, "write_shard", failing)
        with pytest.raises(KeyboardInterrupt):
            command(*settings)
    done = tmp_path / "train" / "00000.tar"
    before = done.stat().st_mtime_ns
    assert [path.name for path in (tmp_path / "train").iterdir()] == ["00000.tar"]
    command(*settings)
    assert done.stat().st_mtime_ns == before
    for split in ("train", "val"):
        for path in (encoded / split).glob("*.tar"):
            assert path.read_bytes() == (tmp_path / split / path.name).read_bytes()
    assert (tmp_path / "latents.json").read_text() == (encoded / "latents.json").read_text()
    line = fails("data.py", *settings, "--image_size=64")
    assert "holds latents made with other settings" in line and "another --out" in line


def words_of(data_dir, split, shape):
    """What each example of some shards says beside its image or latent, and its captions."""
    shards = Shards(str(data_dir), split, *shape)
    members = [shards.members(i) for i in range(len(shards))]
    return [(captions_of(some), {suffix: some[suffix] for suffix in some.keys() - {"png", "npy"}}) for some in members]


def test_latents_keep_all_that_their_examples_say(exported, tmp_path):
    """Every caption, whether a flip is allowed, and what a shard says that training does not read."""
    records = [{"captions": ["a cat", "one cat", "a grey cat, asleep"]}, {"captions": ["a dog"], "mirror": False},
               {"caption": "a cow", "url": "http://cows/1", "style": "fluent"}]
    examples = [(f"{i}", {"png": png((40 * i, 9 * i, 200 - i), (32, 32)), "json": json.dumps(record).encode()})
                for i, record in enumerate(records)]
    examples.append(("3", {"png": png((9, 200, 9)), "txt": "\ufeff an owl \n".encode(), "json": b'{"mirror": false}'}))
    examples.append(("4", {"png": png((9, 9, 200), (32, 32)), "input.txt": b"a frog"}))
    for split in ("train", "val"):
        write_shards(tmp_path / "in" / split, examples)
    command("encode", f"--data_dir={tmp_path / 'in'}", f"--encoder={exported / 'encoder.pt2'}",
            f"--out={tmp_path / 'out'}", "--image_size=32", "--device=cpu", "--workers=1")
    before, after = words_of(tmp_path / "in", "train", (3, 32, 32)), words_of(tmp_path / "out", "train", (4, 8, 8))
    assert before == after
    assert after[0] == ((["a cat", "one cat", "a grey cat, asleep"], True), {"json": json.dumps(records[0]).encode()})
    assert after[1][0] == (["a dog"], False) and json.loads(after[2][1]["json"])["url"] == "http://cows/1"
    assert [captions for (captions, _), _ in after[3:]] == [["an owl"], ["a frog"]]
    made, source = Shards(str(tmp_path / "out"), "train", 4, 8, 8), Shards(str(tmp_path / "in"), "train", 3, 32, 32)
    drawn = [made.example(len(made) * epoch)[1] for epoch in range(30)]
    assert set(drawn) == set(records[0]["captions"])  # training still sees them by turns
    assert drawn == [source.example(len(source) * epoch)[1] for epoch in range(30)]


def test_a_shard_of_nothing_usable_does_not_end_an_encoding(exported, tmp_path):
    """As where a download failed half-way: more in a row than training would skip."""
    good = [(f"{i}", {"png": png((i, 2 * i, 255 - i)), "txt": b"x"}) for i in range(110)]
    bad = [(f"{i}", {"png": b"", "txt": b"x"}) for i in range(110)]
    write_shards(tmp_path / "in", good + bad, 110)
    printed = command("encode", f"--data_dir={tmp_path / 'in'}", f"--encoder={exported / 'encoder.pt2'}",
                      f"--out={tmp_path / 'out'}", "--image_size=32", "--device=cpu")
    assert "110 unusable images were left out" in printed
    assert len(Shards(str(tmp_path / "out"), "all", 4, 8, 8)) == 110


NOTING = """
import os, sys
sys.path.insert(0, {root!r})
import data
from plumbing import checkpoint, images, latents
write = latents.write_shard

def note_and_write(path, examples):
    print("rank", os.environ["RANK"], "writes", "/".join(path.parts[-2:]), flush=True)
    write(path, examples)

latents.write_shard = note_and_write
data.main()
"""


@pytest.mark.slow
def test_ranks_encode_shards_by_turns(exported, photographs, encoded, tmp_path):
    """Two ranks make what one process makes, each shard once; and go on where they were interrupted."""
    (tmp_path / "noting.py").write_text(NOTING.format(root=str(ROOT)))
    out = tmp_path / "out"
    settings = [tmp_path / "noting.py", "encode", f"--data_dir={photographs}", f"--out={out}", "--device=cpu",
                f"--encoder={exported / 'encoder.pt2'}", "--image_size=32", "--batch_size=80"]
    printed = on_ranks(2, *settings)
    lines = [line for line in printed.splitlines() if line.startswith("rank ")]
    assert sorted(lines) == ["rank 0 writes train/00000.tar", "rank 0 writes val/00000.tar",
                             "rank 1 writes train/00001.tar"]
    assert printed.count("wrote ") == 1 and "; 2 unusable images were left out" in printed
    made = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.suffix in (".tar", ".json")}
    expected = {path.relative_to(encoded): path.read_bytes() for path in encoded.rglob("*.tar")}
    expected[Path("latents.json")] = (encoded / "latents.json").read_bytes()
    assert made.pop(Path("encoding.json")) and made == expected
    assert not list(out.rglob("*.part"))

    for name in ("train/00001.tar", "val/00000.tar", "latents.json"):  # as if they had been killed
        (out / name).unlink()
    (out / "train" / "00001.tar.0badcafe.part").write_bytes(b"half of it")
    lines = [line for line in on_ranks(2, *settings).splitlines() if line.startswith("rank ")]
    assert sorted(lines) == ["rank 0 writes train/00001.tar", "rank 1 writes val/00000.tar"]
    assert all((out / name).read_bytes() == content for name, content in expected.items())
    assert not list(out.rglob("*.part"))

    status, _, errors = ranks_of(2, *settings, "--image_size=36")  # which no rank waits for
    assert status != 0 and errors.count("data.py: ") == 2 and "holds latents made with other settings" in errors


TAKING = """
import os, sys, time
from pathlib import Path
from types import SimpleNamespace
from plumbing.latents import take_folder

out, encoder = sys.argv[1:]
lock = take_folder(Path(out), {}, SimpleNamespace(data_dir="d", encoder=encoder, image_size=32))
child = os.fork()  # as the processes that load are
if child:
    print(child, flush=True)
    sys.stdin.read()
    os._exit(0)
time.sleep(60)
"""


@pytest.mark.slow
def test_two_jobs_do_not_encode_into_one_folder(exported, photographs, tmp_path):
    """And a folder is free as soon as its process is dead, though those that load may outlive it for a while."""
    encoder, out = exported / "encoder.pt2", tmp_path / "out"
    settings = ["encode", f"--data_dir={photographs}", f"--encoder={encoder}", f"--out={out}", "--image_size=32",
                "--device=cpu"]
    other = subprocess.Popen([sys.executable, "-c", TAKING, out, encoder], cwd=ROOT, text=True, stdin=subprocess.PIPE,
                             stdout=subprocess.PIPE)
    child = int(other.stdout.readline())
    try:
        line = fails("data.py", *settings)
        assert "another process encodes into" in line and "torchrun" in line
        other.stdin.close()
        other.wait()
        os.kill(child, 0)  # is alive
        assert "made with other settings" in fails("data.py", *settings)  # "d"
        (out / "encoding.json").unlink()
        command(*settings)
    finally:
        os.kill(child, signal.SIGKILL)
        other.stdout.close()
    assert (out / "latents.json").exists()


def test_a_folder_that_only_some_ranks_see_is_refused(exported, photographs, tmp_path, monkeypatch):
    monkeypatch.setattr(latents, "gathered", lambda value: [value, False if value is True else value])
    line = fails("data.py", "encode", f"--data_dir={photographs}", f"--encoder={exported / 'encoder.pt2'}",
                 f"--out={tmp_path}", "--image_size=32", "--device=cpu")
    assert "is seen by some ranks only" in line and str(tmp_path) in line


def test_processes_that_write_one_shard_do_not_meet(tmp_path):
    path = tmp_path / "0.tar"

    def examples(text, meanwhile=None):
        yield "0", {"txt": text}
        if meanwhile:
            write_shard(path, meanwhile)
        yield "1", {"txt": text}
    write_shard(path, examples(b"first", examples(b"second")))
    with tarfile.open(path) as tar:
        assert [tar.extractfile(member).read() for member in tar] == [b"first"] * 2
    with pytest.raises(ZeroDivisionError):
        write_shard(path, (("0", {"txt": bytes(1 // 0)}) for _ in range(1)))
    assert [path.name for path in tmp_path.iterdir()] == ["0.tar"]


def test_flat_shards_are_encoded_flat(exported, tmp_path):
    write_shards(tmp_path / "in", [(f"{i}", {"png": png((i, 2 * i, 255 - i)), "txt": b"x"}) for i in range(120)], 50)
    command("encode", f"--data_dir={tmp_path / 'in'}", f"--encoder={exported / 'encoder.pt2'}",
            f"--out={tmp_path / 'o'}", "--image_size=32", "--device=cpu", "--batch_size=64")
    assert [path.name for path in sorted((tmp_path / "o").glob("*.tar"))] == ["00000.tar", "00001.tar", "00002.tar"]
    assert [len(Shards(str(tmp_path / "o"), split, 4, 8, 8)) for split in ("train", "val")] == [119, 1]


def test_what_cannot_be_encoded_is_named(exported, photographs, encoded, tmp_path):
    encoder = f"--encoder={exported / 'encoder.pt2'}"
    rest = [f"--out={tmp_path}", "--device=cpu"]
    assert "there is no" in fails("data.py", "encode", f"--data_dir={photographs}", "--encoder=no.pt2", *rest)
    rest = [f"--out={tmp_path / 'out'}", "--device=cpu"]
    (tmp_path / "bad.pt2").write_bytes(b"PK nothing")
    line = fails("data.py", "encode", f"--data_dir={photographs}", f"--encoder={tmp_path / 'bad.pt2'}", *rest)
    assert "bad.pt2 is not a program saved by torch.export" in line
    rest[0] = f"--out={tmp_path / 'latents'}"
    assert "holds latents already" in fails("data.py", "encode", f"--data_dir={encoded}", encoder, *rest)
    rest[0] = f"--out={tmp_path / 'constant'}"
    write_shards(tmp_path / "grey" / "train", [(f"{i}", {"png": png((9, 9, 9)), "txt": b"x"}) for i in range(3)])
    write_shards(tmp_path / "grey" / "val", [("0", {"png": png((9, 9, 9)), "txt": b"x"})])
    line = fails("data.py", "encode", f"--data_dir={tmp_path / 'grey'}", encoder, "--image_size=32", *rest)
    assert "a channel of the latents is constant" in line
    line = fails("data.py", "encode", f"--data_dir={photographs}", encoder, "--image_size=24", "--device=cpu",
                 f"--out={tmp_path / 'small'}")
    assert "encoder.pt2 cannot take 3x24x24" in line and "was exported for" in line
    for name in ("a", "b"):
        write_shards(tmp_path / "twice" / name, [("0", {"png": png(), "txt": b"x"})])
    line = fails("data.py", "encode", f"--data_dir={tmp_path / 'twice' / '*' / '*.tar'}", encoder, *rest)
    assert "have one name" in line


@pytest.mark.slow
def test_from_latents_to_images(encoded, exported, tmp_path):
    """Training on what was encoded, and sampling with the decoder: latents leave as the autoencoder knows them."""
    settings = [*SHORT, *SMALL, "--transporter_width=16", "--transporter_blocks=1", "--transporter_layers=1",
                "--dataset=shards", f"--data_dir={encoded}", "--image_size=8", "--channels=4", f"--out_dir={tmp_path}",
                "--bad_captions=1"]
    run("train.py", *settings)
    stored = json.loads((encoded / "latents.json").read_text())
    latents = contents(tmp_path / "ckpt.pt")["settings"]["latents"]
    assert latents["mean"] == pytest.approx(stored["mean"]) and latents["scale"] == pytest.approx(stored["scale"])
    run("distill.py", *DISTILL, f"--out_dir={tmp_path}")
    decoder = f"--decoder={exported / 'decoder.pt2'}"
    for denoise in ("learned", "score"):
        run("sample.py", *SAMPLE, f"--out_dir={tmp_path}", decoder, f"--denoise={denoise}", "--show_trajectory=True")
        latent = torch.as_tensor(np.load(tmp_path / "images" / "0003.npy")).float()
        image = (Decoder()(latent[None])[0].clamp(-1, 1).permute(1, 2, 0).numpy() + 1) * 128
        assert np.abs(pixels(tmp_path / "images" / "0003.png") - image.clip(0, 255)).max() < 3
    strip = pixels(tmp_path / "images" / "0003_trajectory.png")
    assert strip.shape[1] > 6 * 96
    model, normalised = load(tmp_path, "cpu"), torch.tensor([0.0, 1, -2]).view(3, 1, 1, 1).expand(3, 4, 8, 8)
    for channel, (mean, scale) in enumerate(zip(stored["mean"], stored["scale"])):  # scale: 1 / standard deviation
        plain = model.plain_latents(normalised)[:, channel, 5, 5].tolist()
        assert plain == pytest.approx([mean, mean + 1 / scale, mean - 2 / scale], rel=1e-4)
    line = fails("sample.py", *SAMPLE, f"--out_dir={tmp_path}", "--decoder=none.pt2")
    assert "there is no none.pt2" in line
    assert "makes images, not latents: leave it out" in fails("sample.py", *SAMPLE, decoder)


@pytest.mark.slow
@pytest.mark.parametrize("script", ["train.py", "distill.py", "train.py of flow matching"])
def test_sheets_of_latents_are_decoded(encoded, exported, tmp_path, script):
    """With --decoder they show the images of what the model samples, and the file is the decoder's, by name."""
    folder, decoder = tmp_path / "run", f"--decoder={exported / 'decoder.pt2'}"
    settings = [*SHORT, *SMALL, "--transporter_width=16", "--transporter_blocks=1", "--transporter_layers=1",
                "--dataset=shards", f"--data_dir={encoded}", "--image_size=8", "--channels=4", f"--out_dir={folder}",
                "--bad_captions=1"]
    settings += ["--objective=fm"] if "flow" in script else []
    wrong = [f"--decoder={exported / 'encoder.pt2'}", "--decoder=none.pt2"]
    name, resume = "000006.png", [f"--out_dir={folder}", "--resume=yes", "--max_iters=9"]
    if script == "distill.py":
        run("train.py", *settings)
        settings, name = [*DISTILL, f"--out_dir={folder}"], "denoiser_000006.png"
    script = script.split()[0]
    assert "cannot take 4x8x8" in fails(script, *settings, wrong[0])
    assert "there is no none.pt2" in fails(script, *settings, wrong[1])
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        keep = images.contact_sheet
        patch.setattr(images, "contact_sheet", lambda *sheet: shown.append(sheet[0]) or keep(*sheet))
        run(script, *settings, decoder)
    assert [tuple(some.shape) for some in shown] == [(4, 3, 32, 32)] * 2
    assert shown[-1].abs().max() <= 1 and not shown[-1].requires_grad
    assert torch.equal(shown[-1][:, :, ::4, ::4], shown[-1][:, :, 3::4, 3::4])  # blocks, as the decoder makes them
    assert pixels(folder / "samples" / name).shape[1] > 2 * 96
    run(script, *resume)  # with the decoder of before
    checkpoint.slim(folder / ("denoiser.pt" if "denoiser" in name else "ckpt.pt"), tmp_path / "slim.pt")
    assert contents(tmp_path / "slim.pt")["settings"]["decoder"] == ""  # a path, which is of no use elsewhere


def test_a_decoder_is_for_latents(exported, encoded, tmp_path):
    line = fails("train.py", *SHORT, f"--out_dir={tmp_path}", f"--decoder={exported / 'decoder.pt2'}")
    assert "makes images, not latents: leave it out" in line and not (tmp_path / "ckpt.pt").exists()
    torch.export.save(torch.export.export(nn.Identity(), (torch.zeros(1, 4, 8, 8),)), tmp_path / "identity.pt2")
    settings = {"decoder": str(tmp_path / "identity.pt2"), "latents": {"mean": [0.0] * 4, "scale": [1.0] * 4},
                "image_size": 8, "channels": 4}
    with pytest.raises(ValueError, match="makes 4x8x8 of a latent 4x8x8, which is no image"):
        latents.load_decoder(settings, torch.device("cpu"))
    settings |= {"decoder": str(exported / "decoder.pt2"), "latents": {"mean": [1.0] * 4, "scale": [1 / 3] * 4}}
    decode, normalised = latents.load_decoder(settings, torch.device("cpu")), torch.randn(2, 4, 8, 8) / 3
    expected = nn.functional.interpolate(normalised[:, :3], scale_factor=4.0).clamp(-1, 1)
    torch.testing.assert_close(decode(normalised), expected)


def test_blocks_keep_four_orthonormal_directions_of_twelve(tmp_path):
    directions = blocks.basis().flatten(1)
    torch.testing.assert_close(directions @ directions.T, torch.eye(4))
    blocks.main([f"--out={tmp_path}"])
    encode, decode = (latents.load_exported(tmp_path / f"{name}.pt2", torch.device("cpu"))
                      for name in ("encoder", "decoder"))
    images = torch.rand(3, 3, 6, 10) * 2 - 1
    made = encode(images)
    assert made.shape == (3, 4, 3, 5)
    shown = decode(made)
    torch.testing.assert_close(encode(shown), made)  # a projection,
    assert (images - shown).flatten().dot(shown.flatten()).abs() < 1e-4  # and an orthogonal one
    torch.testing.assert_close(shown[:, :, :2, :2].mean(dim=(2, 3)), images[:, :, :2, :2].mean(dim=(2, 3)))  # colours


@pytest.mark.parametrize("output", ["latents", "latent_dist"])
def test_the_documented_export_takes_both_autoencoders(tmp_path, monkeypatch, output):
    """The commands of docs/data.md, with modules whose outputs have the fields of AutoencoderTiny and AutoencoderKL."""
    class Autoencoder(nn.Module):
        def from_pretrained(name):
            return Autoencoder()

        def encode(self, images):
            made = nn.functional.avg_pool2d(torch.cat([images, images[:, :1]], dim=1), 8)
            of_kl = types.SimpleNamespace(mode=lambda: made)
            return types.SimpleNamespace(**{output: made if output == "latents" else of_kl})

        def decode(self, made):
            return types.SimpleNamespace(sample=nn.functional.interpolate(made[:, :3], scale_factor=8.0))

    names = types.SimpleNamespace(AutoencoderKL=Autoencoder, AutoencoderTiny=Autoencoder)
    monkeypatch.setitem(sys.modules, "diffusers", names)
    monkeypatch.chdir(tmp_path)
    snippets = re.findall("```python\n(.*?)```", (ROOT / "docs" / "data.md").read_text(), re.DOTALL)
    [snippet] = [text for text in snippets if "torch.export" in text]
    exec(snippet, {})
    encode, decode = (latents.load_exported(f"{name}.pt2", torch.device("cpu")) for name in ("encoder", "decoder"))
    made = torch.randn(3, 4, 32, 32)
    pictures = decode(made)
    assert pictures.shape == (3, 3, 256, 256)
    torch.testing.assert_close(encode(pictures), torch.cat([made[:, :3], made[:, :1]], dim=1))


@pytest.fixture(scope="module")
def of_latents(encoded, tmp_path_factory):
    """A folder after train.py on latents. Not to be written to."""
    out = tmp_path_factory.mktemp("of_latents")
    run("train.py", *SHORT, *SMALL, "--transporter_blocks=0", "--dataset=shards", f"--data_dir={encoded}",
        "--image_size=8", "--channels=4", f"--out_dir={out}", "--bad_captions=1", "--max_iters=2")
    return out


@pytest.fixture
def model_of_latents(of_latents, tmp_path):
    """A copy of that folder, to be written to."""
    return shutil.copytree(of_latents, tmp_path / "model")


def visible(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file() and path.name[0] != ".")


def test_judges_of_many_images_find_images_of_latents_alone(model_of_latents, exported, tmp_path):
    """Some take .npy for an image, too. What an earlier version has left there goes."""
    (tmp_path / "p.txt").write_text("train 1\n")
    flat, geneval = tmp_path / "flat", tmp_path / "geneval"
    settings = [*SAMPLE, f"--out_dir={model_of_latents}", "--denoise=none", f"--prompts={tmp_path / 'p.txt'}",
                f"--decoder={exported / 'decoder.pt2'}"]
    for _ in range(2):
        run("sample.py", *settings, "--layout=flat", f"--folder={flat}")
        assert visible(flat) == [f"000{i}.png" for i in range(5)]
        (flat / "0001.npy").write_bytes(b"")
    run("sample.py", *settings, "--layout=geneval", f"--folder={geneval}")
    assert visible(geneval) == ["00000/grid.png", "00000/metadata.jsonl", *(f"00000/samples/000{i}.png" for i in range(5))]
    run("sample.py", *settings)
    sheet = model_of_latents / "images"
    assert visible(sheet) == sorted([f"000{i}.{suffix}" for i in range(5) for suffix in ("npy", "png")] + ["sheet.png"])
    assert (sheet / "0003.png").read_bytes() == (flat / "0003.png").read_bytes()
    _, _, notes = run_with_notes("sample.py", *settings[:-1], "--layout=flat", f"--folder={tmp_path / 'look'}")
    assert any("without --decoder the images are a preview of latents" in note for note in notes)


def evaluated(out, *settings):
    _, printed, notes = run_with_notes("evaluate.py", "--device=cpu", f"--out_dir={out}", "--denoise=none", *settings)
    return json.loads((out / "evaluate.json").read_text()), notes


def test_latents_are_evaluated_as_images_are(model_of_latents, tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "latents" / split).mkdir(parents=True)
        latent_shard(tmp_path / "latents" / split / "0.tar", rng.normal(size=(30, 4, 8, 8)), [f"train {i}" for i in range(30)])
    (tmp_path / "latents" / "latents.json").write_text(json.dumps({"mean": [0.0] * 4, "scale": [0.5] * 4}))
    where = f"--data_dir={tmp_path / 'latents'}"
    results, _ = evaluated(model_of_latents, where, "--num_samples=12", "--val_examples=20", "--trajectories=2")
    assert results.keys() == {"config", "iteration", "likelihood", "samples, 4 steps, none", "classifier", "curves"}
    assert results["likelihood"]["bound"]["per_dimension"] == pytest.approx(results["likelihood"]["bound"]["mean"] / 256)
    assert "bits per dimension" not in results["likelihood"] and 0 <= results["classifier"]["accuracy"]["mean"] <= 1
    held_out = Shards(str(tmp_path / "latents"), "val", 4, 8, 8)
    real = torch.stack([held_out[i][0] for i in range(30)])
    model, captions = load(model_of_latents, "cpu", denoise="none"), [held_out[i][1] for i in range(12)]
    expected = frechet_distance(model.sample(captions), real)
    assert results["samples, 4 steps, none"]["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    assert pixels(model_of_latents / "evaluate" / "ntm_4_none.png").shape[1] > 900
    assert sorted(path.name for path in (model_of_latents / "evaluate").iterdir()) == ["ntm_4_none.png"]


def test_decoded_samples_and_real_images_are_left_for_others_to_compare(model_of_latents, exported, photographs):
    """In two folders, as many PNGs of one size in each and nothing else; the real ones scaled and cropped as for
    encoding, found by what the encoding has recorded."""
    decoder = f"--decoder={exported / 'decoder.pt2'}"
    folders = [model_of_latents / "evaluate" / name for name in ("ntm_4_none", "real")]
    for count, batch_size in ((9, 4), (7, 100)):  # of the larger number nothing is left
        _, notes = evaluated(model_of_latents, "--parts=samples", decoder, f"--num_samples={count}",
                             f"--batch_size={batch_size}")
        assert not any("real" in note for note in notes)
        for folder in folders:
            assert [path.name for path in sorted(folder.iterdir())] == [f"{i:04d}.png" for i in range(count)]
            assert {pixels(path).shape for path in folder.iterdir()} == {(32, 32, 3)}
    model, source = load(model_of_latents, "cpu", denoise="none"), Shards(str(photographs), "val", 3, 32, 32)
    latents = Shards(model.settings["data_dir"], "val", 4, 8, 8)
    samples = model.sample([latents[i][1] for i in range(7)])
    for i in range(7):
        image = to_uint8(Decoder()(model.plain_latents(samples[i:i + 1]))[0].clamp(-1, 1))
        assert np.abs(pixels(folders[0] / f"{i:04d}.png") - image.permute(1, 2, 0).numpy()).max() <= 1
        assert np.array_equal(pixels(folders[1] / f"{i:04d}.png"), to_uint8(source[i][0]).permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_ranks_share_the_two_folders(model_of_latents, exported):
    settings = ["--parts=samples", f"--decoder={exported / 'decoder.pt2'}", "--num_samples=9", "--batch_size=4"]
    evaluated(model_of_latents, *settings)
    folder = model_of_latents / "evaluate"
    alone = {name: (folder / name).read_bytes() for name in visible(folder)}
    on_ranks(2, "evaluate.py", "--device=cpu", f"--out_dir={model_of_latents}", "--denoise=none", *settings)
    assert {name: (folder / name).read_bytes() for name in visible(folder)} == alone and len(alone) == 19


def test_real_images_from_elsewhere_or_from_their_latents(model_of_latents, encoded, exported, tmp_path):
    settings = ["--parts=samples", f"--decoder={exported / 'decoder.pt2'}", "--num_samples=6"]
    real = model_of_latents / "evaluate" / "real"
    write_shards(tmp_path / "other" / "val", [(f"{i}", {"png": png((40 * i, 9, 200), (50, 40)), "txt": b"x"}) for i in range(4)])
    _, notes = evaluated(model_of_latents, *settings, f"--real_dir={tmp_path / 'other'}")
    assert any("only 4 real images for 6 samples" in note for note in notes)
    assert visible(real) == [f"000{i}.png" for i in range(4)]
    assert np.asarray(Image.open(real / "0003.png"))[5, 5].tolist() == [120, 9, 200]

    for split in ("train", "val"):  # which no encoding.json says the images of
        shutil.copytree(encoded / split, tmp_path / "moved" / split)
    shutil.copy(encoded / "latents.json", tmp_path / "moved")
    for record in (None, {"data_dir": "gone"}, []):
        if record is not None:
            (tmp_path / "moved" / "encoding.json").write_text(json.dumps(record))
        _, notes = evaluated(model_of_latents, *settings, f"--data_dir={tmp_path / 'moved'}")
        assert any("decoded latents take their place, unless --real_dir names" in note for note in notes)
        with pytest.raises(SystemExit, match="needs the labels of real images: name their shards by --real_dir"):
            evaluated(model_of_latents, *settings, f"--data_dir={tmp_path / 'moved'}", "--judge=judge.pt")
        latents = Shards(str(encoded), "val", 4, 8, 8)
        image = to_uint8(Decoder()(load(model_of_latents, "cpu").plain_latents(latents[2][0][None]))[0])
        assert np.abs(pixels(real / "0002.png") - image.permute(1, 2, 0).numpy()).max() <= 1


def test_a_judge_sees_decoded_samples_beside_real_images(model_of_latents, exported, tmp_path):
    """Real images that decoded samples equal: then the judge finds no distance, and each label as often."""
    decoder = f"--decoder={exported / 'decoder.pt2'}"
    labels = {"style": "dark", "group": "thing", "concept": "thing"}
    for split in ("train", "val"):
        pictures = [(f"{i}", {"png": png((20 * i, 9, 200), (32, 32)), "txt": b"a",
                              "json": json.dumps({**labels, "captions": [f"thing {i}"]}).encode()}) for i in range(12)]
        write_shards(tmp_path / "labelled" / split, pictures)
    judge.main([f"--data_dir={tmp_path / 'labelled'}", f"--out={tmp_path / 'judge.pt'}", "--image_size=32", "--iterations=1"])
    settings = ["--parts=samples", decoder, "--num_samples=12", "--batch_size=5", f"--judge={tmp_path / 'judge.pt'}"]
    results, _ = evaluated(model_of_latents, *settings, f"--real_dir={tmp_path / 'labelled'}")
    found = results["samples, 4 steps, none"]
    assert found["frechet_distance"] > 0 and found["style"]["mean"] == found["style, of real images"]["mean"] == 1

    drawn = [("%04d" % i, {"png": (model_of_latents / "evaluate" / "ntm_4_none" / f"{i:04d}.png").read_bytes(),
                           **{name: value for name, value in members.items() if name != "png"}})
             for i, (_, members) in enumerate(pictures)]
    write_shards(tmp_path / "drawn" / "val", drawn)
    results, _ = evaluated(model_of_latents, *settings, f"--real_dir={tmp_path / 'drawn'}")
    assert results["samples, 4 steps, none"]["frechet_distance"] == pytest.approx(0, abs=1e-3)


def test_mistakes_in_evaluating_latents(model_of_latents, exported, trained):
    decoder = f"--decoder={exported / 'decoder.pt2'}"
    out = ["--device=cpu", f"--out_dir={model_of_latents}", "--denoise=none", "--parts=samples", "--num_samples=2"]
    assert "nowhere" in fails("evaluate.py", *out, decoder, "--real_dir=nowhere")
    assert "real_dir is 'x', but" in fails("evaluate.py", *out, "--real_dir=x")
    assert "judge needs images and this model makes latents: give --decoder" in fails("evaluate.py", *out, "--judge=j.pt")
    assert "there is no none.pt2" in fails("evaluate.py", *out, "--decoder=none.pt2")
    line = fails("evaluate.py", "--device=cpu", f"--out_dir={trained}", decoder)
    assert "makes images, not latents: leave it out" in line


def test_a_latent_keeps_the_text_that_is_its_images(exported, tmp_path):
    """And not the other one beside it."""
    noise = file_of(Image.effect_noise((32, 32), 90).convert("RGB"))
    members = {"photo.png": noise, "photo.txt": b"a photo", "scan.txt": b"what is written on it"}
    write_shards(tmp_path / "images", [(f"{i}", members) for i in range(2)])
    command("encode", f"--data_dir={tmp_path / 'images'}", f"--encoder={exported / 'encoder.pt2'}", "--image_size=32",
            f"--out={tmp_path / 'latents'}", "--device=cpu")
    found = Shards(str(tmp_path / "latents"), "all", 4, 8, 8)
    assert found.latent and [caption for _, caption in found] == ["a photo"] * 2


def test_measured_scale_of_known_latents(tmp_path):
    deviation, mean = (np.array(pair)[:, None, None] for pair in ([2.0, 0.5], [1.0, -3.0]))
    latents = np.random.default_rng(0).normal(size=(200, 2, 4, 4)) * deviation + mean
    latent_shard(tmp_path / "0.tar", latents, ["x"] * 200)
    mean, scale = measure_latents(str(tmp_path))
    assert mean == pytest.approx([1, -3], abs=0.1) and scale == pytest.approx([0.5, 2], rel=0.05)


# ---------------------------------------------------------------------------------------------------------------
# What data.py shows of shards


def test_data_script_shows_shards_and_what_is_wrong_with_them(photographs, encoded, tmp_path):
    printed = command("shards", f"--data_dir={photographs}", f"--out={tmp_path / 'sheet.png'}")
    assert "90 to train on, 10 to validate, 3x40x40" in printed and "1 of the first 90 examples are unusable" in printed
    assert pixels(tmp_path / "sheet.png").shape[1] > 500
    command("shards", f"--data_dir={photographs}", "--count=4", f"--out={tmp_path / 'row.png'}")
    row = pixels(tmp_path / "row.png")
    assert 3 * row.shape[0] < row.shape[1]
    printed = command("shards", f"--data_dir={encoded}", "--split=val", f"--out={tmp_path / 'latents.png'}")
    assert "89 to train on, 9 to validate, 4x8x8" in printed


def test_vocabulary_of_shards(photographs, tmp_path):
    command("vocab", f"--data_dir={photographs}", f"--out={tmp_path / 'mine.tiktoken'}", "--size=300")
    tokenizer = data.get_tokenizer(str(tmp_path / "mine.tiktoken"))
    assert len(tokenizer.tokens("train 77")) == 2
    assert "required: --out" in fails("data.py", "vocab", f"--data_dir={photographs}")
    assert data.get_tokenizer("emoji").vocab_size == 4055


def test_a_vocabulary_shows_how_far_it_is(photographs, tmp_path, monkeypatch, capsys):
    arguments = ["vocab", f"--data_dir={photographs}", f"--out={tmp_path / 'a.tiktoken'}"]
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    data.main()
    said = capsys.readouterr().err
    assert "captions:" in said and "merges:" in said


def test_images_of_any_size_are_shown_as_thumbnails_read_one_at_a_time(tmp_path, monkeypatch):
    """The sheet is small; nothing larger than a thumbnail is kept; the size that is told is the stored one."""
    left = np.zeros((600, 900, 3), np.uint8)
    left[:, :450] = 255
    examples = [(f"{i}", {"png": file_of(Image.fromarray(left)), "txt": b"a"}) for i in range(9)]
    write_shards(tmp_path / "shards" / "train", examples)
    write_shards(tmp_path / "shards" / "val", examples)
    kept = []

    def keep(images, *rest):
        kept[:] = [tuple(image.shape) for image in images]
        return Image.new("RGB", (1, 1))

    monkeypatch.setattr("plumbing.images.contact_sheet", keep)
    for arguments, told, shape in (([], "3x600x900", (3, 171, 256)), (["--image_size=400"], "3x400x400", (3, 256, 256)),
                                   (["--image_size=32"], "3x32x32", (3, 32, 32))):
        printed = command("shards", f"--data_dir={tmp_path / 'shards'}", f"--out={tmp_path / 'sheet.png'}", *arguments)
        assert f"9 to train on, 9 to validate, {told}" in printed
        assert kept == [shape] * 9
    monkeypatch.undo()
    command("shards", f"--data_dir={tmp_path / 'shards'}", f"--out={tmp_path / 'sheet.png'}")
    sheet = pixels(tmp_path / "sheet.png")
    assert sheet.shape[1] == 3 * (256 + 8) + 8 and sheet[90, 30].min() > 250 and sheet[90, 240].max() < 5


def test_a_book_of_a_caption_is_cut_where_it_is_shown(tmp_path):
    for split in "train", "val":
        write_shards(tmp_path / split, [("0", {"png": png(), "txt": ("word " * 32_000).encode()})])
    printed = command("shards", f"--data_dir={tmp_path}", f"--out={tmp_path / 'sheet.png'}")
    assert len(printed) < 2000 and "…\n" in printed
    assert pixels(tmp_path / "sheet.png").shape[0] < 300


def test_data_script_finds_what_is_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    for split in ("train", "val"):
        write_shards(tmp_path / "data" / split, [(f"{i}", {"png": png(), "txt": b"a cat"}) for i in range(20)])
    command("vocab", "--data_dir=~/data", "--out=~/cats.tiktoken", "--size=300")
    command("shards", "--data_dir=~/data", "--tokenizer=~/cats.tiktoken", "--out=~/sheet.png")
    assert (tmp_path / "cats.tiktoken").exists() and (tmp_path / "sheet.png").exists()
    assert data.get_tokenizer("~/cats.tiktoken").vocab_size > 258


def test_data_script_counts_captions_that_are_refused(tmp_path):
    captions = ["class 1", "a cat", "class 2", "class 1000", *["class 3"] * 16]
    for split in ("train", "val"):
        write_shards(tmp_path / split, [(f"{i}", {"png": png(), "txt": caption.encode()})
                                        for i, caption in enumerate(captions)])
    printed = command("shards", f"--data_dir={tmp_path}", "--tokenizer=classes", f"--out={tmp_path / 'sheet.png'}")
    assert "2 of the first 20 captions are refused; caption 'a cat' is not a class" in printed
    assert "1.0 tokens a caption" in printed and (tmp_path / "sheet.png").exists()


@pytest.mark.parametrize("shape", [(512,), (77, 768), (1, 77, 768)])
def test_data_script_shows_images_that_have_embeddings_beside_them(tmp_path, shape):
    members = {"jpg": png(), "npy": npy(np.ones(shape, np.float32)), "txt": b"a cat"}
    write_shards(tmp_path, [(f"{i}", members) for i in range(200)])
    printed = command("shards", f"--data_dir={tmp_path}", f"--out={tmp_path / 'sheet.png'}")
    assert "198 to train on, 2 to validate, 3x12x12" in printed and "unusable" not in printed
