"""Pixels as numbers, and pictures for people to look at: grids of enlarged, captioned samples.

    python pictures.py OUT.png "a name"=ROW.png "another"=ROW.png ...     rows of pictures under one another
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (20, 20, 20)
GAP = 8  # pixels between cells, and around them
FONT_SIZE = 13
MIN_CELL = 96  # a narrower cell would have no room for its caption

# ---------------------------------------------------------------------------------------------------------------
# Pixels as numbers


def to_pixels(images):
    """8-bit images (uint8, any shape, array or tensor) -> float32 tensor: v becomes (2v + 1)/256 - 1."""
    return (torch.as_tensor(images).float() * 2 + 1) / 256 - 1


def to_uint8(images):
    """Images in [-1, 1] -> the uint8 value of the bin each pixel is in; what lies outside [-1, 1] is clipped."""
    return ((images + 1) * 128).floor().clamp(0, 255).to(torch.uint8)


def dequantize(images, generator=None):
    """Spreads each pixel uniformly over its bin, v -> 2(v + U[0, 1))/256 - 1, so that a density exists. `images` come
    from to_pixels; a generator must live on their device."""
    # 16 random bits: float32 adds them to any level without rounding, so that noise never leaves the bin
    u = torch.randint(2**16, images.shape, generator=generator, dtype=images.dtype, device=images.device) / 2**16
    return images + (2 * u - 1) / 256


# ---------------------------------------------------------------------------------------------------------------
# Pictures to look at


def wrap(text, font, width):
    """Breaks each line of `text` between words into lines of at most `width` pixels (one long word may stick out)."""
    wrapped = []
    for line in text.split("\n"):
        wrapped.append("")
        for word in line.split():
            longer = f"{wrapped[-1]} {word}".strip()
            if wrapped[-1] and font.getlength(longer) > width:
                wrapped.append(word)
            else:
                wrapped[-1] = longer
    return "\n".join(wrapped)


def pixels_of(images):
    """(..., C, H, W) in [-1, 1], to uint8 arrays (..., H, W, 3). C is 1 or 3; of other C, latents of standard deviation
    1, the first three channels are shown, which gives an idea."""
    if images.shape[-3] not in (1, 3):
        images = images[..., :3 if images.shape[-3] > 3 else 1, :, :] / 3
    pixels = np.moveaxis(to_uint8(images.detach().float().cpu()).numpy(), -3, -1)
    return np.broadcast_to(pixels, (*pixels.shape[:-1], 3))


def picture(image):
    """One image (C, H, W) in [-1, 1], pixel for pixel, as an RGB PIL.Image."""
    return Image.fromarray(pixels_of(image))


def grid(images, captions=None, columns=None, scale=None):
    """Images (B, C, H, W) in [-1, 1], C 1 or 3, with their captions underneath ("" for none), in rows of `columns`.

    columns: by default about as many as there are rows. Each pixel is enlarged to scale x scale, by default until
    pictures are 96 wide. Returns an RGB PIL.Image.
    """
    pixels = pixels_of(images)
    count, height, width, _ = pixels.shape
    columns = columns or int(np.ceil(np.sqrt(count)))
    scale = scale or -(-MIN_CELL // width)
    height, width = height * scale, width * scale

    font = ImageFont.load_default(FONT_SIZE)
    texts = [wrap(caption, font, width) for caption in captions or [""] * count]
    line = FONT_SIZE + 4  # Pillow puts 4 pixels between lines
    text_height = line * max(text.count("\n") + 1 for text in texts) if captions else 0

    cell_w, cell_h = width + GAP, height + text_height + GAP
    sheet = Image.new("RGB", (columns * cell_w + GAP, -(-count // columns) * cell_h + GAP), PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, text) in enumerate(zip(pixels, texts)):
        x, y = GAP + i % columns * cell_w, GAP + i // columns * cell_h
        sheet.paste(Image.fromarray(image).resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height + 2), text, fill=INK, font=font)
    return sheet


def stack(named):
    """Pictures of one width under one another, each with its name above it; named: {name: PIL.Image}."""
    font, line = ImageFont.load_default(FONT_SIZE), FONT_SIZE + GAP
    width = max(image.width for image in named.values())
    sheet = Image.new("RGB", (width, sum(image.height + line for image in named.values())), PAPER)
    draw, y = ImageDraw.Draw(sheet), 0
    for name, image in named.items():
        draw.text((GAP, y + GAP // 2), name, fill=INK, font=font)
        sheet.paste(image, (0, y + line))
        y += image.height + line
    return sheet


def save(image, path):
    """Writes a PIL.Image as PNG, whole or not at all; makes the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    image.save(part, format="PNG")
    os.replace(part, path)


if __name__ == "__main__":
    try:
        out, *rows = sys.argv[1:]
        save(stack({name: Image.open(path) for name, _, path in (row.rpartition("=") for row in rows)}), out)
    except (ValueError, OSError) as error:
        sys.exit(f"pictures.py: {error}; write OUT.png NAME=ROW.png ...")
