"""Shards: the index, every example once however many read, images of all kinds, and what is wrong with some."""
import io
import json
import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest
import torch
from helpers import ROOT, SHORT, SMALL, fails, file_of, latent_shard, npy, png, read_log, run, training_lines
from PIL import Image
from torch.utils.data import DataLoader

from data import get_dataset
from plumbing import index as indexing
from plumbing import shards
from plumbing.images import resize_and_crop, to_uint8
from plumbing.index import find_shards, load_index
from plumbing.kept import Kept
from plumbing.loader import collate, examine, order
from plumbing.paths import expand
from plumbing.shards import Shards, write_shard, write_shards
from plumbing.tokenizer import get_tokenizer

TRAIN = SHORT + SMALL + ["--transporter_width=16", "--transporter_blocks=1", "--transporter_layers=1",
                         "--dataset=shards", "--image_size=8", "--channels=3", "--patch_size=4"]


def numbered(count, first=0):
    """Examples whose images and captions are their numbers."""
    return [(f"{i:05d}", {"png": png((i % 256, i // 256, 7)), "txt": str(i).encode()})
            for i in range(first, first + count)]


def dataset(folder, split="train", size=8, channels=3, **settings):
    return Shards(str(folder), split, channels, size, size, **settings)


def shown(members, folder, **settings):
    """The image, 8-bit (H, W, 3), that a data set makes of one example's members."""
    write_shard(folder / "train" / "0.tar", [("a", {"txt": b"a caption", **members})])
    return to_uint8(dataset(folder, **settings)[0][0]).permute(1, 2, 0).numpy()


# ---------------------------------------------------------------------------------------------------------------
# Which files


@pytest.mark.slow
@pytest.mark.parametrize("pattern, names", [
    ("a-{00..02}.tar", ["a-00.tar", "a-01.tar", "a-02.tar"]),
    ("{x,y}/{8..10}.tar", ["x/8.tar", "x/9.tar", "x/10.tar", "y/8.tar", "y/9.tar", "y/10.tar"]),
    ("plain.tar", ["plain.tar"]),
    ("{3..1}.tar", ["3.tar", "2.tar", "1.tar"]),
    ("{x}-{}.tar", ["{x}-{}.tar"]),
    ("{a,}b.tar", ["ab.tar", "b.tar"]),
])
def test_braces_are_expanded_as_a_shell_does(pattern, names):
    assert [str(path) for path in expand(pattern)] == names
    assert subprocess.run(["bash", "-c", f"echo {pattern}"], capture_output=True, text=True).stdout.split() == names


def test_a_folder_a_glob_and_a_range_name_the_same_shards(tmp_path, monkeypatch):
    write_shards(tmp_path, numbered(30), per_shard=10)
    monkeypatch.chdir(tmp_path)
    for name in (str(tmp_path), f"{tmp_path}/*.tar", f"{tmp_path}/{{00000..00002}}.tar", "*.tar", "."):
        paths, own = find_shards(name, "train")
        assert [path.name for path in paths] == ["00000.tar", "00001.tar", "00002.tar"] and not own
    with pytest.raises(FileNotFoundError, match="2 of 5 shards .* are missing, .*00003.tar first"):
        find_shards(f"{tmp_path}/{{00000..00004}}.tar", "train")
    for nothing in ("", str(tmp_path / "no"), f"{tmp_path}/*.zip"):
        with pytest.raises(FileNotFoundError, match="there are no shards in data_dir"):
            find_shards(nothing, "train")


@pytest.mark.parametrize("name", ["a[1]", "[a]", "{a,b}", "{00..01}", "a*", "{a}", "a?{[", "~x", "[!a]{1..2}*"])
def test_what_exists_under_a_name_is_meant(tmp_path, monkeypatch, name):
    """Whatever in it could be a pattern."""
    write_shards(tmp_path / name / "train", numbered(30), per_shard=10)
    (tmp_path / f"{name}.tar").write_bytes((tmp_path / name / "train" / "00000.tar").read_bytes())
    (tmp_path / name / "train" / "._00000.tar").write_bytes(b"of a Mac")
    monkeypatch.chdir(tmp_path)
    expected = ["00000.tar", "00001.tar", "00002.tar"]
    for folder in (name, str(tmp_path / name)):
        assert find_shards(folder, "train")[1]
        for path in ("", "/train", "/train/*.tar", "/train/0000[0-2].tar", "/train/{00000..00002}.tar", "/t*/*.tar",
                     "/{train,no}/*.tar", "/train/{00000,0000[12]}.tar", "/{train,train}"):
            if "no" not in path:
                paths, _ = find_shards(folder + path, "train")
                assert [path.name for path in paths][:3] == expected and paths[0].parent.name == "train"
    assert len(dataset(name)) == 30
    assert [path.name for path in find_shards(f"{name}.tar", "train")[0]] == [f"{name}.tar"]
    assert [path.name for path in find_shards(str(tmp_path / f"{name}.tar"), "train")[0]] == [f"{name}.tar"]
    with pytest.raises(FileNotFoundError, match="1 of 2 shards .* are missing, .*no/"):
        find_shards(f"{tmp_path / name}/{{train,no}}/*.tar", "train")


def test_home_is_where_shards_are_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    write_shards(tmp_path / "home" / "data", numbered(30), per_shard=10)
    for name in ("~/data", "~/data/*.tar", "~/data/{00000..00002}.tar"):
        assert [path.parent for path in find_shards(name, "train")[0]] == [tmp_path / "home" / "data"] * 3
    write_shards(tmp_path / "~" / "data", numbered(10))  # what exists under a name is meant
    assert len(find_shards("~/data", "train")[0]) == 1


def test_splits_are_folders_or_every_hundredth(tmp_path):
    write_shards(tmp_path / "flat", numbered(250), per_shard=60)
    train, val = (dataset(tmp_path / "flat", split) for split in ("train", "val"))
    captions = [[caption for _, caption in split] for split in (train, val)]
    assert captions[1] == ["99", "199"] and len(train) == 248 and len(val) == 2
    assert captions[0] == [str(i) for i in range(250) if i not in (99, 199)]
    assert len(dataset(tmp_path / "flat", "all")) == 250
    write_shards(tmp_path / "own" / "train", numbered(5))
    write_shards(tmp_path / "own" / "val", numbered(3, 100))
    assert [caption for _, caption in dataset(tmp_path / "own", "val")] == ["100", "101", "102"]
    write_shards(tmp_path / "few", numbered(20))
    with pytest.raises(ValueError, match="has 20 examples, too few for 'val'"):
        dataset(tmp_path / "few", "val")


# ---------------------------------------------------------------------------------------------------------------
# The index


def test_any_order_gives_the_example_that_reading_through_gives(tmp_path):
    """Members in img2dataset's layout, with long names, folders and dots in them, JSON captions and other members."""
    rng, expected = np.random.default_rng(0), []
    for shard in range(3):
        with tarfile.open(tmp_path / f"{shard}.tar", "w") as tar:
            for i in range(7):
                key, caption = f"{'deep/' * 30}{shard}_{i}", f"caption {shard} {i} é"
                members = {"jpg": png(tuple(rng.integers(0, 256, 3).tolist())),
                           "json": json.dumps({"caption": caption, "url": "x" * int(rng.integers(2000))}).encode()}
                if i % 2:
                    members |= {"txt": caption.encode(), "json": b'{"caption": "not this one"}', "seg.cls": b"3"}
                for suffix, data in members.items():
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
                expected.append((Image.open(io.BytesIO(members["jpg"])).getpixel((0, 0)), caption))
    ds = dataset(tmp_path, "all")
    assert len(ds) == 21
    for i in rng.permutation(21):
        image, caption = ds[i]
        assert (tuple(to_uint8(image)[:, 3, 3].tolist()), caption) == expected[i]


def test_the_numbers_of_an_index_are_aligned(tmp_path):
    """Whatever the length of the header before them, here of names of one to four letters."""
    for name in ("a", "aa", "aaa", "aaaa"):
        write_shard(tmp_path / name / f"{name}.tar", numbered(2))
        assert load_index([tmp_path / name / f"{name}.tar"])[1].flags.aligned


def test_the_index_is_built_once_and_again_when_a_shard_changes(tmp_path, monkeypatch):
    write_shards(tmp_path / "train", numbered(30), per_shard=10)
    assert len(dataset(tmp_path)) == 30
    index, = (tmp_path / "train").glob("*.index")
    written = index.read_bytes(), index.stat().st_mtime_ns
    with monkeypatch.context() as patch:
        patch.setattr(indexing, "scan", lambda path: pytest.fail("scanned again"))
        assert len(dataset(tmp_path)) == 30
    assert (index.read_bytes(), index.stat().st_mtime_ns) == written
    write_shards(tmp_path / "train", numbered(25), per_shard=10)  # the last is shorter now
    assert len(dataset(tmp_path)) == 25 and dataset(tmp_path)[24][1] == "24"
    os.utime(tmp_path / "train" / "00001.tar", (1, 1))  # only its time
    before = index.read_bytes()
    assert len(dataset(tmp_path)) == 25 and index.read_bytes() != before
    for damage in (b"", index.read_bytes()[:-4], b"{}\n", b"[]\n1234", b"5\n1234", b"\xff" * 100):
        index.write_bytes(damage)
        assert len(dataset(tmp_path)) == 25


def test_the_index_of_another_version_is_built_anew(tmp_path):
    """It says that each member with another key is an example, for one."""
    write_shards(tmp_path, numbered(3))
    paths, _ = find_shards(str(tmp_path), "all")
    header, starts = load_index(paths)
    index, = tmp_path.glob("*.index")
    for version in ({}, {"version": 1}, {"version": 99}):
        others = {name: value for name, value in header.items() if name != "version"} | version
        text = json.dumps(others | {"counts": [1]})
        rest = np.array([starts[0], starts[-1]], dtype=np.uint32).tobytes()
        index.write_bytes((text + " " * (-(len(text) + 1) % 4) + "\n").encode() + rest)
        assert len(dataset(tmp_path, "all")) == 3


@pytest.mark.slow
def test_ranks_that_start_together_build_one_index(tmp_path):
    write_shards(tmp_path, numbered(300), per_shard=20)
    program = ("import sys; sys.path.insert(0, '.'); from plumbing.shards import Shards; "
               "print(len(Shards(sys.argv[1], 'all', 3, 8, 8)))")
    processes = [subprocess.Popen([sys.executable, "-c", program, tmp_path], cwd=ROOT,
                                  text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(3)]
    answers = [process.communicate(timeout=120) for process in processes]
    assert [out for out, _ in answers] == ["300\n"] * 3
    assert sum("index" in err for _, err in answers) == 1  # the bar of the one that built it


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path, monkeypatch):
    write_shards(tmp_path / "train", numbered(3))
    (tmp_path / "train" / f"{next(iter(index_names(tmp_path / 'train')))}.lock").mkdir()
    line = fails("train.py", *TRAIN, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'run'}")
    assert ".lock" in line and "make the folder writable" in line


def index_names(folder):
    """The names of the indices of a folder's shards, without their ends."""
    load_index(find_shards(str(folder), "all")[0])
    for path in folder.glob("*.index"):
        path.unlink()
        path.with_suffix(".lock").unlink()
        yield path.stem


@pytest.mark.slow
def test_twelve_million_examples_cost_a_process_less_than_100_mb(tmp_path):
    """A mapped index, and the shuffled order of an epoch, as /proc counts what is resident."""
    write_shards(tmp_path, numbered(2), per_shard=1)
    paths, _ = find_shards(str(tmp_path), "all")
    header, _ = load_index(paths)
    index, = tmp_path.glob("*.index")
    each = 6_000_000
    header["counts"] = [each, each]
    text = json.dumps(header)
    with open(index, "wb") as file:
        file.write((text + " " * (-(len(text) + 1) % 4) + "\n").encode())
        for _ in range(2):
            np.arange(each + 1, dtype=np.uint32).tofile(file)
    program = """
import sys; sys.path.insert(0, '.')
import torch
from plumbing.loader import order
from data import get_dataset
from plumbing import index as indexing
from plumbing import shards
def resident():
    return int(next(line for line in open('/proc/self/status') if line.startswith('VmRSS')).split()[1]) / 1024
shards.first_example, shards.Shards.usable = lambda *_: (False, (3, 8, 8)), lambda self, number: None
torch.randperm(10)
before = resident()
ds = shards.Shards(sys.argv[1], 'all', 3, 8, 8)
print(len(ds))
for i, batch in enumerate(order(len(ds), 1000, 0, 0, 20, range(1000))):
    for number in batch:
        shard, place = ds.place(number)
        row = number + shard
        assert int(ds.starts[row]) == place, (number, shard, place)
print(resident() - before)
"""
    done = subprocess.run([sys.executable, "-c", program, tmp_path], cwd=ROOT, text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    count, megabytes = done.stdout.split()
    assert int(count) == 12_000_000 and float(megabytes) < 100, megabytes


# ---------------------------------------------------------------------------------------------------------------
# Every example once an epoch


@pytest.mark.parametrize("world, workers", [(1, 0), (2, 0), (2, 2), (3, 1)])
def test_ranks_and_workers_see_every_example_once_an_epoch(tmp_path, world, workers):
    write_shards(tmp_path / "train", numbered(60), per_shard=7)
    ds = dataset(tmp_path)
    epochs = []
    for epoch in range(2):
        seen = []
        for rank in range(world):
            rows = range(rank * 12 // world, (rank + 1) * 12 // world)
            numbers = order(len(ds), 12, 0, 5 * epoch, 5 * epoch + 5, rows, len(ds))
            loader = DataLoader(ds, batch_sampler=numbers, collate_fn=collate, num_workers=workers)
            seen += [caption for _, captions, _ in loader for caption in captions]
        assert sorted(map(int, seen)) == list(range(60))
        epochs.append(seen)
    assert epochs[0] != epochs[1] and epochs[0] != sorted(epochs[0], key=int)


# ---------------------------------------------------------------------------------------------------------------
# Images


def test_size_and_crop_of_a_wide_image(tmp_path):
    wide = np.zeros((10, 30, 3), np.uint8)
    wide[:, 10:20], wide[:, 20:] = 100, 200
    members = {"png": file_of(Image.fromarray(wide))}
    assert (shown(members, tmp_path, size=10) == 100).all()  # the middle third, not scaled
    assert np.abs(shown(members, tmp_path, size=5)[:, 2].astype(int) - 100).max() <= 2


def test_down_scaling_is_antialiased(tmp_path):
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    assert np.abs(shown({"png": file_of(Image.fromarray(stripes))}, tmp_path).astype(int) - 127).max() <= 3


def test_crops_of_all_sizes_stay_inside():
    """Rounding must not put a corner outside, which Pillow refuses."""
    for width in range(1, 60):
        image = Image.new("RGB", (width, 7), (1, 2, 3))
        for size in (*range(1, 20), 49):
            for across in (0.5, 1 - 2**-53, 1.0):
                assert resize_and_crop(image, size, 11, across, across).size == (11, size)


def test_random_crops_and_flips_are_new_in_each_epoch_and_never_in_validation(tmp_path):
    wide = np.repeat(np.linspace(0, 255, 40).astype(np.uint8)[None, :, None], 10, axis=0).repeat(3, axis=2)
    for split in ("train", "val"):
        write_shard(tmp_path / split / "0.tar", [("a", {"png": file_of(Image.fromarray(wide)), "txt": b"a ramp"})])
    ds = dataset(tmp_path, size=10, crop="random", flip=True)
    views = [to_uint8(image)[0, 0].int() for image, _, _ in ds.__getitems__(range(200))]
    rising = [bool(view[-1] > view[0]) for view in views]
    assert 70 < sum(rising) < 130
    assert len({int(view.min()) for view in views}) > 20
    again = [to_uint8(image)[0, 0].int() for image, _, _ in ds.__getitems__(range(200))]
    assert all(map(torch.equal, views, again))
    centred = dataset(tmp_path, "val", size=10, crop="random", flip=True)
    assert to_uint8(centred[0][0])[0, 0].tolist() == wide[0, 15:25, 0].tolist()


def several(tmp_path):
    """Shards of images that may and may not be mirrored, with one or several captions, and one that is damaged."""
    ramp = np.repeat(np.linspace(0, 255, 12).astype(np.uint8)[None, :, None], 9, axis=0).repeat(3, axis=2)
    image = file_of(Image.fromarray(ramp))
    examples = [(f"{i:03d}", {"png": image, "json": json.dumps({"caption": [f"{i}", f"number {i}"],
                                                               "mirror": i % 3 > 0}).encode()}) for i in range(9)]
    examples[4] = "bad", {"png": b"garbage", "txt": b"nothing"}
    write_shard(tmp_path / "train" / "0.tar", examples)
    return dataset(tmp_path, flip=True)


@pytest.mark.parametrize("processes", [1, 3])
def test_examples_kept_in_memory_are_those_of_the_shards(tmp_path, monkeypatch, processes):
    monkeypatch.setattr("plumbing.kept.PART", 2)
    monkeypatch.setattr(os, "cpu_count", lambda: processes)
    shards = several(tmp_path)
    kept = Kept(shards)
    numbers = [*range(9), *range(60, 120, 7)]
    expected = shards.__getitems__(numbers)
    found = kept.__getitems__(numbers)
    assert len({caption for _, caption, _ in found}) > 9
    for (image, caption, fault), (kept_image, *rest) in zip(expected, found, strict=True):
        assert torch.equal(image, kept_image)
        assert rest == [caption, fault]
    assert "cannot be decoded" in found[4][2]
    assert len(kept) == 9 and kept.eight_bit and kept.place(3) == (0, 3)


def test_latents_kept_in_memory_are_normalised(tmp_path):
    latents = np.random.default_rng(0).standard_normal((5, 4, 8, 8)).astype(np.float16)
    write_shard(tmp_path / "train" / "0.tar", [(f"{i}", {"npy": npy(latent), "txt": b"x"})
                                               for i, latent in enumerate(latents)])
    shards = Shards(str(tmp_path), "train", 4, 8, 8, latent_scale=0.5)
    for (image, *_), (kept_image, *_) in zip(shards.__getitems__(range(5)), Kept(shards).__getitems__(range(5))):
        assert torch.equal(image, kept_image)


def test_what_cannot_be_kept_in_memory_is_told(tmp_path, monkeypatch):
    several(tmp_path)
    with pytest.raises(ValueError, match="crop 'random'"):
        Kept(dataset(tmp_path, crop="random"))
    with pytest.raises(ValueError, match="only shards"):
        Kept(get_dataset("digits", "train", 8, 1))
    monkeypatch.setattr("plumbing.kept.free_memory", lambda: 9 * 3 * 64)
    with pytest.raises(ValueError, match="0.0 GB, and 0.0 GB are free"):
        Kept(dataset(tmp_path))


@pytest.mark.slow
def test_training_from_memory_is_training_from_shards(tmp_path):
    several(tmp_path)
    write_shard(tmp_path / "val" / "0.tar", numbered(3))
    losses = []
    for in_memory in (True, False):
        out = tmp_path / f"{in_memory}"
        run("train.py", *TRAIN, f"--data_dir={tmp_path}", f"--out_dir={out}", "--batch_size=6", "--flip=True",
            "--max_iters=4", "--val_interval=4", "--bad_limit=0.5", "--bad_captions=1", f"--in_memory={in_memory}",
            "--workers=2",
            "--log_interval=1")
        losses.append([line["loss"] for line in training_lines(out / "log.jsonl")])
    assert losses[0] == losses[1]


@pytest.mark.parametrize("mode, colour, expected", [
    ("L", 90, (90, 90, 90)), ("RGBA", (200, 0, 0, 0), (255, 255, 255)), ("RGBA", (0, 100, 0, 255), (0, 100, 0)),
    ("LA", (10, 0), (255, 255, 255)), ("1", 1, (255, 255, 255)), ("I;16", 0, (0, 0, 0)),
])
def test_modes_become_rgb_and_transparency_white(tmp_path, mode, colour, expected):
    assert shown({"png": png(colour, mode=mode)}, tmp_path)[4, 4].tolist() == list(expected)


def test_sixteen_bits_are_scaled_and_not_clipped(tmp_path):
    ramp = Image.fromarray(np.tile(np.arange(8, dtype=np.uint16) * 8192, (8, 1)))
    assert ramp.mode == "I;16"
    assert shown({"png": file_of(ramp)}, tmp_path)[0, :, 0].tolist() == [0, 32, 64, 96, 128, 160, 192, 224]


def test_an_image_like_a_thread_costs_no_memory(tmp_path):
    assert (shown({"png": png((9, 8, 7), (20_000, 1))}, tmp_path, size=256) == [9, 8, 7]).all()


def test_half_a_character_in_a_caption(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", [("a", {"png": png(), "json": b'{"caption": "hello \\ud83d"}'})])
    assert dataset(tmp_path)[0][1] == "hello ?"


def test_palettes_with_transparency_cmyk_and_webp(tmp_path):
    palette = Image.new("P", (12, 12), 1)
    palette.putpalette([1, 2, 3, 200, 100, 0])
    file = file_of(palette, transparency=1)
    assert shown({"png": file}, tmp_path)[4, 4].tolist() == [255, 255, 255]
    cmyk = file_of(Image.new("CMYK", (12, 12), (255, 0, 0, 0)), "JPEG")
    assert np.abs(shown({"jpg": cmyk}, tmp_path)[4, 4].astype(int) - [0, 255, 255]).max() < 8
    webp = file_of(Image.new("RGB", (12, 12), (10, 200, 30)), "WEBP", lossless=True)
    assert shown({"webp": webp}, tmp_path)[4, 4].tolist() == [10, 200, 30]


def test_exif_orientation_is_followed(tmp_path):
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 3  # stored upside down
    upside_down = shown({"jpg": file_of(image, "JPEG", exif=exif, quality=100)}, tmp_path)
    assert upside_down[:3].max() < 30 and upside_down[5:].min() > 225


def test_grey_models_get_grey_images(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", [("a", {"png": png((255, 0, 0)), "txt": b"red"})])
    image, _ = dataset(tmp_path, channels=1)[0]
    assert image.shape == (1, 8, 8) and to_uint8(image).unique().tolist() == [76]  # red's luma
    with pytest.raises(ValueError, match="1 or 3 channels: channels is 4"):
        dataset(tmp_path, channels=4)


# ---------------------------------------------------------------------------------------------------------------
# Latents


def test_latents_are_normalised_as_latents_json_says_or_as_set(tmp_path):
    latent_shard(tmp_path / "train" / "0.tar", np.arange(2 * 4 * 2 * 6).reshape(2, 4, 2, 6), ["class 1", "class 2"])
    raw = torch.arange(48.0).view(4, 2, 6)
    ds = Shards(str(tmp_path), "train", 4, 2, 6)
    assert not ds.eight_bit and ds.latent and torch.equal(ds[0][0], raw) and ds[1][1] == "class 2"
    (tmp_path / "latents.json").write_text(json.dumps({"mean": [1, 2, 3, 4], "scale": [0.5, 1, 2, 4]}))
    latent = Shards(str(tmp_path), "train", 4, 2, 6)[0][0]
    assert latent[:, 0, 0].tolist() == [-0.5, 10, 42, 128]  # of 0, 12, 24 and 36
    assert latent[:, 1, 5].tolist() == [5, 21, 64, 172]  # of 11, 23, 35 and 47
    assert torch.equal(Shards(str(tmp_path), "train", 4, 2, 6, latent_scale=0.25)[0][0], raw / 4)
    (tmp_path / "latents.json").write_text("{}")
    with pytest.raises(ValueError, match="latents.json is damaged"):
        Shards(str(tmp_path), "train", 4, 2, 6)
    (tmp_path / "latents.json").write_text(json.dumps({"mean": [1], "scale": [1]}))
    with pytest.raises(ValueError, match="is of latents of 1 channels, but channels is 4"):
        Shards(str(tmp_path), "train", 4, 2, 6)


def test_an_unfinished_encoding_is_told(tmp_path):
    latent_shard(tmp_path / "train" / "0.tar", np.ones((2, 4, 2, 6)), ["class 1", "class 2"])
    (tmp_path / "encoding.json").write_text("{}")
    with pytest.raises(ValueError, match="is not finished"):
        Shards(str(tmp_path), "train", 4, 2, 6)


def test_latents_of_another_size_are_told_at_once(tmp_path):
    latent_shard(tmp_path / "train" / "0.tar", np.zeros((120, 4, 2, 6)), ["class 1"] * 120)
    with pytest.raises(ValueError, match="100 examples in a row are unusable.*4x2x6 numbers, not 4x8x8 finite ones"):
        Shards(str(tmp_path), "train", 4, 8, 8)
    write_shard(tmp_path / "images" / "train" / "0.tar", numbered(1))
    with pytest.raises(ValueError, match="latent_scale is 0.5, but .* holds images"):
        dataset(tmp_path / "images", latent_scale=0.5)


# ---------------------------------------------------------------------------------------------------------------
# What is wrong with some

JPEG, PNG = (file_of(Image.effect_noise((64, 64), 90), kind) for kind in ("JPEG", "PNG"))
FAULTS = [
    ({"png": b"not an image", "txt": b"x"}, "it cannot be decoded"),
    ({"jpg": JPEG[:len(JPEG) // 2], "txt": b"x"}, "it cannot be decoded"),
    ({"png": PNG[:len(PNG) // 2], "txt": b"x"}, "it cannot be decoded"),
    ({"png": b"", "txt": b"x"}, "it cannot be decoded"),
    ({"png": png(0, (20_000, 9_000), "1"), "txt": b"x"}, "it is enormous (Image size (180000000 pixels) exceeds limit"),
    ({"png": png(0, (10_000, 9_000), "1"), "txt": b"x"}, "it is enormous (Image size (90000000 pixels) exceeds limit"),
    ({"png": png()}, "it has no caption"),
    ({"png": png(), "txt": b" \n"}, "its caption is empty"),
    ({"png": png(), "txt": b"\xff\xfe"}, "it has no caption"),
    ({"png": png(), "json": b"{}"}, "it has no caption"),
    ({"png": png(), "json": b'{"caption": null}'}, "it has no caption"),
    ({"png": png(), "json": b"[1"}, "it has no caption"),
    ({"png": png(), "json": b"[" * 100_000}, "it has no caption: its .json is damaged"),
    ({"png": png(), "json": b'{"caption": 7}'}, 'it has no caption: its "caption" is a number, 7'),
    ({"png": png(), "cls": b"cat"}, "it has no caption: its .cls is 'cat'"),
    ({"a.png": png(), "b.png": png(), "txt": b"x"}, "it has KEY.a.png and KEY.b.png"),
    ({"txt": b"alone"}, "it has no image"),
    ({"npy": npy(np.zeros((3, 8, 8))), "txt": b"x"}, "it has no image"),
]


@pytest.mark.parametrize("members, fault", FAULTS)
def test_unusable_example_is_named_and_replaced_by_the_next(tmp_path, members, fault):
    write_shard(tmp_path / "train" / "0.tar", [*numbered(3), ("bad", members), *numbered(3, 3)])
    ds = dataset(tmp_path)
    triples = ds.__getitems__(range(7))
    assert [caption for _, caption, _ in triples] == ["0", "1", "2", "3", "3", "4", "5"]
    assert [bool(found) for _, _, found in triples] == [False] * 3 + [True] + [False] * 3
    assert triples[3][2].startswith(f"example 3 of {tmp_path / 'train' / '0.tar'}: {fault}")
    assert triples[3][2].endswith(f", in bad.{next(iter(members))}")
    assert torch.equal(triples[3][0], triples[4][0])
    assert all(len(ds[i]) == 2 and torch.equal(image, ds[i][0]) and caption == ds[i][1]
               for i, (image, caption, _) in enumerate(triples))


@pytest.mark.parametrize("cut", [0, 1, 100, 511])
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_truncated_shard_keeps_its_whole_examples(tmp_path, keep, cut):
    rng = np.random.default_rng(0)
    noisy = [(f"{i}", {"png": file_of(Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8))),
                       "txt": str(i).encode()}) for i in range(20)]
    for name in ("0.tar", "1.tar"):
        write_shard(tmp_path / "train" / name, noisy)
    path = tmp_path / "train" / "0.tar"
    blocks = int(keep * path.stat().st_size / 512)
    path.write_bytes(path.read_bytes()[:512 * blocks - cut])
    ds = dataset(tmp_path)
    assert "0.tar" in ds.header["faults"]
    triples = ds.__getitems__(range(len(ds)))
    first = len(ds) - 20
    assert 4 < first < 16
    unusable = [i for i, (_, _, fault) in enumerate(triples) if fault]
    assert unusable in ([], [first - 1])  # the one that the cut went through
    assert [caption for _, caption, _ in triples[first:]] == [str(i) for i in range(20)]


def test_a_shard_that_ends_after_a_whole_member_has_no_end(tmp_path):
    write_shards(tmp_path, numbered(20))
    path = tmp_path / "00000.tar"
    with tarfile.open(path) as file:
        assert {member.mode for member in file} == {0o644}
        end = file.offset
    path.write_bytes(path.read_bytes()[:end])
    ds = dataset(tmp_path, "all")
    assert ds.faults == {"00000.tar": "it has no end"}
    assert [caption for _, caption in ds] == [str(i) for i in range(20)]


def test_a_damaged_block_is_told_though_what_follows_is_lost(tmp_path):
    write_shards(tmp_path, numbered(20))
    path = tmp_path / "00000.tar"
    damaged = bytearray(path.read_bytes())
    block = int(load_index([path])[1][8])  # where the ninth example begins
    damaged[512 * block:512 * (block + 1)] = bytes(512)
    path.write_bytes(damaged)
    ds = dataset(tmp_path, "all")
    assert len(ds) == 8 and "is not a member" in ds.header["faults"]["00000.tar"]


def test_a_file_that_is_not_a_shard_is_named(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", numbered(3))
    (tmp_path / "train" / "1.tar").write_bytes(b"<html>404</html>" * 100)
    ds = dataset(tmp_path)
    assert len(ds) == 3 and list(ds.header["faults"]) == ["1.tar"]
    (tmp_path / "train" / "0.tar").write_bytes(b"")
    with pytest.raises(ValueError, match="has 0 examples.*0.tar: "):
        dataset(tmp_path)


def spoilt(folder, good, bad):
    examples = numbered(good + bad)
    for i in range(bad):
        examples[i * (good + bad) // bad][1]["png"] = b"garbage"
    write_shards(folder / "train", examples)
    write_shards(folder / "val", numbered(16))
    return folder


@pytest.mark.slow
def test_training_counts_unusable_examples_and_goes_on(tmp_path):
    folder = spoilt(tmp_path / "data", 44, 4)
    (folder / "train" / "x.tar").write_bytes(b"no tar")
    _, printed = run("train.py", *TRAIN, f"--data_dir={folder}", f"--out_dir={tmp_path / 'run'}")
    assert "x.tar is damaged" in printed
    lines = training_lines(tmp_path / "run" / "log.jsonl")
    assert lines[-1]["unusable"] == 4  # 48 examples, an epoch
    assert all(0 <= line["data_wait"] <= 1 and line["cut"] == 0 for line in lines)


@pytest.mark.slow
def test_too_many_unusable_examples_stop_the_run_and_are_named(tmp_path):
    folder = spoilt(tmp_path / "data", 30, 18)
    settings = [*TRAIN, f"--data_dir={folder}", "--max_iters=20"]
    line = fails("train.py", *settings, f"--out_dir={tmp_path / 'run'}", "--workers=2")
    assert "examples are unusable, more than bad_limit 0.01 allows" in line and line.count("cannot be decoded") == 10
    assert str(tmp_path / "run" / "ckpt.pt") in line and (tmp_path / "run" / "ckpt.pt").exists()
    stopped = read_log(tmp_path / "run" / "log.jsonl")[-1]
    assert stopped["unusable"] >= 10
    # resumed, as torchrun would, it still knows, and stops again
    line = fails("train.py", *settings, f"--out_dir={tmp_path / 'run'}", "--resume=yes")
    assert "examples are unusable" in line
    assert read_log(tmp_path / "run" / "log.jsonl")[-1]["iter"] == stopped["iter"] + 1
    run("train.py", *settings, f"--out_dir={tmp_path / 'lenient'}", "--bad_limit=0.5", "--val_interval=100")
    assert training_lines(tmp_path / "lenient" / "log.jsonl")[-1]["iter"] == 20


@pytest.mark.slow
def test_a_shard_of_which_nothing_is_usable_is_replaced_from_others(tmp_path):
    """Though it holds more examples than are tried in a row."""
    write_shard(tmp_path / "train" / "0.tar", [(f"{i}", {"png": b"garbage", "txt": b"x"}) for i in range(400)])
    write_shard(tmp_path / "train" / "1.tar", numbered(600))
    ds = dataset(tmp_path)
    triples = ds.__getitems__(range(1000))
    assert [bool(fault) for _, _, fault in triples] == [True] * 400 + [False] * 600
    assert all("0.tar" in fault for _, _, fault in triples[:400])
    assert len({caption for _, caption, _ in triples[:400]}) > 50  # not always the same one


def test_a_shard_that_may_not_be_read_is_an_error(tmp_path, monkeypatch):
    write_shards(tmp_path, numbered(3))

    def refused(*args):
        raise PermissionError(13, "Permission denied", "00000.tar")

    monkeypatch.setattr(tarfile, "open", refused)
    with pytest.raises(PermissionError, match="00000.tar"):
        indexing.scan(tmp_path / "00000.tar")


def test_neighbours_are_tried_first_and_then_examples_from_all_over():
    assert list(shards.attempts(5, 20_000)) == [*range(5, 15), *(5 + 200 * k for k in range(10, 100))]
    assert list(shards.attempts(5, 120)) == list(range(5, 105))


@pytest.mark.slow
def test_the_only_usable_example_of_a_hundred_is_found(tmp_path):
    for place in (0, 37, 99):
        examples = [(f"{i}", {"png": b"garbage", "txt": b"x"}) for i in range(100)]
        examples[place] = numbered(1)[0]
        write_shard(tmp_path / f"{place}" / "train" / "0.tar", examples)
        assert {caption for _, caption, _ in dataset(tmp_path / f"{place}").__getitems__(range(100))} == {"0"}


@pytest.mark.parametrize("loss", ["removed", "emptied", "garbled"])
def test_a_shard_that_is_lost_while_training_is_counted_and_named(tmp_path, loss):
    write_shards(tmp_path / "train", numbered(20), per_shard=10)
    ds = dataset(tmp_path)
    path = tmp_path / "train" / "00000.tar"
    if loss == "removed":
        path.unlink()
    else:
        path.write_bytes(b"" if loss == "emptied" else b"garbage " * (path.stat().st_size // 8))
    triples = ds.__getitems__(range(20))
    assert [bool(fault) for _, _, fault in triples] == [True] * 10 + [False] * 10
    assert triples[3][2].startswith(f"example 3 of {path}: ")
    assert list(ds.captions(range(20))) == [f"{i}" for i in range(10, 20)]


def test_what_a_worker_reports_is_one_line(tmp_path):
    for split in ("train", "val"):
        write_shards(tmp_path / split, numbered(16))
    bad = [(f"{i}", {"png": b"garbage", "txt": b"x"}) for i in range(300)]
    write_shards(tmp_path / "train", numbered(1) + bad)
    line = fails("train.py", *TRAIN, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'run'}", "--workers=1")
    assert line.startswith("100 examples in a row are unusable")


@pytest.mark.slow
def test_long_captions_are_counted(tmp_path):
    examples = [(f"{i}", {"png": png(), "txt": b"a red circle above a blue square"}) for i in range(16)]
    for split in ("train", "val"):
        write_shards(tmp_path / split, examples)
    run("train.py", *TRAIN, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'run'}", "--text_len=4",
        "--bad_captions=1")
    assert [line["cut"] for line in training_lines(tmp_path / "run" / "log.jsonl")] == [8, 16, 24, 32, 40, 48]


def test_shards_do_not_train_with_the_size_of_the_digits(tmp_path):
    for split in ("train", "val"):
        write_shards(tmp_path / "images" / split, numbered(12))
        latent_shard(tmp_path / "latents" / split / "0.tar", np.ones((12, 4, 2, 6)), ["class 1"] * 12)
    tiny = [*SHORT, *SMALL, "--dataset=shards", f"--out_dir={tmp_path / 'run'}"]
    for settings in ([], ["--image_size=8"], ["--channels=3"]):
        line = fails("train.py", *tiny, f"--data_dir={tmp_path / 'images'}", *settings)
        assert "shards need image_size and channels: their first example is 3x12x12" in line
    assert "first example is 4x2x6" in fails("train.py", *tiny, f"--data_dir={tmp_path / 'latents'}")
    for size in (0, -8):
        with pytest.raises(ValueError, match=f"image_size is {size}x{size}"):
            dataset(tmp_path / "images", size=size)


@pytest.mark.slow
def test_a_run_whose_captions_fall_apart_does_not_start(tmp_path, monkeypatch):
    examples = [(f"{i}", {"png": png(), "txt": b"my cat"}) for i in range(16)]
    for split in ("train", "val"):
        write_shards(tmp_path / split, [("none", {"png": png()}), *examples])
    settings = [*TRAIN, f"--data_dir={tmp_path}", "--text_len=8"]
    line = fails("train.py", *settings, f"--out_dir={tmp_path / 'run'}")
    assert "100.0% have too many words that the vocabulary does not know" in line and "`python data.py vocab" in line and "--bad_captions=1" in line
    assert not (tmp_path / "run").exists()
    _, printed = run("train.py", *settings, f"--out_dir={tmp_path / 'run'}", "--bad_captions=1")
    assert "100.0% have too many words" in printed and "17 examples are held out, fewer than 50" in printed
    monkeypatch.setattr(shards, "decode_image", lambda members: pytest.fail("decoded"))
    monkeypatch.setattr(Shards, "usable", lambda self, number: None)
    monkeypatch.setattr(shards, "first_example", lambda paths: (False, (3, 8, 8)))
    assert list(dataset(tmp_path).captions(range(17))) == ["my cat"] * 16  # without its images


def test_latents_that_are_not_normalised_are_told(tmp_path):
    latents = 5 * np.random.default_rng(0).normal(size=(20, 4, 2, 6))
    latent_shard(tmp_path / "train" / "0.tar", latents, ["class 1"] * 20)
    classes = get_tokenizer("classes")
    notes = examine(*[Shards(str(tmp_path), "train", 4, 2, 6)] * 2, classes, 1, 0.1)
    assert any("standard deviation is 4" in note or "standard deviation is 5" in note for note in notes)
    notes = examine(*[Shards(str(tmp_path), "train", 4, 2, 6, latent_scale=0.2)] * 2, classes, 1, 0.1)
    assert not any("standard deviation" in note for note in notes)


@pytest.mark.parametrize("mean, scale", [([0.0, 0, 0, 0], [1, 1, 1, 0]), ([0.0, 0, 0, float("nan")], [1, 1, 1, 1]),
                                         ([0.0, 0, 0, 0], [1, 1, 1, -1]), ([0.0, 0, 0, 0], [1, 1, 1, float("inf")])])
def test_statistics_of_latents_that_would_spoil_them_are_refused(tmp_path, mean, scale):
    latent_shard(tmp_path / "train" / "0.tar", np.ones((2, 4, 2, 6)), ["class 1", "class 2"])
    (tmp_path / "latents.json").write_text(json.dumps({"mean": mean, "scale": scale}))
    with pytest.raises(ValueError, match="latents.json is damaged .means are to be finite, and scales positive"):
        Shards(str(tmp_path), "train", 4, 2, 6)


def test_neighbours_that_share_a_key_are_two_examples(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"png": png(), "txt": f"{i}".encode()}) for i in range(3)])
    assert [caption for _, caption in dataset(tmp_path, "all")] == ["0", "1", "2"]


def test_the_mark_of_an_editor_is_no_part_of_a_caption(tmp_path):
    write_shard(tmp_path / "train" / "0.tar", [("a", {"png": png(), "txt": "\ufeffa cat".encode()})])
    assert dataset(tmp_path)[0][1] == "a cat"
