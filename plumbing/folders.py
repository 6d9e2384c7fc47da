"""A folder of captioned images: which files are read, which caption belongs to which image, and which are held out.

Captions stand in NAME.txt beside NAME.png, or in a metadata.jsonl or .csv as Hugging Face has them, for the images in
its folder and below. A name in such a file may be spelled differently from the image's own (see tidy).
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
OTHER_IMAGES = (".heic", ".heif", ".jxl", ".svg", ".psd",  # Pillow cannot read these
                ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2")
COPIES = ("__MACOSX", "@eaDir")  # folders of thumbnails and attributes that operating systems add
LATIN_1 = {0xDC00 + byte: byte for byte in range(128, 256)}  # from Python's stand-ins for bytes that are not UTF-8
UNNAMED = "more columns than there are names (quote a text that holds commas)"


def hashed(text):
    """A number in [0, 1) that depends on the text alone."""
    data = text.encode("utf-8", "surrogateescape")  # names of files may be other bytes than UTF-8
    return int(hashlib.sha256(data).hexdigest()[:8], 16) / 16**8


def printable(text):
    """A path or name as printable text: bytes that are not UTF-8 become backslashes and digits."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def stop(error):
    raise error


def files_below(folder):
    """The files in a folder and its subfolders, {name: path} in order, names with "/"; and a Counter of those left out.

    Hidden files and folders are skipped and not counted: .ipynb_checkpoints, for one, holds copies. Links to files are
    followed. Links to folders are left out, since they could lead in circles.
    """
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
    """A Counter of image files in formats that are not read, such as {".heic files": 2}."""
    Image.init()  # only now does Pillow know all formats
    formats = {*Image.EXTENSION, *OTHER_IMAGES} - set(READ)
    suffixes = [path.suffix for path in files.values()]
    return Counter(f"{printable(suffix)} files" for suffix in suffixes if suffix.lower() in formats)


def tidy(name):
    """A name in one spelling: slashes for backslashes, no "./", the suffix in lower case.

    Accents that macOS has decomposed are composed, and bytes that old systems wrote in Latin-1 become characters.
    """
    path = posixpath.normpath(name.strip().replace("\\", "/").translate(LATIN_1))
    stem, suffix = posixpath.splitext(path)
    return unicodedata.normalize("NFC", stem + suffix.lower())


def finder(names):
    """A function that returns the one of `names` that a name means, or None.

    A name means the equal one of `names`; if there is none, the only one that tidy() spells the same.
    """
    exact, by_spelling = set(names), defaultdict(list)
    for name in names:
        by_spelling[tidy(name)].append(name)

    def find(name):
        found = [name] if name in exact else by_spelling.get(tidy(name), [])
        return found[0] if len(found) == 1 else None

    return find


def read_text(path):
    """The text of a file in UTF-8, without a byte-order mark. Raises ValueError for another encoding."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{printable(path)} is not text in UTF-8 ({error}): convert it") from error


def rows_of(path):
    """The rows (file_name, text) of a metadata.jsonl or .csv, in order. Raises ValueError for other contents."""
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
    """The metadata files, {folder: path}; folders are named as in the names of files, the outermost ""."""
    found = {}
    for wanted in reversed(METADATA):  # so that the first overwrites the second
        for name, path in files.items():
            folder, base = posixpath.split(name)
            if base.lower() == wanted:
                found[folder] = path
    return found


def image_meant(name, home, folder, find):
    """The image that a name in a metadata file refers to, or None; home: that file's folder, relative to `folder`."""
    if os.path.isabs(name):
        return find(os.path.relpath(name, folder.resolve()))
    found = find(posixpath.join(home, name)) or find(posixpath.join(home, name.strip()))
    from_above = home and tidy(name).startswith(tidy(home) + "/")
    return found or (find(name) if from_above else None)


def read_metadata(folder, files, find):
    """{image: caption} from all metadata files, and the names in them that match no image.

    Raises ValueError where an image has two captions.
    """
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
    """{image: caption} of the images with a text file beside them, NAME.txt or NAME.png.txt."""
    find = finder([name for name, path in files.items() if path.suffix.lower() == ".txt"])
    captions = {}
    for image in images:
        text = find(posixpath.splitext(image)[0] + ".txt") or find(image + ".txt")
        if text:
            captions[image] = read_text(files[text])
    return captions


def read_captions(folder, files, images):
    """{image: caption} of the images that have one, and the names in metadata files that match no image.

    In folders with metadata, and below them, text files are not read: they may be about something else.
    """
    captions, unknown = read_metadata(folder, files, finder(images))
    homes = metadata_of(files)
    covered = tuple(f"{home}/" for home in homes if home)
    others = [] if "" in homes else [image for image in images if not image.startswith(covered)]
    captions |= read_sidecars(others, files)
    return {image: captions[image].strip() for image in images if captions.get(image, "").strip()}, unknown


def twins(images, files):
    """Lists of images that belong together, in the order of the first of each.

    Images belong together if their files are equal, or if their names differ in the suffix alone: cat.jpg and cat.webp
    share a caption.
    """
    sizes = {image: files[image].stat().st_size for image in images}
    of_size, parent = Counter(sizes.values()), {}

    def root(item):
        while parent.setdefault(item, item) != item:
            parent[item] = parent[parent[item]]
            item = parent[item]
        return item

    for image in images:
        parent[root(("stem", posixpath.splitext(image)[0]))] = root(image)
        if of_size[sizes[image]] > 1:  # files of unique size equal no other
            with open(files[image], "rb") as file:
                parent[root(("content", hashlib.file_digest(file, "sha256").digest()))] = root(image)
    groups = defaultdict(list)
    for image in images:
        groups[root(image)].append(image)
    return list(groups.values())


def choose_held_out(groups, fraction):
    """The set of images to validate with: about `fraction` of all, at least one, from the first groups of twins.

    Groups stay whole, unless there is only one.
    """
    total = sum(map(len, groups))
    count = min(max(1, round(fraction * total)), total - 1)
    if len(groups) == 1:
        return set(groups[0][:count])
    chosen = []
    for group in groups:
        if len(chosen) + len(group) <= count:
            chosen += group
    return set(chosen or min(groups, key=len))
