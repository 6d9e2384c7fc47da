"""Pixels as numbers, and images to look at: contact sheets of captioned samples, and films."""

import math
import os
import textwrap
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch.nn import functional

from plumbing.rng import drawn

PAPER, INK = (255, 255, 255), (20, 20, 20)
GAP = 8  # pixels between cells, and around them
FONT_SIZE = 13
MIN_CELL = 96  # pixels; a narrower cell would have no room for its caption
MOST_LINES = 8  # lines of the caption under an image, at most
ELLIPSIS = "…"
THUMBNAIL = 256  # pixels of the longer side, at most, where `python data.py` shows images


def to_pixels(images):
    """8-bit images (uint8, any shape, array or tensor) as a float32 tensor: v becomes (2v + 1)/256 - 1."""
    pixels = torch.as_tensor(images).to(torch.float32, copy=True)
    return pixels.mul_(2).add_(1).div_(256).sub_(1)  # in place: for a batch, allocation takes most of the time


def to_uint8(images):
    """The uint8 value of each pixel's bin, for images in [-1, 1]; values outside are clipped."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def dequantize(images, generator=None, batch=0, rows=slice(None)):
    """Add uniform noise over each pixel's bin, Eq. (17): v -> 2(v + U[0, 1))/256 - 1, so that a density exists.

    images: from to_pixels, on the generator's device. rows: which slice of a batch of `batch` images these are; the
    noise is drawn for the whole batch. batch 0: these are the whole batch.
    """
    # 16 random bits: float32 adds them to any level without rounding, so that noise never leaves the bin
    shape = batch or len(images), *images.shape[1:]
    bits = drawn(lambda tensor: tensor.random_(2**16, generator=generator), shape, rows, images.device, images.dtype)
    u = bits / 2**16
    return images + (2 * u - 1) / 256


def over_white(image):
    """A PIL.Image with its transparency laid over white, as RGB."""
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(white, image).convert("RGB")


def resize_and_crop(image, height, width, across=0.5, down=0.5):
    """A PIL.Image scaled with antialiasing until it just covers height x width, and cropped to that size.

    across and down, in [0, 1], place the crop; 0.5 is the centre.
    """
    scale = min(image.height / height, image.width / width)  # source pixels per target pixel
    wide, high = scale * width, scale * height  # source pixels of the crop
    left = max(0, across * (image.width - wide))
    top = max(0, down * (image.height - high))
    right = min(left + wide, image.width)
    bottom = min(top + high, image.height)
    box = left, top, right, bottom
    return image.resize((width, height), Image.Resampling.BICUBIC, box, reducing_gap=3.0)  # fast, unlike ImageOps.fit


def wrap(text, font, width):
    """Break `text` into lines of about `width` pixels, between words if possible; MOST_LINES of them, then an ellipsis.

    Line ends in the text are kept. The last of several lines is always shown, since it may be a likelihood.
    """
    letters = max(1, int(width / font.getlength("n")))

    def broken(line):
        fits = len(line) <= 3 * letters and font.getlength(line) <= width
        return [line] if fits and line.strip() else break_line(line, letters)

    *others, last = text.split("\n")
    lines = []
    for line in others[:MOST_LINES + 1]:
        lines += broken(line) or [""]
    if len(lines) > MOST_LINES:
        lines = lines[:MOST_LINES]
        lines[-1] = lines[-1][:letters - 1].rstrip(ELLIPSIS) + ELLIPSIS
    return "\n".join(lines + broken(last))


def break_line(line, letters):
    """Break one line into at most MOST_LINES lines of at most `letters` characters; an ellipsis marks a cut."""
    # textwrap is slow on a whole book; tenfold what is shown is enough even for texts with many spaces
    enough = line[:letters * MOST_LINES * 10]
    return textwrap.wrap(enough, letters, max_lines=MOST_LINES, placeholder=ELLIPSIS)


def pixels_of(images):
    """Images (..., C, H, W) in [-1, 1] as uint8 arrays (..., H, W, 3).

    C is 1 or 3. For another C, of latents of standard deviation 1, the first three channels are shown, as a rough idea.
    """
    channels = images.shape[-3]
    if channels not in (1, 3):
        shown = 3 if channels > 3 else 1
        images = images[..., :shown, :, :] / 3
    values = to_uint8(images.detach().float().cpu())
    pixels = np.moveaxis(values.numpy(), -3, -1)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def to_pil(image, scale=1):
    """One image (C, H, W) in [-1, 1] as an RGB PIL.Image, each pixel a square of side `scale`."""
    pixels = pixels_of(image)
    pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
    return Image.fromarray(pixels)


def thumbnail(image):
    """An image (C, H, W) averaged down to at most THUMBNAIL pixels a side; smaller images unchanged."""
    size = fit(*image.shape[1:])
    if size == tuple(image.shape[1:]):
        return image
    return functional.interpolate(image[None], size, mode="area")[0]


def fit(height, width):
    """The size of a thumbnail of height x width, in pixels."""
    scale = min(1, THUMBNAIL / max(height, width))
    return max(1, round(scale * height)), max(1, round(scale * width))


def columns_for(count):
    """The number of columns for `count` cells: about as many as rows, with full rows if possible."""
    root = math.isqrt(count - 1) + 1
    for columns in range(root, 2 * root):
        if count % columns == 0:
            return columns
    return root


def contact_sheet(images, captions=None, columns=None, scale=None):
    """Images (B, C, H, W) in [-1, 1] with their captions underneath ("" for none), as an RGB PIL.Image.

    Long captions are cut. columns: by default about as many as rows, with full rows if possible. scale: pixels of the
    sheet along a side of an image's pixel; by default such that an image is at least 96 pixels wide.
    """
    count, (height, width) = len(images), images[0].shape[-2:]
    columns = columns or columns_for(count)
    scale = scale or -(-MIN_CELL // width)
    height, width = height * scale, width * scale

    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, font, width) for caption in captions or [""] * count]
    line = FONT_SIZE + 4  # Pillow puts 4 pixels between lines
    text_height = 0
    if captions:
        text_height = line * max(text.count("\n") + 1 for text in texts)

    cell_width = width + GAP
    cell_height = height + text_height + GAP
    rows = -(-count // columns)
    size = columns * cell_width + GAP, rows * cell_height + GAP
    sheet = Image.new("RGB", size, PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts)):
        row, column = divmod(i, columns)
        x = GAP + column * cell_width
        y = GAP + row * cell_height
        sheet.paste(to_pil(image, scale), (x, y))
        pen.multiline_text((x, y + height + 2), text, fill=INK, font=font)
    return sheet


def save_image(image, path, **how):
    """Write a PIL.Image, as PNG unless `how` names another format, whole or not at all; make its folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    image.save(part, **{"format": "PNG", **how})
    os.replace(part, path)


def save_film(images, path):
    """Write images (n, C, H, W) in [-1, 1] as an endless GIF: two seconds in all, and two more for the last image."""
    scale = -(-MIN_CELL // images.shape[-1])
    first, *others = [to_pil(image, scale) for image in images]
    each = max(20, 2000 // (len(others) or 1))  # milliseconds
    durations = [each] * len(others) + [2000]
    save_image(first, path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)
