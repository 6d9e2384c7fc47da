"""One example of a shard, from bytes to a caption and an image or latent; Unusable says what is wrong with it."""

import io
import json
import tarfile
import warnings
from pathlib import PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

IMAGES = ("jpg", "jpeg", "png", "webp")  # suffixes of images in shards and folders; that of latents is npy
BLOCK = 512  # bytes, of a tar


class Unusable(ValueError):
    """What is wrong with an example."""


def read_members(path, start, stop):
    """The members {suffix: bytes} of the example in blocks [start, stop) of a shard. Raises Unusable."""
    with open(path, "rb") as file:
        file.seek(start * BLOCK)
        blocks = io.BytesIO(file.read((stop - start) * BLOCK))
    try:
        with tarfile.open(fileobj=blocks, mode="r:") as tar:
            return {PurePosixPath(member.name).name.partition(".")[2].lower().rpartition(".")[2]:
                    tar.extractfile(member).read() for member in list(tar) if member.isfile()}
    except (tarfile.TarError, EOFError) as error:
        raise Unusable(f"its shard is truncated ({error})") from error


def caption_of(members):
    """The caption of an example's members. Raises Unusable where it is missing or empty."""
    try:
        caption = members["txt"].decode("utf-8") if "txt" in members else json.loads(members["json"])["caption"]
        caption = caption.strip().encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise Unusable("it has no caption") from error
    if not caption:
        raise Unusable("its caption is empty")
    return caption


def decode_image(members):
    """An example's image as an RGB PIL.Image: rotated as its EXIF says, transparency over white. Raises Unusable."""
    data = next((members[suffix] for suffix in IMAGES if suffix in members), None)
    if data is None:
        raise Unusable("it has no image")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # oddities of formats, of which a large data set has all
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))
            if image.mode.startswith("I;16"):  # which Pillow would clip instead of scale
                image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            return over_white(image) if image.has_transparency_data else image.convert("RGB")
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise Unusable(f"it is enormous ({error})") from error
    except Exception as error:  # what decoding garbage raises depends on the garbage
        raise Unusable(f"it cannot be decoded ({str(error) or type(error).__name__})") from error


def over_white(image):
    """A PIL.Image with transparency, laid over white, as RGB."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def resize_and_crop(image, height, width, across=0.5, down=0.5):
    """A PIL.Image, scaled with antialiasing until it just covers height x width, and cropped to that size. across and
    down, in [0, 1], place the crop; 0.5 is the centre."""
    scale = min(image.height / height, image.width / width)  # source pixels per target pixel
    left, top = max(0, across * (image.width - scale * width)), max(0, down * (image.height - scale * height))
    box = left, top, min(left + scale * width, image.width), min(top + scale * height, image.height)
    return image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)  # unlike ImageOps.fit, fast


def decode_latent(data, shape=None):
    """A latent (C, h, w), float32, from a .npy file's bytes. Raises Unusable, also for another shape than the given."""
    try:
        latent = torch.as_tensor(np.load(io.BytesIO(data), allow_pickle=False)).float()
    except Exception as error:  # what reading garbage raises depends on the garbage
        raise Unusable(f"it is not an array ({str(error) or type(error).__name__})") from error
    if shape and latent.shape != shape or not latent.isfinite().all():
        found, expected = ("x".join(map(str, size)) for size in (latent.shape, shape or latent.shape))
        raise Unusable(f"it holds {found} numbers, not {expected} finite ones")
    return latent
