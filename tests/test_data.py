import gzip
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import write_idx

import data
from plumbing import shapes
from plumbing.images import (FONT_SIZE, GAP, ImageFont, contact_sheet, dequantize, thumbnail, to_pil, to_pixels, to_uint8,
                             wrap)
from plumbing.tokenizer import ASSETS, make_vocabulary


@pytest.fixture
def fashion(tmp_path):
    """A folder with a Fashion-MNIST of 40 and 20 noise images; the first part gzipped, the second not."""
    rng = np.random.default_rng(0)
    for part, n, suffix in (("train", 40, ".gz"), ("t10k", 20, "")):
        images = rng.integers(0, 256, (n, 28, 28), dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte{suffix}", np.arange(n, dtype=np.uint8) % 10)
    return tmp_path


def every_set(fashion, split="train", seed=0):
    yield data.get_dataset("shapes", split, 16, 3, seed)
    yield data.get_dataset("shapes", split, 16, 1, seed)
    yield data.get_dataset("digits", split, 8, 1, seed)
    yield data.get_dataset("fashion", split, 28, 1, seed, str(fashion))
    yield data.get_dataset("fashion", split, (14, 14), 3, seed, str(fashion))


def same(a, b):
    return torch.equal(a[0], b[0]) and a[1] == b[1]


@pytest.mark.slow
def test_only_the_shapes_load_their_renderer():
    program = """import sys, data, plumbing.loader, plumbing.shards
assert "plumbing.shapes" not in sys.modules
data.get_dataset("digits", "val", 8, 1)[0]
assert "plumbing.shapes" not in sys.modules
data.get_dataset("shapes", "val", 8, 1)[0]
assert "plumbing.shapes" in sys.modules"""
    subprocess.run([sys.executable, "-c", program], cwd=Path(data.__file__).parent, check=True)


# -----------------------------------------------------------------------------
# pixels


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8)
    pixels = to_pixels(levels)
    assert pixels.dtype == torch.float32
    assert torch.equal(pixels.double(), (2 * levels.double() + 1) / 256 - 1)
    assert torch.equal(to_uint8(pixels), levels)
    assert to_uint8(torch.tensor([-9.0, -1.0, 1.0, 9.0])).tolist() == [0, 0, 255, 255]


def test_dequantize_fills_the_bin_and_no_more():
    levels = torch.arange(256, dtype=torch.uint8).repeat(4_000)
    pixels = to_pixels(levels)
    noisy = dequantize(pixels, torch.Generator().manual_seed(0))
    assert torch.equal(to_uint8(noisy), levels)  # not one of a million pixels leaves its bin
    within = (noisy - pixels) * 128  # uniform in [-1/2, 1/2)
    assert within.min() < -0.4999 and within.max() > 0.4999
    assert within.mean().abs() < 1e-3 and within.std() == pytest.approx(12**-0.5, abs=1e-3)


def test_dequantize_is_fresh_unless_told_otherwise():
    pixels = torch.zeros(100)
    assert not torch.equal(dequantize(pixels), dequantize(pixels))
    assert torch.equal(*(dequantize(pixels, torch.Generator().manual_seed(1)) for _ in range(2)))


# -----------------------------------------------------------------------------
# data sets


def test_items_are_8_bit_images_with_captions(fashion):
    for ds, shape in zip(every_set(fashion), [(3, 16, 16), (1, 16, 16), (1, 8, 8), (1, 28, 28), (3, 14, 14)]):
        image, caption = ds[7]
        assert image.shape == shape and image.dtype == torch.float32
        assert torch.equal(image, to_pixels(to_uint8(image)))
        assert isinstance(caption, str) and caption


def test_item_is_a_function_of_seed_and_number(fashion):
    for split in ("train", "val"):
        for ds, again, other in zip(*(every_set(fashion, split, seed) for seed in (3, 3, 4))):
            batch = ds.__getitems__(list(range(20)))
            assert all(same(item, again[i]) for i, item in enumerate(batch))
            assert same(batch[11], ds[np.int64(11)]) and same(batch[11], ds[torch.tensor(11)])
            assert all(type(item) is type(ds[0]) and len(item) == 2 for item in batch)
            assert [caption for _, caption in batch] != [other[i][1] for i in range(20)]


def test_captions_do_not_depend_on_size_and_channels():
    sets = [data.get_dataset("shapes", "val", size, channels) for size, channels in ((16, 3), (32, 3), (16, 1))]
    captions = [[caption for _, caption in ds.__getitems__(list(range(50)))] for ds in sets]
    assert captions[0] == captions[1] == captions[2]


def test_out_of_range_is_an_index_error(fashion):
    for ds in every_set(fashion):
        for i in (-1, len(ds)):
            with pytest.raises(IndexError, match=f"item {i} is outside"):
                ds[i]
            with pytest.raises(IndexError):
                ds.__getitems__([0, i])


def test_data_loader_gets_batches():
    loader = torch.utils.data.DataLoader(data.get_dataset("shapes", "val", 16, 3), batch_size=32)
    images, captions = next(iter(loader))
    assert images.shape == (32, 3, 16, 16) and len(captions) == 32


def test_shapes_are_the_scenes_of_shapes_py():
    ds, numbers = data.get_dataset("shapes", "val", 16, 3, seed=5), [-1, -2, -3]
    assert len(ds) == 10_000 and len(data.get_dataset("shapes", "train", 16, 3)) == 1_000_000
    scene = shapes.scenes(5, numbers)
    images, captions = zip(*ds.__getitems__([0, 1, 2]))
    assert torch.equal(to_uint8(torch.stack(images)), torch.as_tensor(shapes.render(scene, 16)))
    assert list(captions) == shapes.captions(scene)


@pytest.mark.slow
def test_shapes_train_and_val_have_no_image_in_common():
    train, val = (data.get_dataset("shapes", split, 16, 3).__getitems__(list(range(10_000)))
                  for split in ("train", "val"))
    pixels = [{image.numpy().tobytes() for image, _ in items} for items in (train, val)]
    assert not pixels[0] & pixels[1]


@pytest.mark.slow
def test_digits_are_balanced_disjoint_and_captioned_by_their_label():
    train, val = (data.get_dataset("digits", split, 8, 1) for split in ("train", "val"))
    assert (len(train), len(val)) == (1500, 297)
    assert np.bincount(val.labels).tolist() == pytest.approx([29.7] * 10, abs=1)
    pixels = [{image.numpy().tobytes() for image, _ in ds} for ds in (train, val)]
    assert not pixels[0] & pixels[1]
    assert train[0][0].min() == 1 / 256 - 1 and train.images.max() == 255
    for word_or_number, n in [*((w, n) for n, w in enumerate(data.DIGITS)), *((str(n), n) for n in range(10))]:
        items = [i for i in range(1500) if train[i][1].split()[-1] == word_or_number]
        assert items and all(train.labels[i] == n for i in items)


def test_a_digit_is_the_right_way_up():
    ds = data.get_dataset("digits", "train", 8, 1)
    mean = [ds.images[ds.labels == n].mean((0, 1)) for n in range(10)]
    assert mean[7][:4].sum() > mean[7][4:].sum()  # a seven is heavy above,
    assert mean[6][:4].sum() < mean[6][4:].sum()  # a six below,
    assert mean[6][2:4, :4].sum() > mean[6][2:4, 4:].sum()  # and its stem is on the left


def test_fashion_sizes_channels_and_captions(fashion):
    full, half, colour = (data.get_dataset("fashion", "train", size, channels, data_dir=str(fashion))
                          for size, channels in ((28, 1), (14, 1), (14, 3)))
    assert len(full) == 40 and len(data.get_dataset("fashion", "val", 28, 1, data_dir=str(fashion))) == 20
    block = to_uint8(full[3][0])[0, 4:6, 10:12].float()
    assert to_uint8(half[3][0])[0, 2, 5] == int(block.mean() + 0.5)
    assert torch.equal(colour[3][0], half[3][0].expand(3, 14, 14))
    for i in range(40):
        assert full[i][1] in data.WORDINGS["fashion"][full.labels[i]]
    assert len({full[i][1] for i in range(0, 40, 10)}) > 1  # one label, several wordings


@pytest.mark.skipif(not Path(data.FASHION_DIR).exists(), reason="dataset-fashion-mnist is not installed")
def test_fashion_of_the_package():
    train, val = (data.get_dataset("fashion", split, 28, 1) for split in ("train", "val"))
    assert (len(train), len(val)) == (60_000, 10_000)
    assert np.bincount(train.labels).tolist() == [6000] * 10
    trousers = train.images[train.labels == 1].mean((0, 1))
    assert trousers[20, 10:12].mean() > 3 * trousers[20, 0:4].mean()


def test_missing_fashion_names_the_package_the_folder_and_the_files(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        data.get_dataset("fashion", "train", 28, 1, data_dir=str(tmp_path))
    for part in ("apt-get install dataset-fashion-mnist", str(tmp_path), "t10k-labels-idx1-ubyte.gz"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def break_gzip(path):
    path.write_bytes(path.read_bytes()[:-20])


def not_gzip(path):
    path.write_bytes(b"<html>not found</html>")


def empty(path):
    path.write_bytes(gzip.compress(b""))


def too_short(path):
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))


def not_bytes(path):
    path.write_bytes(gzip.compress(b"\0\0\x0d" + gzip.decompress(path.read_bytes())[3:]))


@pytest.mark.parametrize("damage", [break_gzip, not_gzip, empty, too_short, not_bytes])
def test_damaged_fashion_names_the_file(fashion, damage):
    path = fashion / "train-images-idx3-ubyte.gz"
    damage(path)
    with pytest.raises(ValueError, match=f"{path} is damaged") as error:
        data.get_dataset("fashion", "train", 28, 1, data_dir=str(fashion))
    assert "\n" not in str(error.value)


def test_fashion_parts_must_belong_together(fashion):
    write_idx(fashion / "train-labels-idx1-ubyte.gz", np.zeros(39, dtype=np.uint8))
    with pytest.raises(ValueError, match="do not belong together"):
        data.get_dataset("fashion", "train", 28, 1, data_dir=str(fashion))
    write_idx(fashion / "t10k-labels-idx1-ubyte", np.arange(20, dtype=np.uint8) % 11)
    with pytest.raises(ValueError, match="do not belong together.* up to 10"):
        data.get_dataset("fashion", "val", 28, 1, data_dir=str(fashion))


@pytest.mark.parametrize("arguments, message", [
    (("shape", "train", 16, 3), "data set 'shape' is unknown; there are shapes, fashion, digits"),
    (("shapes", "test", 16, 3), "split 'test' is unknown; there are train and val"),
    (("shapes", "train", (16, 24), 3), "shapes has no 16x24 images; image_size may be 8x8 to 1024x1024, square"),
    (("shapes", "train", 4, 3), "shapes has no 4x4 images"),
    (("shapes", "train", 16, 4), "shapes has no images of 4 channels; channels may be 1 or 3"),
    (("fashion", "train", 32, 1), "fashion has no 32x32 images; image_size may be 28x28 or 14x14"),
    (("digits", "train", 28, 1), "digits has no 28x28 images; image_size may be 8x8"),
])
def test_unsupported_settings_say_what_is_allowed(arguments, message):
    with pytest.raises(ValueError) as error:
        data.get_dataset(*arguments)
    assert message in str(error.value)


def test_class_captions():
    assert data.dataset_class_captions("fashion")[1::8] == ["trousers", "an ankle boot"]
    assert data.dataset_class_captions("digits")[7] == "the digit seven"
    assert data.dataset_class_captions("shapes") is None
    assert "an 8" in data.WORDINGS["digits"][8] and "a 7" in data.WORDINGS["digits"][7]


def test_each_word_is_one_token(fashion):
    tokenizer = data.get_tokenizer()
    for ds in every_set(fashion):
        for _, caption in ds.__getitems__(list(range(min(len(ds), 2_000)))):
            assert len(tokenizer.tokens(caption)) == len(caption.split())
    assert tokenizer.encode(["a red circle above a blue square"], 16).count_nonzero() == 7


def test_vocabulary_is_reproducible():
    shipped = (ASSETS / "captions.tiktoken").read_bytes()
    of_classes = [caption for classes in data.WORDINGS.values() for wordings in classes for caption in wordings]
    assert make_vocabulary(shapes.captions(shapes.scenes(0, range(10_000))) + of_classes) == shipped
    assert data.get_tokenizer().vocab_size == 2 + len(shipped.splitlines()) <= 514


# -----------------------------------------------------------------------------
# contact sheets and the command line


@pytest.mark.parametrize("channels", [1, 3])
def test_contact_sheet_shows_every_image_and_caption(channels):
    images = to_pixels(torch.randint(256, (5, channels, 16, 16), dtype=torch.uint8))
    sheet = contact_sheet(images, ["a long caption that needs more than one line"] * 5, columns=3)
    bare = contact_sheet(images, columns=3)
    assert bare.size == (3 * (96 + GAP) + GAP, 2 * (96 + GAP) + GAP)
    assert sheet.width == bare.width and sheet.height > bare.height + 60
    cell = np.asarray(bare)[GAP:GAP + 96:6, GAP:GAP + 96:6]
    assert (cell.transpose(2, 0, 1) == to_uint8(images[0]).expand(3, 16, 16).numpy()).all()
    under = np.asarray(sheet)[GAP + 96:GAP + 150, :96]
    assert (under < 100).any()  # ink


def test_pixels_of_one_channel_of_three_and_of_latents():
    """Grey and colour as they are; of four channels the first three, of two the first, each divided by 3."""
    values = torch.tensor([-0.6, 0.0, 0.6, 0.9])[:, None, None]
    for image, expected in ((values[:1], (51,) * 3), (values[1:], (128, 204, 243)), (values, (102, 128, 153)),
                            (values[2:], (153,) * 3)):
        assert np.asarray(to_pil(image)).tolist() == [[list(expected)]]


@pytest.mark.parametrize("count, columns", [(1, 1), (2, 2), (5, 5), (7, 3), (10, 5), (13, 4), (16, 4), (24, 6), (40, 8)])
def test_contact_sheet_has_full_rows_if_it_can(count, columns):
    assert contact_sheet(torch.zeros(count, 1, 8, 8), scale=1).width == columns * (8 + GAP) + GAP


def test_contact_sheet_scale_and_wrapping():
    assert contact_sheet(torch.zeros(1, 1, 28, 28), scale=2).size == (56 + 2 * GAP,) * 2
    font = ImageFont.load_default(FONT_SIZE)
    lines = wrap("a purple triangle left of a yellow square", font, 96).split("\n")
    assert " ".join(lines) == "a purple triangle left of a yellow square"
    assert len(lines) > 1 and max(font.getlength(line) for line in lines) <= 96


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["data.py", *arguments])
    data.main()


@pytest.mark.slow
def test_command_prints_and_leaves_a_contact_sheet(monkeypatch, capsys, tmp_path, fashion):
    for name in ("shapes", "digits", "fashion"):
        out = tmp_path / "new" / f"{name}.png"
        run(monkeypatch, name, f"--data_dir={fashion}", f"--out={out}")
        said = capsys.readouterr().out
        assert "to train on" in said and "tokens a caption" in said and str(out) in said
        with Image.open(out) as sheet:
            assert sheet.width > 6 * 96 and len(sheet.convert("RGB").getcolors(2**20)) > 10
        assert list(out.parent.glob("*.part")) == []


def test_command_takes_a_size_and_makes_folders(monkeypatch, capsys, tmp_path):
    run(monkeypatch, "digits", "--image_size=8", "--count=3", "--split=val", f"--out={tmp_path / 'a' / 'b' / 'x.png'}")
    assert "1,500 to train on, 297 to validate, 1x8x8" in capsys.readouterr().out
    with Image.open(tmp_path / "a" / "b" / "x.png") as sheet:
        assert sheet.width == 3 * 96 + 4 * GAP


@pytest.mark.parametrize("arguments, part", [
    (["cifar"], "invalid choice: 'cifar'"),
    ([], "required: NAME"),
    (["shapes", "--spilt=val"], "--spilt=val"),
    (["shapes", "--split=test"], "there are train and val"),
    (["digits", "--image_size=28"], "image_size may be 8x8"),
    (["fashion", "--data_dir=/nowhere"], "/nowhere"),
    (["digits", "--count=0"], "--count is 0, but must be in 1 to 1000"),
    (["digits", "--count=100000000000"], "--count is 100000000000, but must be in"),
    (["digits", "--seed=-1"], "--seed is -1, but must be in"),
    (["digits", "--tokenizer=classes"], "is not a class"),
    (["shapes", "--image_size=0"], "--image_size is 0, but must be in 1 to 4096"),
    (["shards", "--data_dir=x", "--image_size=many"], "--image_size: invalid int value: 'many'"),
    (["folder", "x", "--val=2"], "--val is 2.0, but must be in 1e-06 to 0.9"),
    (["folder", "x", "--val=0"], "--val is 0.0, but must be in"),
    (["folder", "x", "--val=nan"], "--val is nan, but must be in"),
    (["vocab", "--data_dir=x", "--out=x.tiktoken", "--size=9"], "--size is 9, but must be in 256 to"),
    (["vocab", "--out=mine.tiktoken"], "required: --data_dir"),
    (["vocab", "--data_dir=x", "--out=mine"], "needs --out=NAME.tiktoken, but --out is 'mine'"),
    (["encode", "--data_dir=x", "--encoder=x", "--out=x", "--batch_size=0"], "--batch_size is 0, but must be in 1 to"),
    (["encode", "--data_dir=x", "--encoder=x", "--out=x", "--workers=-1"], "--workers is -1, but must be in 0 to"),
])
def test_command_answers_mistakes_with_one_line(monkeypatch, arguments, part):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments)
    assert part in exit.value.code and "\n" not in exit.value.code


@pytest.mark.slow
def test_command_exits_with_a_status_and_no_traceback():
    program = data.ASSETS.parent / "data.py"
    done = subprocess.run([sys.executable, program, "digits", "--image_size=9"], capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_captions_keep_their_lines_and_are_broken_to_fit():
    font = ImageFont.load_default(13)
    assert wrap("a bag\n-3.0 nats", font, 500) == "a bag\n-3.0 nats"
    assert wrap("a red circle above a blue square", font, 60).count("\n") >= 2


@pytest.mark.parametrize("caption", ["word " * 32_000, "x" * 160_000, "\n" * 160_000, "a\n" * 80_000,
                                     "猫坐在窗台上，" * 20_000])
def test_long_captions_are_cut_with_an_ellipsis(caption, monkeypatch):
    """And so before they are broken into lines, which is slow with books."""
    images, broken, wrapped = torch.zeros(2, 3, 96, 96), [], textwrap.wrap
    monkeypatch.setattr(textwrap, "wrap", lambda text, *args, **how: broken.append(text) or wrapped(text, *args, **how))
    sheet = contact_sheet(images, [caption, "a bag"], columns=2)
    assert broken and sum(map(len, broken)) < 3000  # letters, of 160,000
    assert sheet.height <= 96 + 2 * GAP + 9 * (FONT_SIZE + 4) and sheet.width == 2 * (96 + GAP) + GAP
    font = ImageFont.load_default(FONT_SIZE)
    shown = wrap(caption, font, 96)
    assert 1 < shown.count("…") + shown.count("\n") and shown.rstrip("\na").endswith("…")
    likelihood = wrap(caption + "\n-log p = 12.5", font, 96).split("\n")
    assert len(likelihood) <= 9 and likelihood[-1] == "-log p = 12.5" and "…" in "".join(likelihood)


def test_captions_that_fit_are_whole():
    font = ImageFont.load_default(FONT_SIZE)
    eight = "\n".join("abcdefgh")
    assert wrap(eight, font, 96) == eight and wrap(eight + "\n-1 nat", font, 96) == eight + "\n-1 nat"
    assert wrap(" ".join(eight.split()), font, 1) == eight and "…" in wrap(" ".join(eight.split()) + " i", font, 1)
    long_word = wrap("a supercalifragilistic day", font, 96).split("\n")
    assert "".join(long_word).replace(" ", "") == "asupercalifragilisticday"
    assert max(font.getlength(line) for line in long_word) <= 96


@pytest.mark.parametrize("size, smaller", [((256, 256), (256, 256)), ((8, 12), (8, 12)), ((512, 256), (256, 128)),
                                           ((3, 3000), (1, 256)), ((257, 100), (256, 100))])
def test_thumbnails(size, smaller):
    image = torch.rand(3, *size)
    small = thumbnail(image)
    assert small.shape == (3, *smaller) and small.mean().item() == pytest.approx(image.mean().item(), abs=0.02)
    assert size != smaller or torch.equal(small, image)
    assert torch.allclose(thumbnail(torch.ones(1, 512, 1024).cumsum(2))[0, 0, :2], torch.tensor([2.5, 6.5]))
