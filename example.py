"""One example of a shard, from bytes to a caption and a picture or latent; Unusable says what is wrong with it."""

import io
import json
import tarfile
import warnings
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

PICTURES = ("jpg", "jpeg", "png", "webp")  # what a member of a shard may be called, and npy
BLOCK = 512  # bytes; tar's


class Unusable(ValueError):
    """What is wrong with an example."""


def read_members(path, start, stop):
    """The members {suffix: bytes} of the example between two blocks of a shard. Raises Unusable."""
    with open(path, "rb") as file:
        file.seek(start * BLOCK)
        run = file.read((stop - start) * BLOCK)
    try:
        with tarfile.open(fileobj=io.BytesIO(run), mode="r:") as tar:
            files = [member for member in tar if member.isfile()]
            return {PurePosixPath(member.name).name.partition(".")[2].lower().rpartition(".")[2]:
                    tar.extractfile(member).read() for member in files}
    except (tarfile.TarError, EOFError) as error:
        raise Unusable(f"its shard is truncated ({error})") from error


def caption_of(members):
    """The caption of an example's members. Raises Unusable where it is missing or empty."""
    try:
        if "txt" in members:
            caption = members["txt"].decode("utf-8")
        else:
            caption = json.loads(members["json"])["caption"]
        caption = caption.strip().encode("utf-8", "replace").decode()  # JSON can hold half a character
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unusable("it has no caption") from error
    if not caption:
        raise Unusable("its caption is empty")
    return caption


def picture_of(members):
    """The bytes of an example's picture. Raises Unusable where it has none."""
    for suffix in PICTURES:
        if suffix in members:
            return members[suffix]
    raise Unusable("it has no picture")


def decode_picture(data):
    """An upright RGB picture from a file's bytes, turned as its EXIF says, transparency over white. Raises Unusable."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about corners of formats, of which a large data set has all
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            if picture.mode.startswith("I;16"):  # which Pillow would clip instead of scale
                picture = Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
            if picture.has_transparency_data:
                picture = picture.convert("RGBA")
                picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
            return picture.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"it is enormous ({error})") from error
    except Exception as error:  # what decoding garbage raises depends on the garbage
        raise Unusable(f"it cannot be decoded ({str(error) or type(error).__name__})") from error


def fit_picture(picture, height, width, across=0.5, down=0.5):
    """A picture scaled, antialiased, until it just covers height x width, and cropped there: across and down in [0, 1]
    say which part, 0.5 the middle. uint8 (H, W, 3)."""
    scale = min(picture.height / height, picture.width / width)  # source pixels for one of ours
    left, top = across * (picture.width - scale * width), down * (picture.height - scale * height)
    box = left, top, min(left + scale * width, picture.width), min(top + scale * height, picture.height)
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0))


def load_array(data):
    """A .npy file's bytes as a float32 tensor. Raises Unusable."""
    try:
        return torch.as_tensor(np.load(io.BytesIO(data), allow_pickle=False)).float()
    except Exception as error:  # what reading garbage raises depends on the garbage
        raise Unusable(f"it is no array ({str(error) or type(error).__name__})") from error


def decode_latent(data, shape):
    """A latent (C, h, w), float32, from a .npy file's bytes. Raises Unusable."""
    latent = load_array(data)
    if latent.shape != shape or not latent.isfinite().all():
        found, expected = ("x".join(map(str, size)) for size in (latent.shape, shape))
        raise Unusable(f"it holds {found} numbers, not {expected} finite ones")
    return latent
