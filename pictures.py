"""Images in, one picture out: grids of enlarged, captioned samples for people to look at.

    python pictures.py OUT.png "a name"=ROW.png "another"=ROW.png ...     rows of pictures under one another
"""

import os
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (20, 20, 20)
GAP = 8  # pixels between cells, and around them
FONT_SIZE = 13
MIN_CELL = 96  # a narrower cell would have no room for its caption


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
    pixels = np.moveaxis(((images.detach().float().cpu().numpy() + 1) * 128).clip(0, 255).astype(np.uint8), -3, -1)
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
