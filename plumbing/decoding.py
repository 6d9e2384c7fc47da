"""Decode image files, even if other parts of a file are damaged: EXIF, texts, profiles, thumbnails."""

import io
import warnings
import zlib

import numpy as np
from PIL import ExifTags, Image, UnidentifiedImageError

from plumbing.images import over_white

PNG, JPEG = b"\x89PNG\r\n\x1a\n", b"\xff\xd8"  # the first bytes of such files
SCAN = 0xDA  # marks the segment of a JPEG that the pixels follow
METADATA = {*range(0xE1, 0xEE), 0xEF, 0xFE}  # APP1 to APP13, APP15 and COM; APP14 says how colours are coded
TURNS = {  # what makes a photograph upright, by the orientation in its EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(data):
    """The image of a file's bytes, as an RGB PIL.Image: rotated as its EXIF says, transparency over white.

    A file that Pillow cannot read is tried again without its metadata. Raises DecompressionBombWarning or
    DecompressionBombError for an enormous image, and whatever Pillow raises for bytes that are no image.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about odd files, which every large data set has
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            return to_rgb(data)
        except Exception:
            pixels = pixels_alone(data)
            if pixels == data:
                raise
            return to_rgb(pixels)


def to_rgb(data):
    """A file's bytes as an upright RGB PIL.Image; decode() without the second try."""
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # its message is of no use: an address in memory
        raise ValueError("it is no image file that Pillow knows") from error
    image = upright(image)
    if image.mode.startswith("I;16"):  # Pillow would clip 16 bits instead of scaling them
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return over_white(image) if image.has_transparency_data else image.convert("RGB")


def upright(image):
    """A PIL.Image, turned as its EXIF says; unchanged if the EXIF cannot be read.

    ImageOps.exif_transpose would also rewrite the EXIF, and fail on what some cameras put there.
    """
    image.load()
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
        turn = TURNS.get(orientation)
    except Exception:  # a damaged file may raise anything
        turn = None
    return image if turn is None else image.transpose(turn)


def pixels_alone(data):
    """The bytes of a PNG or JPEG without the parts that do not affect pixels.

    The parts left out may be damaged, or larger than Pillow allows. The bytes of any other file, and of one that ends
    early, are returned unchanged.
    """
    try:
        if data.startswith(PNG):
            return png_without_metadata(data)
        if data.startswith(JPEG):
            return jpeg_without_metadata(data)
    except (IndexError, ValueError):
        pass
    return data


def png_without_metadata(data):
    """A PNG's critical chunks, and if undamaged its transparency and its EXIF, which may turn the image."""
    kept, at = [PNG], len(PNG)
    while at < len(data):
        end = at + 12 + int.from_bytes(data[at:at + 4])  # a chunk is length, name, contents and checksum
        name, checksum = data[at + 4:at + 8], int.from_bytes(data[end - 4:end])
        whole = zlib.crc32(data[at + 4:end - 4]) == checksum
        if name[:1].isupper() or name in (b"tRNS", b"eXIf") and whole:
            kept.append(data[at:end])
        at = end
    return b"".join(kept)


def jpeg_without_metadata(data):
    """A JPEG's bytes without the segments in METADATA. Raises IndexError or ValueError for a damaged file."""
    kept, at = [JPEG], len(JPEG)
    while data[at + 1] != SCAN:
        if data[at] != 0xFF:
            raise ValueError("there is no segment")
        end = at + 2 + int.from_bytes(data[at + 2:at + 4])
        if data[at + 1] not in METADATA:
            kept.append(data[at:end])
        at = end
    return b"".join(kept) + data[at:]
