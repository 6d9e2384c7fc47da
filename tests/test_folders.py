"""Shards from folders of captioned images: which files, whose captions, and which of them are held out."""
import json
import os
import re
from pathlib import Path

import pytest
from helpers import command, examples_of, fails, png

from plumbing.images import to_uint8
from plumbing.shards import Shards, write_shards


def make_folder(folder, count):
    """Images whose first pixel is their number, in two folders."""
    (folder / "deep.er").mkdir(parents=True)
    names = [f"{'deep.er/' if i % 2 else ''}image.{i}.png" for i in range(count)]
    for i, name in enumerate(names):
        (folder / name).write_bytes(png((i, 0, 0)))
    return names


@pytest.mark.parametrize("layout", ["txt", "jsonl", "csv"])
def test_a_folder_becomes_shards(tmp_path, layout):
    names = make_folder(tmp_path / "mine", 40)
    for i, name in enumerate(names):
        if layout == "txt":
            (tmp_path / "mine" / name).with_suffix(".txt").write_text(f'number {i}, "né"\n')
    rows = [{"file_name": name, "text": f'number {i}, "né"', "other": 1} for i, name in enumerate(names)]
    if layout == "jsonl":
        (tmp_path / "mine" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    if layout == "csv":
        quoted = ['"' + row["text"].replace('"', '""') + '"' for row in rows]
        (tmp_path / "mine" / "metadata.csv").write_text(
            "file_name,text\n" + "".join(f"{row['file_name']},{text}\n" for row, text in zip(rows, quoted)))
    printed = command("folder", tmp_path / "mine", f"--out={tmp_path / 'shards'}", "--val=0.1")
    assert "train: 36 images" in printed and "val: 4 images" in printed
    both = examples_of(tmp_path / "shards", "train") | examples_of(tmp_path / "shards", "val")
    assert len(both) == 40
    for i in range(40):
        assert to_uint8(both[f'number {i}, "né"'])[0, 0, 0] == i


def test_images_without_captions_are_left_out_and_said(tmp_path):
    names = make_folder(tmp_path / "mine", 10)
    for name in names[:7]:
        (tmp_path / "mine" / name).with_suffix(".txt").write_text("an image")
    (tmp_path / "mine" / names[7]).with_suffix(".txt").write_text(" \n")
    printed = command("folder", tmp_path / "mine", f"--out={tmp_path / 'o'}")
    assert "3 images without a caption were left out" in printed


def test_a_smaller_folder_leaves_no_shards_of_the_larger(tmp_path):
    for name, count in (("large", 30), ("small", 8)):
        for file in make_folder(tmp_path / name, count):
            (tmp_path / name / file).with_suffix(".txt").write_text(f"{name} {file}")
    large = [(f"{i}", {"png": png((i, 0, 0)), "txt": f"large {i}".encode()}) for i in range(30)]
    write_shards(tmp_path / "shards" / "train", large, per_shard=10)
    command("folder", tmp_path / "small", f"--out={tmp_path / 'shards'}")
    assert len(Shards(str(tmp_path / "shards"), "train", 3, 8, 8)) == 7


@pytest.mark.parametrize("text, images, captions", [
    ('{"file_name": "0.png", "text": "a\u2028b"}\n{"file_name": "1.png", "text": "c", "tags": [1]}\n', 2, ["a\u2028b", "c"]),
    ('\ufeff{"file_name": "0.png", "text": "a"}\n{"file_name": "1.png", "text": "b"}', 2, ["a", "b"]),
    ('\ufefffile_name,text\r\n0.png,"a\nb"\r\n\r\n1.png,c\r\n', 2, ["a\nb", "c"]),
    (["\ufeffa cat", "a dog\r\n"], 2, ["a cat", "a dog"]),
])
def test_line_ends_and_marks_of_editors_are_no_part_of_captions(tmp_path, text, images, captions):
    (tmp_path / "mine").mkdir()
    for i in range(images):
        (tmp_path / "mine" / f"{i}.png").write_bytes(png((i, 0, 0)))
    files = {f"{i}.txt": line for i, line in enumerate(text)} if isinstance(text, list) else {
        "metadata.jsonl" if "{" in text else "metadata.csv": text}
    for name, content in files.items():
        (tmp_path / "mine" / name).write_bytes(content.encode())
    command("folder", tmp_path / "mine", f"--out={tmp_path / 'o'}")
    found = [caption for split in ("train", "val") for _, caption in Shards(str(tmp_path / "o"), split, 3, 8, 8)]
    assert sorted(found) == captions


@pytest.mark.parametrize("name, text, part", [
    ("metadata.jsonl", '{"image": "0.png", "caption": "a cat"}', "row 1 has image '0.png', caption 'a cat'"),
    ("metadata.csv", "image,caption\n0.png,a cat\n", "row 1 has image '0.png', caption 'a cat'"),
    ("metadata.csv", "file_name,text\n1.png,a\n0.png,a red, round apple\n", "row 2 has .*quote a text that holds commas"),
    ("metadata.jsonl", "[1, 2]", "row 1 has no columns: .1, 2."),
    ("metadata.jsonl", "{}", "row 1 has none"),
    ("metadata.jsonl", '{"file_name"', "needs a file_name and a text in every row: Expecting"),
    ("metadata.csv", "file_name,text\n0.png,a\n0.png,b\n", "two captions of 0.png, the second in row 2"),
    ("metadata.jsonl", b"\xff\xfe{", "metadata.jsonl is not text in UTF-8"),
    ("0.txt", "caf\u00e9".encode("latin-1"), "0.txt is not text in UTF-8"),
])
def test_captions_that_would_be_misread_are_named(tmp_path, name, text, part):
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png((i, 0, 0)))
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert re.search(part, fails("data.py", "folder", str(tmp_path), f"--out={tmp_path / 'o'}"))


def test_what_a_folder_holds_besides_is_said(tmp_path):
    for name in ("0.png", "1.png", "._0.png", "x.bmp", "y.BMP"):
        (tmp_path / name).write_bytes(png())
        (tmp_path / name).with_suffix(".txt").write_text("a cat")
    printed = command("folder", tmp_path, f"--out={tmp_path / 'o'}")
    assert "train: 1 images" in printed and "val: 1 images" in printed and "1 .bmp files were left out" in printed
    rows = [{"file_name": name, "text": "a cat"} for name in ("0.png", "1.png", "deep/0.png")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert "1 rows that name no image were left out" in command("folder", tmp_path, f"--out={tmp_path / 'o'}")


@pytest.mark.parametrize("count, arguments, held_out", [
    (2, [], 1), (60, [], 6), (700, [], 50), (60, ["--val=0.02"], 1), (2, ["--val=0.9"], 1)])
def test_a_small_folder_holds_out_more_than_one_image(tmp_path, count, arguments, held_out):
    (tmp_path / "mine").mkdir()
    for i in range(count):
        (tmp_path / "mine" / f"{i}.png").write_bytes(b"not looked at")
    rows = [{"file_name": f"{i}.png", "text": "a cat"} for i in range(count)]
    (tmp_path / "mine" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    printed = command("folder", tmp_path / "mine", f"--out={tmp_path / 'o'}", *arguments)
    assert f"train: {count - held_out} images" in printed and f"val: {held_out} images" in printed


def test_folders_that_cannot_serve_are_named(tmp_path):
    assert "there is no folder" in fails("data.py", "folder", str(tmp_path / "none"))
    make_folder(tmp_path / "mine", 2)
    assert "holds no captioned image" in fails("data.py", "folder", str(tmp_path / "mine"))
    (tmp_path / "mine" / "metadata.jsonl").write_text('{"file_name": "a.png", "text": ["a", "b"]}')
    assert "needs a file_name and a text in every row" in fails("data.py", "folder", str(tmp_path / "mine"))
    make_folder(tmp_path / "one", 1)
    (tmp_path / "one" / "image.0.txt").write_text("a cat")
    assert "holds one captioned image: it takes two" in fails("data.py", "folder", str(tmp_path / "one"))
    (tmp_path / "mine" / "metadata.jsonl").write_text('{"file_name": "a.png"}')
    assert "needs a file_name and a text in every row" in fails("data.py", "folder", str(tmp_path / "mine"))


def make_files(folder, files):
    """Writes files, {name: bytes, text, or the number of a picture}; a name of bytes is written as it is."""
    for name, content in files.items():
        path = Path(folder, os.fsdecode(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        content = png((content, 0, 0)) if isinstance(content, int) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def shards_of(folder, *arguments):
    """{caption: number of its picture} by split of the shards that are made of a folder, and what was printed."""
    out = Path(str(folder) + "_out")
    printed = command("folder", folder, f"--out={out}", *arguments)
    return [{caption: int(to_uint8(image)[0, 0, 0]) for caption, image in examples_of(out, split).items()}
            for split in ("train", "val")] + [printed]


def all_of(folder):
    train, val, printed = shards_of(folder)
    return train | val, printed


@pytest.mark.parametrize("hidden", [".ipynb_checkpoints", ".git/deep", "__MACOSX", "sub/@eaDir", "sub/.thumbnails"])
def test_hidden_folders_are_no_data(tmp_path, hidden):
    make_files(tmp_path / ".a" / "mine", {
        "0.png": 0, "0.txt": "a", "sub/1.png": 1, "sub/1.txt": "b", f"{hidden}/2.png": 2, f"{hidden}/2.txt": "c",
        f"{hidden}/metadata.csv": "file_name,text\n2.png,d\n"})
    found, printed = all_of(tmp_path / ".a" / "mine")  # what stands above the folder is not looked at
    assert found == {"a": 0, "b": 1} and "left out" not in printed


@pytest.mark.parametrize("copy", ["copy of {}.png", "sub/{}.png", "{}.webp", "{}.JPG", "{}.b.png"])
def test_twins_of_a_picture_are_on_one_side(tmp_path, copy):
    """Equal files, and files of one name in several formats: 40 pictures, each twice."""
    mine = tmp_path / "mine"
    for i in range(40):
        other = copy.format(i)
        make_files(mine, {f"{i}.png": i, f"{i}.txt": f"one {i}", other: i})
        if other.endswith(".png"):
            make_files(mine, {other.replace(".png", ".txt"): f"two {i}"})
        else:  # not equal to the PNG
            (mine / other).write_bytes((mine / other).read_bytes() + b"\0")
    command("folder", mine, f"--out={tmp_path / 'o'}", "--val=0.3")
    sides = []
    for split in "train", "val":
        shards = Shards(str(tmp_path / "o"), split, 3, 8, 8)
        captions = [shards.captions([i]) for i in range(len(shards))]
        sides.append({next(caption).split()[1] for caption in captions})
        assert len(shards) == 2 * len(sides[-1])
    assert len(sides[1]) == 12 and not sides[0] & sides[1]


def test_where_all_are_copies_it_says_so_and_few_twins_are_not_divided(tmp_path):
    make_files(tmp_path / "one", {"0.png": 7, "0.txt": "a", "1.png": 7, "1.txt": "b"})
    assert "all images are copies of one" in all_of(tmp_path / "one")[1]
    numbers = [0] * 10 + [1] * 10 + [2] * 2
    make_files(tmp_path / "two", {f"{i}.png": number for i, number in enumerate(numbers)})
    make_files(tmp_path / "two", {f"{i}.txt": f"caption {i}" for i in range(len(numbers))})
    train, val, printed = shards_of(tmp_path / "two", "--val=0.01")
    assert sorted(val) == ["caption 20", "caption 21"] and len(train) == 20 and "all images" not in printed


def test_entries_that_are_no_files_are_no_images(tmp_path):
    mine = tmp_path / "mine"
    make_files(mine, {"0.png": 0, "0.txt": "a", "1.png": 1, "1.txt": "b", "album.jpg/2.png": 2, "album.jpg/2.txt": "c",
                      "3.png": 3, "3.txt/note": "", "metadata.csv/note": ""})
    (mine / "4.png").symlink_to(tmp_path / "nowhere.png")
    (mine / "4.txt").write_text("d")
    (mine / "5.png").symlink_to(mine / "0.png")
    (mine / "5.txt").write_text("e")
    os.mkfifo(mine / "6.png")
    (mine / "round").symlink_to(mine)
    found, printed = all_of(mine)
    assert found == {"a": 0, "b": 1, "c": 2, "e": 0}
    for line in ("1 images without a caption", "2 links to nothing, pipes and the like", "1 links to folders"):
        assert f"{line} were left out" in printed


NFC, NFD = "caf\u00e9.png", "cafe\u0301.png"


@pytest.mark.parametrize("file, named", [
    (NFD, NFC), (NFC, NFD), (b"caf\xe9.png", NFC), (b"caf\xe9.png", os.fsdecode(b"caf\xe9.png")), ("x.png", "./x.png"),
    ("sub/x.png", "sub\\x.png"), ("sub/x.png", ".\\sub\\x.png"), ("sub/x.png", "sub//../sub/x.png"), ("x.PNG", "x.png"),
    ("x.png", "x.PNG"), ("x.png", " x.png "), ("a\\b.png", "a\\b.png"), ("sub/caf\u00e9/x.png", "sub/cafe\u0301/x.png"),
    ("sub/x.png", "{folder}/sub/x.png")])
@pytest.mark.parametrize("layout", ["jsonl", "csv"])
def test_names_in_metadata_may_be_spelled_in_other_ways(tmp_path, file, named, layout):
    named = named.replace("{folder}", str(tmp_path / "mine"))
    if layout == "jsonl":
        rows = [{"file_name": named, "text": "a"}, {"file_name": "1.png", "text": "b"}]
        text = "\n".join(map(json.dumps, rows))
    elif named.isprintable():
        text = f"file_name,text\n{named},a\n1.png,b\n"
    else:
        return  # a .csv is in UTF-8
    make_files(tmp_path / "mine", {file: 0, "1.png": 1, f"metadata.{layout}": text})
    found, printed = all_of(tmp_path / "mine")
    assert found == {"a": 0, "b": 1} and "left out" not in printed


def test_the_very_name_goes_before_other_spellings(tmp_path):
    make_files(tmp_path / "mine", {NFC: 0, NFD: 1, "x.png": 2, "x.PNG": 3, "metadata.jsonl": "".join(
        json.dumps({"file_name": name, "text": name}) + "\n" for name in (NFC, NFD, "x.png", "x.PNG", "x.Png"))})
    found, printed = all_of(tmp_path / "mine")
    assert found == {NFC: 0, NFD: 1, "x.png": 2, "x.PNG": 3}
    assert "1 rows that name no image were left out; the first of these rows names 'x.Png'" in printed
    make_files(tmp_path / "two", {"x.png": 2, "metadata.csv": "file_name,text\nx.png,a\n./x.png,b\n"})
    assert "two captions of x.png, the second in row 2" in fails("data.py", "folder", str(tmp_path / "two"))


@pytest.mark.parametrize("image, text", [
    ("x.png", "x.TXT"), ("X.PNG", "X.txt"), (NFD, NFC.replace("png", "txt")), ("x.png", "x.png.txt"),
    (b"caf\xe9.png", b"caf\xe9.txt"), (b"caf\xe9.png", NFC.replace("png", "txt")), (b"\xff/x.png", b"\xff/x.Txt")])
def test_text_files_beside_images_may_be_spelled_in_other_ways(tmp_path, image, text):
    make_files(tmp_path / "mine", {image: 0, text: "a", "1.png": 1, "1.txt": "b"})
    assert all_of(tmp_path / "mine")[0] == {"a": 0, "b": 1}


def test_a_folder_whose_own_name_is_not_utf_8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = os.fsdecode(b"caf\xe9")
    make_files(folder, {"0.png": 0, "0.txt": "a", "1.png": 1, "1.txt": "b"})
    assert "wrote out/data/caf\\udce9" in command("folder", folder)
    make_files("none" + folder, {"0.png": 0})
    assert "holds no captioned image" in fails("data.py", "folder", "none" + folder)


def test_metadata_in_subfolders(tmp_path):
    """Its names are relative to its folder, which is the outermost where there is none above; text files elsewhere."""
    make_files(tmp_path / "mine", {
        "train/0.png": 0, "train/1.png": 1, "train/deep/2.png": 2, "train/3.png": 3, "train/3.txt": "not read",
        "train/METADATA.csv": "file_name,text\n0.png,a\n./deep/2.png,c\ntrain/1.png,b\n9.png,x\n",
        "val/5.png": 5, "val/metadata.jsonl": '{"file_name": "5.png", "text": "f"}', "4.png": 4, "4.txt": "e",
        "9.png": 9})
    found, printed = all_of(tmp_path / "mine")
    assert found == {"a": 0, "b": 1, "c": 2, "e": 4, "f": 5}
    assert "2 images without a caption were left out; 1 rows that name no image were left out" in printed
    assert "the first of these rows names '9.png'" in printed and "its folders, such as train and val," in printed
    make_files(tmp_path / "mine", {"train/deep/metadata.csv": "file_name,text\n2.png,other\n"})
    assert "two captions of train/deep/2.png" in fails("data.py", "folder", str(tmp_path / "mine"))


@pytest.mark.parametrize("files, parts", [
    ({"0.heic": "", "0.txt": "a", "1.HEIC": ""}, ["1 .heic files were left out", "1 .HEIC files", "convert others"]),
    ({"0.svg": "", "0.tif": ""}, ["1 .svg files", "1 .tif files"]),
    ({"0.png": 0, "metadata.csv": "file_name,text\nC:\\x\\0.png,a\n"},
     ["1 rows that name no image", "'C:\\\\x\\\\0.png'"]),
    ({"0.png": 0, "0.txt": "a", "1.png": 1}, ["holds one captioned image; 1 images without a caption were left out"]),
    ({"notes.md": ""}, ["holds no captioned image: put the caption"])])
def test_a_folder_that_cannot_serve_says_what_is_in_it(tmp_path, files, parts):
    make_files(tmp_path, files)
    line = fails("data.py", "folder", str(tmp_path))
    assert all(part in line for part in parts), line


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    make_files(tmp_path / "mine", {"0.png": 0, "0.txt": "a", "1.png": 1, "1.txt": "b"})
    monkeypatch.chdir(tmp_path)
    make_files("~", {"0.png": 0})  # a folder of that very name goes first
    assert "holds no captioned image" in fails("data.py", "folder", "~")
    command("folder", "~/mine", "--out=~/shards")
    command("vocab", f"--data_dir={tmp_path / 'shards'}", "--out=~/mine.tiktoken")
    assert len(Shards(str(tmp_path / "shards"), "train", 3, 8, 8)) == 1 and (tmp_path / "mine.tiktoken").exists()
