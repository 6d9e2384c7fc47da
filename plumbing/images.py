"""Pixels as numbers, and images for people to look at: contact sheets of captioned samples, and plots of curves."""

import math
import os
import textwrap
from collections import defaultdict
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
MOST_LINES = 8  # of a caption under an image
ELLIPSIS = "…"
THUMBNAIL = 256  # pixels; the longer side of what `python data.py` shows of larger images
PANEL, AXIS = (460, 300), 58  # pixels: a panel's curves, and the room for the numbers beside and below them
COLOURS = (31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14), (23, 190, 207)


def to_pixels(images):
    """8-bit images (uint8, any shape, array or tensor) -> float32 tensor: v becomes (2v + 1)/256 - 1."""
    return (torch.as_tensor(images).float() * 2 + 1) / 256 - 1


def to_uint8(images):
    """Images in [-1, 1] -> the uint8 value of the bin each pixel is in; what lies outside [-1, 1] is clipped."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def dequantize(images, generator=None, batch=0, rows=slice(None)):
    """Eq. (17): uniform noise over each pixel's bin, v -> 2(v + U[0, 1))/256 - 1, so that a density exists. `images`
    come from to_pixels; a generator must live on their device. rows: the slice that they are of a batch of `batch`
    images, whose noise is drawn."""
    # 16 random bits: float32 adds them to any level without rounding, so that noise never leaves the bin
    shape = batch or len(images), *images.shape[1:]
    bits = drawn(lambda tensor: tensor.random_(2**16, generator=generator), shape, rows, images.device, images.dtype)
    u = bits / 2**16
    return images + (2 * u - 1) / 256


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


def wrap(text, font, width):
    """Breaks `text` into lines of about `width` pixels, between words where that is possible, and cuts it with an
    ellipsis after MOST_LINES of them. Its own lines stay apart; the last of several is never cut away: a likelihood."""
    letters = max(1, int(width / font.getlength("n")))
    *others, last = text.split("\n")
    lines = []
    for line in others[:MOST_LINES + 1]:
        lines += break_line(line, letters) or [""]
    if len(lines) > MOST_LINES:
        lines = [*lines[:MOST_LINES - 1], lines[MOST_LINES - 1][:letters - 1].rstrip(ELLIPSIS) + ELLIPSIS]
    return "\n".join(lines + break_line(last, letters))


def break_line(line, letters):
    """One line as at most MOST_LINES lines of `letters` characters, a list."""
    enough = line[:letters * MOST_LINES * 10]  # textwrap is slow with books; ten times, as spaces may be many
    return textwrap.wrap(enough, letters, max_lines=MOST_LINES, placeholder=ELLIPSIS)


def pixels_of(images):
    """(..., C, H, W) in [-1, 1], to uint8 arrays (..., H, W, 3). C is 1 or 3; of other C, latents of standard deviation
    1, the first three channels are shown, which gives an idea."""
    if images.shape[-3] not in (1, 3):
        images = images[..., :3 if images.shape[-3] > 3 else 1, :, :] / 3
    pixels = np.moveaxis(to_uint8(images.detach().float().cpu()).numpy(), -3, -1)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def to_pil(image, scale=1):
    """One image (C, H, W) in [-1, 1], each pixel a square of `scale`, as an RGB PIL.Image."""
    return Image.fromarray(pixels_of(image).repeat(scale, axis=0).repeat(scale, axis=1))


def thumbnail(image):
    """An image (C, H, W), reduced by averaging to at most THUMBNAIL pixels a side; smaller ones as they are."""
    size = fit(*image.shape[1:])
    if size == tuple(image.shape[1:]):
        return image
    return functional.interpolate(image[None], size, mode="area")[0]


def fit(height, width):
    """The size of a thumbnail of height x width, in pixels."""
    scale = min(1, THUMBNAIL / max(height, width))
    return max(1, round(scale * height)), max(1, round(scale * width))


def columns_for(count):
    """About as many columns as rows for `count` cells, full rows if that can be."""
    root = math.isqrt(count - 1) + 1
    for columns in range(root, 2 * root):
        if count % columns == 0:
            return columns
    return root


def contact_sheet(images, captions=None, columns=None, scale=None):
    """Images (B, C, H, W) in [-1, 1] with their captions underneath ("" for none), as an RGB PIL.Image. Long captions
    are cut. columns: by default about as many as rows, full rows if that can be. scale: how often a pixel is repeated,
    by default until images are 96 wide."""
    count, (height, width) = len(images), images[0].shape[-2:]
    columns = columns or columns_for(count)
    scale = scale or -(-MIN_CELL // width)
    height, width = height * scale, width * scale

    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, font, width) for caption in captions or [""] * count]
    line = FONT_SIZE + 4  # Pillow puts 4 pixels between lines
    text_height = line * max(text.count("\n") + 1 for text in texts) if captions else 0

    cell_width = width + GAP
    cell_height = height + text_height + GAP
    rows = -(-count // columns)
    sheet = Image.new("RGB", (columns * cell_width + GAP, rows * cell_height + GAP), PAPER)
    pen = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(images, texts)):
        row, column = divmod(i, columns)
        x = GAP + column * cell_width
        y = GAP + row * cell_height
        sheet.paste(to_pil(image, scale), (x, y))
        pen.multiline_text((x, y + height + 2), text, fill=INK, font=font)
    return sheet


def save_image(image, path, **how):
    """Writes a PIL.Image, as PNG unless `how` has another format, whole or not at all; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    image.save(part, **{"format": "PNG", **how})
    os.replace(part, path)


def save_film(images, path):
    """Writes images (n, C, H, W) in [-1, 1] as an endless GIF: two seconds for all, and two for the last."""
    first, *others = [to_pil(image, -(-MIN_CELL // image.shape[-1])) for image in images]
    durations = [max(20, 2000 // (len(others) or 1))] * len(others) + [2000]  # milliseconds
    save_image(first, path, format="GIF", save_all=True, append_images=others, duration=durations, loop=0)


def ticks(low, high):
    """About five round numbers in [low, high]."""
    step = 10 ** np.floor(np.log10((high - low) / 2))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [round(k * step, 10) for k in range(int(np.ceil(low / step)), int(np.floor(high / step)) + 1)]


def plot(panels, x_label, log_x=False, shown=1.0):
    """Curves in panels side by side, {title: {name: [(x, y), ...]}}, as an RGB PIL.Image. log_x: the x axis is
    logarithmic, and ticked at the data's own x if these are whole numbers, else at 1, 2, 5, 10, ... of some unit.
    shown: the fraction of values that the y axis reaches up to."""
    width, height = PANEL
    image = Image.new("RGB", (len(panels) * (width + AXIS + GAP) + GAP, height + AXIS + 3 * GAP), PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    pen.fontmode = "L"
    for number, (title, curves) in enumerate(panels.items()):
        left, top = AXIS + number * (width + AXIS + GAP), 3 * GAP
        xs, ys = np.array([point for points in curves.values() for point in points], dtype=float).T
        scale = np.log if log_x else np.asarray
        x_low, x_high = scale(xs).min(), scale(xs).max()
        y_low, y_high = np.quantile(ys, [0, shown if len(ys) > 20 else 1])
        x_high, margin = (x_high if x_high > x_low else x_low + 1), 0.05 * (y_high - y_low or 1)
        y_low, y_high = y_low - margin, y_high + margin

        def place(x, y):
            return (left + (scale(x) - x_low) / (x_high - x_low) * width,
                    top + height - np.clip((y - y_low) / (y_high - y_low), 0, 1) * height)

        pen.text((left + width / 2, top - 2 * GAP), title, fill=INK, font=font, anchor="mm")
        pen.text((left + width / 2, top + height + 4 * GAP), x_label, fill=INK, font=font, anchor="mm")
        round_xs = ticks(x_low, x_high) if not log_x else sorted(set(xs)) if (xs % 1 == 0).all() else [
            x for k in range(-9, 10) for x in (10.0**k, 2 * 10.0**k, 5 * 10.0**k) if xs.min() <= x <= xs.max()]
        for x in round_xs:
            pen.line((place(x, y_low), place(x, y_high)), fill=(230, 230, 230))
            pen.text((place(x, y_low)[0], top + height + GAP), f"{x:g}", fill=INK, font=font, anchor="mt")
        for y in ticks(y_low, y_high):
            pen.line((left, place(xs[0], y)[1], left + width, place(xs[0], y)[1]), fill=(230, 230, 230))
            pen.text((left - GAP, place(xs[0], y)[1]), f"{y:g}", fill=INK, font=font, anchor="rm")
        pen.rectangle((left, top, left + width, top + height), outline=INK)
        for row, (colour, (name, points)) in enumerate(zip(COLOURS, curves.items())):
            line = [place(x, y) for x, y in points]
            pen.line(line, fill=colour, width=2, joint="curve")
            for x, y in line if len(line) <= 20 else ():
                pen.circle((x, y), 3, fill=colour)
            pen.text((left + width - GAP, top + GAP + row * (FONT_SIZE + 4)), name, fill=colour, font=font, anchor="rt")
    return image


def plot_quality(rows):
    """Quality against passes of the network and against seconds an image, each row on its curve; None if no curve has
    several numbers of passes, or nothing measures quality. rows: {"curve", "passes", and results of samples}."""
    panels = defaultdict(lambda: defaultdict(list))
    for row in sorted(rows, key=lambda row: row["passes"]):
        axes = {"network passes": row["passes"], "seconds an image": 1 / row["images_per_s"]}
        for key, label in ("overall", "overall score"), ("frechet_distance", "Frechet distance"):
            if key not in row:
                continue
            quality = row[key]["mean"] if key == "overall" else row[key]
            for axis, x in axes.items():
                panels[f"{label} against {axis}"][row["curve"]].append((x, quality))
    points = {(row["curve"], row["passes"]) for row in rows}
    curves = {row["curve"] for row in rows}
    several = len(points) > len(curves)
    return plot(panels, "", log_x=True) if panels and several else None
