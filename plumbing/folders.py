"""A folder of captioned images: which files are read, which caption is whose, and which of them are held out.

Captions stand in NAME.txt beside NAME.png, or in a metadata.jsonl or .csv of Hugging Face's kind, which is of the
images of its folder and of those below it; names may be spelled in several ways there (see tidy).
"""

import csv
import hashlib
import io
import json
import os
import posixpath
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

from PIL import Image

from plumbing.shards import IMAGES

METADATA = ("metadata.jsonl", "metadata.csv")  # where a folder has both, the first is read
READ = tuple(f".{suffix}" for suffix in (*IMAGES, "npy"))
OTHER_IMAGES = (".heic", ".heif", ".jxl", ".svg", ".psd",  # which Pillow does not know
                ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
COPIES = ("__MACOSX", "@eaDir")  # folders of thumbnails and of attributes, which systems leave beside images
LATIN_1 = {0xDC00 + byte: byte for byte in range(128, 256)}  # how Python holds bytes that are not UTF-8
UNNAMED = "more columns than there are names (quote a text that holds commas)"


def hashed(text):
    """A number in [0, 1) that is a function of the text alone."""
    data = text.encode("utf-8", "surrogateescape")  # names of files may be other bytes than UTF-8
    return int(hashlib.sha256(data).hexdigest()[:8], 16) / 16**8


def printable(text):
    """A path or name as text that can be printed: bytes of names that are not UTF-8 become backslashes and digits."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def stop(error):
    raise error


def files_below(folder):
    """{name: path} of the files in a folder and its subfolders, names by "/" and in order; and a Counter of what is
    left out. Hidden files and folders are no data: .ipynb_checkpoints, for one, holds copies. Links are followed to
    files, not to folders, which could lead round in circles."""
    files, left_out = {}, Counter()
    for place, folders, names in os.walk(folder, onerror=stop):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        left_out["links to folders"] += len(links)
        folders[:] = [name for name in folders if not name.startswith(".") and name not in COPIES]
        for name in names:
            path = Path(place, name)
            if name.startswith("."):
                continue
            if path.is_file():
                files[path.relative_to(folder).as_posix()] = path
            elif path.suffix.lower() in READ:
                left_out["links to nothing, pipes and the like"] += 1
    return dict(sorted(files.items())), left_out


def unread_formats(files):
    """A Counter {".heic files": 2} of images in formats that are not read."""
    Image.init()  # which is when Pillow knows all formats
    formats = {*Image.EXTENSION, *OTHER_IMAGES} - set(READ)
    suffixes = [path.suffix for path in files.values()]
    return Counter(f"{printable(suffix)} files" for suffix in suffixes if suffix.lower() in formats)


def tidy(name):
    """A name in one spelling: slashes for backslashes, no "./", the suffix in small letters, accents composed, which
    macOS takes apart, and as characters what old systems wrote in Latin-1."""
    path = posixpath.normpath(name.strip().replace("\\", "/").translate(LATIN_1))
    stem, suffix = posixpath.splitext(path)
    return unicodedata.normalize("NFC", stem + suffix.lower())


def finder(names):
    """A function that gives for a name the one of `names` that is meant: that very name, or the only one that differs
    in its spelling alone; None where there is none or there are several."""
    exact, by_spelling = set(names), defaultdict(list)
    for name in names:
        by_spelling[tidy(name)].append(name)

    def find(name):
        found = [name] if name in exact else by_spelling.get(tidy(name), [])
        return found[0] if len(found) == 1 else None

    return find


def read_text(path):
    """The text of a file in UTF-8, without the mark that some editors put first. Raises ValueError for other files."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} is not text in UTF-8 ({error}): convert it") from error


def rows_of(path):
    """The rows of a metadata.jsonl or .csv, in order: (file_name, text). Raises ValueError for other contents."""
    text, shown = read_text(path), printable(path)
    try:
        if path.suffix.lower() == ".csv":
            rows = list(csv.DictReader(io.StringIO(text), restkey=UNNAMED))
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]  # strings may hold other line ends
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{shown} needs a file_name and a text in every row: {error}") from error
    pairs = []
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {"no columns:": row}
        name, text = row.get("file_name"), row.get("text", ...) or ""
        if not isinstance(name, str) or not isinstance(text, str) or UNNAMED in row:
            columns = ", ".join(f"{column} {value!r:.40}" for column, value in row.items()) or "none"
            raise ValueError(f"{shown} needs a file_name and a text in every row; row {number} has {columns}")
        pairs.append((name, text.encode("utf-8", "replace").decode()))  # JSON can hold half a surrogate pair
    return pairs


def metadata_of(files):
    """{folder: path} of the metadata files, folders as in the names of files, "" for the outermost."""
    found = {}
    for wanted in reversed(METADATA):  # the first has the last word
        for name, path in files.items():
            folder, base = posixpath.split(name)
            if base.lower() == wanted:
                found[folder] = path
    return found


def image_meant(name, home, folder, find):
    """The image that a name in the metadata of a folder `home`, itself seen from `folder`, means; or None."""
    if os.path.isabs(name):
        return find(os.path.relpath(name, folder.resolve()))
    found = find(posixpath.join(home, name)) or find(posixpath.join(home, name.strip()))
    from_above = home and tidy(name).startswith(tidy(home) + "/")
    return found or (find(name) if from_above else None)


def read_metadata(folder, files, find):
    """{image: caption} by all metadata files, and the names in them that are no image's. Raises ValueError where an
    image has two captions."""
    captions, unknown = {}, []
    for home, path in metadata_of(files).items():
        for number, (name, text) in enumerate(rows_of(path), 1):
            image = image_meant(name, home, folder, find)
            if image in captions:
                raise ValueError(f"{printable(path)} has two captions of {printable(image)}, the second in row "
                                 f"{number}: leave one out")
            if image is None:
                unknown.append(name)
            else:
                captions[image] = text
    return captions, unknown


def read_sidecars(images, files):
    """{image: caption} of the images that have a text file beside them: NAME.txt, or NAME.png.txt."""
    find = finder([name for name, path in files.items() if path.suffix.lower() == ".txt"])
    captions = {}
    for image in images:
        text = find(posixpath.splitext(image)[0] + ".txt") or find(image + ".txt")
        if text:
            captions[image] = read_text(files[text])
    return captions


def read_captions(folder, files, images):
    """{image: caption} of the images that have one, and the names in metadata files that are no image's. Where metadata
    stand in a folder or above it, text files there are not read: they may be of something else."""
    captions, unknown = read_metadata(folder, files, finder(images))
    homes = metadata_of(files)
    covered = tuple(f"{home}/" for home in homes if home)
    others = [] if "" in homes else [image for image in images if not image.startswith(covered)]
    captions |= read_sidecars(others, files)
    return {image: captions[image].strip() for image in images if captions.get(image, "").strip()}, unknown


def twins(images, files):
    """Lists of images that belong together, in order of the first of each: equal files, and files whose names differ in
    the suffix alone, cat.jpg and cat.webp, which share a caption."""
    sizes = {image: files[image].stat().st_size for image in images}
    of_size, parent = Counter(sizes.values()), {}

    def root(item):
        while parent.setdefault(item, item) != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for image in images:
        parent[root(("stem", posixpath.splitext(image)[0]))] = root(image)
        if of_size[sizes[image]] > 1:  # others need not be read
            with open(files[image], "rb") as file:
                parent[root(("content", hashlib.file_digest(file, "sha256").digest()))] = root(image)
    groups = defaultdict(list)
    for image in images:
        groups[root(image)].append(image)
    return list(groups.values())


def choose_held_out(groups, fraction):
    """The set of images to validate with, about that fraction and at least one, the first of groups of twins. Groups
    stay whole, unless there is but one."""
    total = sum(map(len, groups))
    count = min(max(1, round(fraction * total)), total - 1)
    if len(groups) == 1:
        return set(groups[0][:count])
    chosen = []
    for group in groups:
        if len(chosen) + len(group) <= count:
            chosen += group
    return set(chosen or min(groups, key=len))
