"""The members of a shard as examples: which members belong together, their captions, their image or latent.

A member is named KEY.SUFFIX. KEY ends at the first dot of the file name: 0000.jpg, 0000.txt and 0000.mask.png are one
example. A name with further dots is an example of its own only where several such names each have a picture and a
text: photo.0.jpg, photo.0.txt, photo.1.jpg, photo.1.txt. If an example has several members of one kind, Shards reads
the one with the plainest suffix: 0000.png rather than 0000.mask.png, and 0000.input.png if there is no 0000.png.
"""

import io
import itertools
import json
import re
from collections import defaultdict

import numpy as np
import torch
from PIL import Image

from plumbing.decoding import decode

IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes of images in shards and folders; latents have npy
PICTURES = {*IMAGES, "npy"}
TEXTS = ("txt", "json", "cls")  # suffixes of captions
WRAPPED = ("caption", "text", "raw")  # keys of the text in captions that are objects, such as COCO's
TYPES = {bool: "true or false", int: "a number", float: "a number", list: "a list", dict: "an object", str: "a text"}


class Unusable(ValueError):
    """An example cannot be used; the message says why."""


# ---------------------------------------------------------------------------------------------------------------
# Names


def key_and_suffix(name):
    """Split a member's name at the first dot of its file name: "a/0.Mask.png" gives ("a/0", "mask.png").

    Returns None for a member of no example: a file without a suffix, and hidden files and folders, also the AppleDouble
    files (._0.jpg, __MACOSX/) that macOS packs beside each file.
    """
    *folders, file = name.split("/")
    stem, _, suffix = file.partition(".")
    hidden = any(folder.startswith(".") and folder.strip(".") for folder in folders)
    if hidden or "__MACOSX" in folders or not stem or not suffix:
        return None
    return "/".join([*folders, stem]), suffix.lower()


def last(suffix):
    """The part of a suffix after its last dot: "mask.png" -> "png"."""
    return suffix.rpartition(".")[2]


def complete_parts(suffixes):
    """The first parts of suffixes under which there are both a picture and a text; "" stands for plain suffixes.

    Beside a plain example, the text under a first part has to be a .txt, since a mask may have a .json of its own.
    """
    kinds = defaultdict(set)
    for suffix in suffixes:
        first, dot, _ = suffix.partition(".")
        kinds[first if dot else ""].add(last(suffix))
    plain = kinds[""] & PICTURES and kinds[""].intersection(TEXTS)
    texts = {"txt"} if plain else set(TEXTS)
    complete = {first for first, found in kinds.items() if first and found & PICTURES and found & texts}
    return complete | {""} if plain else complete


def are_several(suffixes):
    """Whether members of one key are several examples: several parts are complete, or the only one holds several."""
    parts = complete_parts(suffixes)
    if len(parts) != 1 or "" in parts:
        return len(parts) > 1
    part, = parts
    return are_several([below(suffix) for suffix in suffixes if suffix.startswith(f"{part}.")])


def below(suffix):
    """A suffix without its first part: "2.mask.png" -> "mask.png"."""
    return suffix.partition(".")[2]


def split_examples(key, members):
    """Yield the examples (key, members) in a run of adjacent members of one key; a member is (suffix, block)."""
    suffixes = [suffix for suffix, _ in members]
    if not are_several(suffixes):
        yield from split_repeats(key, members)
        return
    parts = complete_parts(suffixes)

    def part_of(member):
        first, dot, _ = member[0].partition(".")
        return first if dot and first in parts else ""

    for part, run in itertools.groupby(members, part_of):
        if part:
            yield from split_examples(f"{key}.{part}", [(below(suffix), block) for suffix, block in run])
        else:
            yield from split_repeats(key, list(run))


def split_repeats(key, members):
    """Split members of one key where a suffix repeats: two adjacent examples may share a key."""
    example, seen = [], set()
    for suffix, block in members:
        if suffix in seen:
            yield key, example
            example, seen = [], set()
        example.append((suffix, block))
        seen.add(suffix)
    yield key, example


def pick(members, *kinds):
    """The suffix of the member to read, among the members {suffix: bytes} of some kinds; None if there is none.

    A kind is the last part of a suffix, such as "png". The plainest suffix is chosen; among equally plain ones, one
    whose name has both a text and a picture; among these, the kind that comes first in `kinds`. Raises Unusable where
    several remain.
    """
    found = [suffix for suffix in members if last(suffix) in kinds]
    if not found:
        return None
    fewest = min(suffix.count(".") for suffix in found)
    found = [suffix for suffix in found if suffix.count(".") == fewest]
    pairs = complete_names(members)
    found = [suffix for suffix in found if suffix.rpartition(".")[0] in pairs] or found
    first = min(kinds.index(last(suffix)) for suffix in found)
    chosen, *others = [suffix for suffix in found if last(suffix) == kinds[first]]
    if others:
        names = f"KEY.{chosen} and KEY.{others[0]}" + ", among others" * (len(others) > 1)
        raise Unusable(f"it has {names}, and no KEY.{kinds[first]} that says which one to read")
    return chosen


def complete_names(members):
    """The suffixes, without their last parts, that have both a picture and a text."""
    pictures = {suffix.rpartition(".")[0] for suffix in members if last(suffix) in PICTURES}
    texts = {suffix.rpartition(".")[0] for suffix in members if last(suffix) in TEXTS}
    return pictures & texts


# ---------------------------------------------------------------------------------------------------------------
# Captions


def captions_of(members):
    """An example's captions, each a description of its image, and whether the image may be mirrored. Raises Unusable.

    They are those of the plainest text that has any, and a .cls comes last. A .json may forbid mirroring.
    """
    sources, faults = [], []
    for kind in TEXTS:
        try:
            if suffix := pick(members, kind):
                sources.append(suffix)
        except Unusable as error:
            faults.append(error)
    sources.sort(key=lambda suffix: (last(suffix) == "cls", suffix.count(".")))  # texts before class numbers
    captions, symmetric = [], True
    for suffix in sources:
        try:
            record = read_record(members[suffix], last(suffix))
            symmetric = symmetric and record.get("mirror") is not False
            captions = captions or captions_in(record)
        except Unusable as error:
            faults.append(error)
    if not captions:
        raise faults[0] if faults else Unusable("it has no caption")
    return captions, symmetric


def read_record(data, kind):
    """The contents of a .txt, .json or .cls as a dict like a .json's. Raises Unusable."""
    if kind == "json":
        try:
            record = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise Unusable(f"it has no caption: its .json is damaged ({error})") from error
        if not isinstance(record, dict):
            raise Unusable(f'it has no caption: its .json is {described(record)}, where {{"caption": ...}} is expected')
        return record
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Unusable(f"it has no caption: its .{kind} is not text in UTF-8") from error
    if kind == "txt":
        return {"caption": text}
    if not re.fullmatch(r"[0-9]{1,9}", text.strip()):
        raise Unusable(f"it has no caption: its .cls is {text.strip()!r:.40}, where the number of a class is expected")
    return {"caption": f"class {int(text)}"}


def captions_in(record):
    """The captions in a record's "captions", or else in its "caption". Raises Unusable where it has none."""
    fault = "it has no caption"
    for name in "caption", "captions":  # the fault of the second is reported
        if name in record:
            if isinstance(record[name], str) and not record[name].strip():
                fault = "its caption is empty"
            else:
                fault = f'it has no caption: its "{name}" is {described(record[name])}, where texts are expected'
    captions = texts_in(record.get("captions")) or texts_in(record.get("caption"))
    if not captions:
        raise Unusable(fault)
    return captions


def texts_in(value, depth=3):
    """The texts in a value, which is a text, or a list or an object of texts; an object may have one per language.

    Empty texts and other values are skipped, and so is what lies more than `depth` lists or objects deep.
    """
    if isinstance(value, str):
        text = value.strip().encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
        return [text] if text else []
    if isinstance(value, dict):
        wrapped = [value[name] for name in WRAPPED if isinstance(value.get(name), str)]
        value = wrapped[:1] or list(value.values())
    if not isinstance(value, list) or depth == 0:
        return []
    return [text for item in value for text in texts_in(item, depth - 1)]


def described(value):
    """The type of a value from a .json in words, with the value where it is short."""
    if value is None:
        return "null"
    name = TYPES[type(value)]
    return f"{name} without texts" if isinstance(value, (list, dict)) else f"{name}, {value!r:.40}"


# ---------------------------------------------------------------------------------------------------------------
# Images and latents


def decode_image(members):
    """An example's image as an RGB PIL.Image: rotated as its EXIF says, transparency over white. Raises Unusable."""
    suffix = pick(members, *IMAGES)
    if suffix is None:
        raise Unusable("it has no image")
    try:
        return decode(members[suffix])
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"it is enormous ({error})") from error
    except Exception as error:  # a damaged image may raise anything
        raise Unusable(f"it cannot be decoded ({str(error) or type(error).__name__})") from error


def holds_latent(members):
    """Whether training reads an example's array instead of its image. Raises Unusable.

    Beside an image, an array is a latent only if its name is at least as plain and it has three sizes and several
    channels, unlike embeddings and depth maps.
    """
    array, image = pick(members, "npy"), pick(members, *IMAGES)
    if array is None or image is None:
        return array is not None
    try:
        return array.count(".") <= image.count(".") and len(decode_latent(members)) > 1
    except Unusable:
        return False


def decode_latent(members, shape=None):
    """An example's latent (C, h, w), float32. Raises Unusable, also for a latent of another shape than `shape`."""
    suffix = pick(members, "npy")
    if suffix is None:
        raise Unusable("it has no latent")
    try:
        array = np.load(io.BytesIO(members[suffix]), allow_pickle=False)
        if array.dtype.kind not in "fiu":
            raise ValueError(f"its numbers are {array.dtype}")
        latent = torch.from_numpy(array.astype(np.float32))
    except Exception as error:  # a damaged file may raise anything
        raise Unusable(f"it is not an array ({str(error) or type(error).__name__})") from error
    found = "x".join(map(str, latent.shape))
    if latent.ndim != 3:
        raise Unusable(f"it holds {found or 1} numbers, but a latent has three sizes, CxHxW")
    if shape and latent.shape != shape or not latent.isfinite().all():
        expected = "x".join(map(str, shape or latent.shape))
        raise Unusable(f"it holds {found} numbers, not {expected} finite ones")
    return latent
