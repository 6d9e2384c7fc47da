"""What members of shards mean: which make an example, its captions, its image; and image files with odd metadata."""
import io
import json
import tarfile
import zlib

import numpy as np
import pytest
import torch
from helpers import file_of, npy, png
from PIL import Image, ImageOps, PngImagePlugin

from plumbing.decoding import pixels_alone
from plumbing.examples import Unusable, captions_of, decode_image, decode_latent, key_and_suffix
from plumbing.images import to_uint8
from plumbing.shards import Shards, first_example, write_shard

GREEN, RED, BLUE = (0, 200, 0), (200, 0, 0), (0, 0, 200)


def tar(path, *members):
    """A shard of members (name, bytes), in this order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as file:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            file.addfile(info, io.BytesIO(data))
    return path.parent


def read(folder, **settings):
    """(caption, colour, fault) of each example of shards."""
    ds = Shards(str(folder), "all", 3, 8, 8, **settings)
    return [(caption, tuple(to_uint8(image)[:, 3, 3].tolist()), fault)
            for image, caption, fault in ds.__getitems__(range(len(ds)))]


# ---------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize("name, parts", [
    ("0.jpg", ("0", "jpg")), ("a.b/0.Mask.PNG", ("a.b/0", "mask.png")), ("./0.jpg", ("./0", "jpg")),
    ("../x/0.jpg", ("../x/0", "jpg")), ("._0.jpg", None), ("a/._0.jpg", None), ("__MACOSX/0.jpg", None),
    ("a/__MACOSX/._0.jpg", None), (".ipynb_checkpoints/0.jpg", None), (".DS_Store", None), ("README", None),
    ("0.", None),
])
def test_a_key_ends_at_the_first_dot(name, parts):
    assert key_and_suffix(name) == parts


@pytest.mark.parametrize("others", [
    ["0.mask.png"], ["0.a.png", "0.b.png"], ["0.mask.jpg"], ["0.seg.webp", "0.seg.json"], ["0.mask.json"],
    ["0.depth.npy"], ["0.a.png", "0.a.json", "0.b.png", "0.b.json"],
])
def test_the_plain_suffix_wins(tmp_path, others):
    members = [("0.png", png(GREEN)), ("0.txt", b"green"), *((name, png(RED)) for name in others)]
    for number, order in enumerate((members, members[::-1], sorted(members))):
        folder = tar(tmp_path / f"{number}" / "0.tar", *order, ("1.png", png(BLUE)), ("1.txt", b"blue"))
        assert read(folder) == [("green", GREEN, ""), ("blue", BLUE, "")]


@pytest.mark.parametrize("names", [
    ["0.input.jpg", "0.txt"], ["0.jpg", "0.cap.txt"], ["0.input.jpg", "0.cap.txt"], ["0.x.jpg", "0.x.txt"],
    ["0.input.jpg", "0.txt", "0.ocr.txt"], ["0.mask.jpg", "0.image.jpg", "0.image.txt"],
])
def test_other_suffixes_are_read_where_the_plain_one_is_missing(tmp_path, names):
    contents = {"0.mask.jpg": png(RED), "0.ocr.txt": b"stop"}
    members = [(name, contents.get(name, png(GREEN) if "jpg" in name else b"green")) for name in names]
    assert read(tar(tmp_path / "0.tar", *members)) == [("green", GREEN, "")]


def test_plain_json_is_read_before_a_text_with_dots():
    assert captions_of({"ocr.txt": b"stop", "json": b'{"caption": "a sign"}'})[0] == ["a sign"]
    assert captions_of({"ocr.txt": b"stop", "json": b'{"width": 3}'})[0] == ["stop"]
    assert captions_of({"txt": b" ", "json": b'{"caption": "a sign"}'})[0] == ["a sign"]


@pytest.mark.parametrize("name, text", [("photo.{}", "txt"), ("a/photo.v2.{}", "json"), ("img.{}.x", "txt"),
                                        ("v1.0.{}.crop", "cls")])
def test_names_with_dots_that_have_images_and_texts_of_their_own_are_examples(tmp_path, name, text):
    members = []
    for i in range(60):
        contents = {"txt": f"class {i}", "json": json.dumps({"caption": f"class {i}"}), "cls": f"{i}"}[text]
        members += [(f"{name.format(i)}.jpg", png((i, 0, 0))), (f"{name.format(i)}.mask.png", png(RED)),
                    (f"{name.format(i)}.{text}", contents.encode())]
    assert read(tar(tmp_path / "0.tar", *members)) == [(f"class {i}", (i, 0, 0), "") for i in range(60)]


def test_a_plain_pair_and_numbered_pairs_are_examples(tmp_path):
    members = [(f"a.{end}", png((i, 0, 0)) if "jpg" in end else f"{i}".encode())
               for i, ends in enumerate((("jpg", "txt"), ("1.jpg", "1.txt"), ("2.jpg", "2.txt"))) for end in ends]
    assert read(tar(tmp_path / "0.tar", *members)) == [(f"{i}", (i, 0, 0), "") for i in range(3)]


def test_images_of_which_none_is_plain_are_a_named_fault(tmp_path):
    pair = [("0.before.jpg", png(RED)), ("0.after.jpg", png(GREEN)), ("0.txt", b"edited")]
    folder = tar(tmp_path / "0.tar", *pair, ("1.jpg", png(BLUE)), ("1.txt", b"blue"))
    (caption, _, fault), second = read(folder)
    assert caption == "blue" and second == ("blue", BLUE, "")
    assert "it has KEY.before.jpg and KEY.after.jpg, and no KEY.jpg that says which one to read" in fault
    with pytest.raises(Unusable, match="KEY.a.txt and KEY.b.txt"):
        captions_of({"a.txt": b"x", "b.txt": b"y", "jpg": b""})
    for order in ("a.txt", "b.txt"), ("b.txt", "a.txt"):
        assert captions_of({**{name: name.encode() for name in order}, "a.jpg": b""})[0] == ["a.txt"]


def test_files_that_a_mac_packs_beside_others_are_skipped(tmp_path):
    members = []
    for i in range(3):
        for name, data in ((f"{i}.jpg", png((i, 0, 0))), (f"{i}.txt", b"x")):
            members += [(f"._{name}", b"\0\5\x16\7" * 300), (name, data), (f"__MACOSX/._{name}", b"\0")]
    folder = tar(tmp_path / "0.tar", (".DS_Store", b"x"), *members, ("README", b"x"))
    tar(tmp_path / "._0.tar", ("x", b"\0"))
    assert read(folder) == [("x", (i, 0, 0), "") for i in range(3)]


def test_members_that_are_not_adjacent_are_told(tmp_path):
    images = [(f"{i}.png", png((i, 0, 0))) for i in range(3)]
    texts = [(f"{i}.txt", b"x") for i in range(3)]
    folder = tar(tmp_path / "0.tar", ("a.png", png(GREEN)), ("a.txt", b"green"), *images, *texts)
    ds = Shards(str(folder), "all", 3, 8, 8)
    fault = "0.txt is not beside 0.png, nor are 2 others beside theirs: the members of an example have to be adjacent"
    assert ds.faults["0.tar"].startswith(fault) and "tar --sort=name" in ds.faults["0.tar"]
    faults = [fault for _, _, fault in ds.__getitems__(range(7)) if fault]
    assert [fault.partition(": ")[2] for fault in faults] == [
        *(f"it has no caption, in {i}.png" for i in range(3)), *(f"it has no image, in {i}.txt" for i in range(3))]
    for name, members in (("images", images + texts), ("texts", texts + images)):
        with pytest.raises(ValueError, match="not beside .*adjacent"):
            read(tar(tmp_path / name / "0.tar", *members))


def test_examples_that_share_a_key_are_no_fault(tmp_path):
    pair = [("a.png", png(GREEN)), ("a.txt", b"green")]
    folder = tar(tmp_path / "0.tar", *pair, *pair, ("b.png", png(BLUE)), ("b.txt", b"blue"), *pair)
    assert [caption for caption, _, _ in read(folder)] == ["green", "green", "blue", "green"]
    assert Shards(str(folder), "all", 3, 8, 8).faults == {}


# ---------------------------------------------------------------------------------------------------------------
# Captions


@pytest.mark.parametrize("record, captions", [
    ({"captions": {"en": "a cat", "de": "eine Katze"}}, ["a cat", "eine Katze"]),
    ({"captions": {"en": ["a cat", "one cat"], "de": "eine Katze"}}, ["a cat", "one cat", "eine Katze"]),
    ({"captions": "a cat"}, ["a cat"]),
    ({"captions": ["a cat", None, "", " ", 7, True, "one cat"]}, ["a cat", "one cat"]),
    ({"captions": [{"id": 3, "caption": "a cat"}, {"raw": "one cat", "tokens": ["one", "cat"]}]}, ["a cat", "one cat"]),
    ({"captions": {"en": "a cat", "score": 0.5}}, ["a cat"]),
    ({"captions": [], "caption": "a cat"}, ["a cat"]),
    ({"captions": [None], "caption": "a cat"}, ["a cat"]),
    ({"captions": 3, "caption": "a cat"}, ["a cat"]),
    ({"caption": ["a cat", "one cat"]}, ["a cat", "one cat"]),
    ({"caption": {"en": "a cat"}}, ["a cat"]),
    ({"caption": [["a cat"]]}, ["a cat"]),
])
def test_captions_of_several_types(record, captions):
    assert captions_of({"json": json.dumps(record).encode()}) == (captions, True)


@pytest.mark.parametrize("data, fault", [
    (b'{"caption": 7}', 'its "caption" is a number, 7, where texts are expected'),
    (b'{"caption": NaN}', 'its "caption" is a number, nan'),
    (b'{"caption": true}', 'its "caption" is true or false, True'),
    (b'{"caption": null}', 'its "caption" is null'),
    (b'{"caption": [1, 2]}', 'its "caption" is a list without texts'),
    (b'{"captions": {"en": null}}', 'its "captions" is an object without texts'),
    (b'{"captions": [null, ""]}', 'its "captions" is a list without texts'),
    (b'["a cat"]', "its .json is a list"),
    (b'"a cat"', "its .json is a text, 'a cat'"),
    (b"[" * 200_000, "its .json is damaged"),
    (b'{"captions": ' + b"[" * 500 + b"]" * 500 + b"}", 'its "captions" is a list without texts'),
    (b"\xff", "its .json is damaged"),
    (b"{}", ""),
])
def test_what_is_no_caption_is_named_by_its_type(data, fault):
    with pytest.raises(Unusable) as error:
        captions_of({"json": data})
    assert str(error.value).startswith("it has no caption" + (": " if fault else "") + fault)


def test_a_class_alone_is_the_caption_of_its_number():
    assert captions_of({"cls": b"207\n", "json": b'{"width": 3}'})[0] == ["class 207"]
    assert captions_of({"cls": b"207", "txt": b"a cat"})[0] == ["a cat"]
    for data in (b"cat", b"", b"-1", b"9" * 5000, b"\xff"):
        with pytest.raises(Unusable, match="it has no caption: its .cls is "):
            captions_of({"cls": data})
    with pytest.raises(Unusable, match="its .txt is not text in UTF-8"):
        captions_of({"txt": "é".encode("latin-1")})


def test_mirror_is_read_beside_a_text():
    assert captions_of({"txt": b"left", "json": b'{"mirror": false}'}) == (["left"], False)
    assert captions_of({"txt": b"left", "json": b"damaged"}) == (["left"], True)


# ---------------------------------------------------------------------------------------------------------------
# Image files


def turned(orientation):
    """A picture whose EXIF says how to turn it, and its file as PNG, JPEG, WebP."""
    picture = Image.new("RGB", (32, 16), RED)
    picture.paste(GREEN, (0, 0, 8, 8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    exact = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}}
    return picture, [file_of(picture, kind, exif=exif, **how) for kind, how in exact.items()]


@pytest.mark.parametrize("orientation", [*range(10), 70])
def test_images_are_turned_as_their_exif_says(orientation):
    picture, files = turned(orientation)
    exif = picture.getexif()
    exif[0x0112] = orientation
    expected = np.asarray(ImageOps.exif_transpose(picture)).astype(int)
    for data in files:
        found = np.asarray(decode_image({"png": data})).astype(int)
        assert found.shape == expected.shape and np.abs(found - expected).max() < 8


def large_text(kind, count=1):
    info = PngImagePlugin.PngInfo()
    for i in range(count):
        if kind == "iTXt":
            info.add_itxt(f"prompt {i}", "x" * 3_000_000, zip=True)
        else:
            info.add_text(f"prompt {i}", "x" * (900_000 if count > 1 else 3_000_000), zip=kind == "zTXt")
    return info


@pytest.mark.parametrize("kind, count", [("tEXt", 1), ("zTXt", 1), ("iTXt", 1), ("zTXt", 100), ("tEXt", 30)])
def test_large_texts_do_not_cost_a_png(kind, count):
    picture = Image.effect_noise((20, 10), 90).convert("RGBA")
    picture.putalpha(128)
    exif = Image.Exif()
    exif[0x0112] = 6
    expected = decode_image({"png": file_of(picture, exif=exif)})
    assert expected.size == (10, 20)
    found = decode_image({"png": file_of(picture, exif=exif, pnginfo=large_text(kind, count))})
    assert np.array_equal(np.asarray(found), np.asarray(expected))


def metadata_of(data):
    """Where a PNG or JPEG has chunks that pixels do not depend on: (start, end) of their contents."""
    spans, at = [], 8 if data.startswith(b"\x89PNG") else 2
    while at < len(data) and data[at:at + 2] != b"\xff\xda":
        if data.startswith(b"\x89PNG"):
            start, end, following = at + 8, at + 8 + int.from_bytes(data[at:at + 4]), 4
            beside = data[at + 4:at + 5].islower()
        else:
            start, end, following = at + 4, at + 2 + int.from_bytes(data[at + 2:at + 4]), 0
            beside = data[at + 1] == 0xFE or 0xE1 <= data[at + 1] < 0xEE
        spans += [(start, end)] if beside else []
        at = end + following
    return spans


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "MPO"])
@pytest.mark.filterwarnings("ignore:Metadata Warning")  # of Pillow, as the file is written
def test_damaged_metadata_do_not_cost_an_image(kind):
    rng, picture = np.random.default_rng(0), Image.effect_noise((40, 40), 90).convert("RGB")
    exif, info = Image.Exif(), PngImagePlugin.PngInfo()
    exif[0x0112], exif[0x010F], exif[0x011A] = 1, "maker", (72, 1)
    info.add_text("a", "b" * 100, zip=True)
    beside = {"pnginfo": info} if kind == "PNG" else {}
    beside |= {"save_all": True, "append_images": [picture]} if kind == "MPO" else {}
    whole = file_of(picture, kind, exif=exif, dpi=(72, 72), **beside)
    expected = np.sort(np.asarray(decode_image({"png": whole})).reshape(-1))  # whichever way round
    for _ in range(300):
        data, (start, end) = bytearray(whole), rng.permutation(metadata_of(whole))[0]
        for place in rng.integers(start, end, 5):
            data[place] = rng.integers(256)
        if kind == "PNG" and rng.random() < 0.7:
            data[end:end + 4] = zlib.crc32(data[start - 4:end]).to_bytes(4)
        assert np.array_equal(np.sort(np.asarray(decode_image({"png": bytes(data)})).reshape(-1)), expected)


@pytest.mark.parametrize("colours", [{}, {"keep_rgb": True}, {"progressive": True}])
def test_pixels_of_a_jpeg_do_not_depend_on_what_is_left_out(colours):
    """Its segment APP14, which says how colours are coded, stays."""
    picture = Image.effect_noise((40, 40), 90).convert("RGB")
    picture.paste(RED, (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x010F] = "maker"
    data = file_of(picture, "JPEG", exif=exif, comment=b"a comment", icc_profile=b"profile" * 20_000, **colours)
    alone = pixels_alone(data)
    assert not any(text in alone for text in (b"maker", b"a comment", b"profile")) and len(alone) < len(data)
    assert np.array_equal(np.asarray(Image.open(io.BytesIO(alone))), np.asarray(Image.open(io.BytesIO(data))))
    assert pixels_alone(alone) == alone


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_damaged_pixels_are_unusable_still(kind):
    whole = file_of(Image.effect_noise((64, 64), 90), kind)
    for data in (whole[:len(whole) // 2], whole[:30], whole[:9], whole[:3], b"", whole[:2] + b"\xff" * 50):
        with pytest.raises(Unusable, match="it cannot be decoded"):
            decode_image({"png": data})


# ---------------------------------------------------------------------------------------------------------------
# Images beside arrays


@pytest.mark.parametrize("name, shape", [
    ("npy", (512,)), ("npy", (77, 768)), ("npy", (1, 77, 768)), ("npy", ()), ("npy", (1, 2, 77, 768)),
    ("clip.npy", (512,)), ("depth.npy", (1, 12, 12)), ("normals.npy", (3, 12, 12)), ("a.npy", (4, 2, 2)),
])
def test_images_with_an_embedding_beside_them_are_images(tmp_path, name, shape):
    write_shard(tmp_path / "0.tar", [("a", {"jpg": png(GREEN), name: npy(np.ones(shape)), "txt": b"green"})] * 2)
    assert first_example([tmp_path / "0.tar"]) == (False, (3, 12, 12))
    assert read(tmp_path) == [("green", GREEN, "")] * 2


def test_of_images_and_latents_in_one_shard_the_size_asked_for_decides(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"jpg": png(GREEN), "npy": npy(np.ones((4, 2, 2))), "txt": b"green"})] * 2)
    assert first_example([tmp_path / "0.tar"]) == (True, (4, 2, 2))
    latents = Shards(str(tmp_path), "all", 4, 2, 2)
    assert latents.latent and torch.equal(latents[1][0], torch.ones(4, 2, 2))
    assert read(tmp_path) == [("green", GREEN, "")] * 2


@pytest.mark.parametrize("data, fault", [
    (npy(np.ones(512)), "it holds 512 numbers, but a latent has three sizes, CxHxW"),
    (npy(np.ones(())), "it holds 1 numbers, but"),
    (npy(np.ones((4, 2, 2), complex)), "it is not an array .its numbers are complex128"),
    (npy(np.full((4, 2, 2), np.inf)), "it holds 4x2x2 numbers, not 4x2x2 finite ones"),
    (npy(np.ones((4, 2, 2)))[:90], "it is not an array"),
    (b"garbage", "it is not an array"),
])
def test_what_is_no_latent_is_told(data, fault):
    with pytest.raises(Unusable, match=fault):
        decode_latent({"npy": data})


def test_latents_of_all_kinds_of_numbers_are_read():
    for kind in ("<f2", ">f4", "<f8", ">i2", "u1", "<u2"):
        latent = decode_latent({"npy": npy(np.ones((4, 2, 3), kind))}, (4, 2, 3))
        assert latent.dtype == torch.float32 and (latent == 1).all()


def test_a_set_of_embeddings_alone_is_told(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", {"npy": npy(np.ones(512)), "txt": b"x"})] * 3)
    with pytest.raises(ValueError, match="no example at the beginning of .* can be decoded: it holds 512 numbers"):
        read(tmp_path)
