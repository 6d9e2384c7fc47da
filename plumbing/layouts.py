"""The files around sampling: prompts, and images in one of three layouts.

- sheet    sheet.png with the prompts under the images, and the images 0000.png, 0001.png, ...
- flat     the images and nothing else, for FID
- geneval  for each prompt 00000/metadata.jsonl, 00000/samples/0000.png, ... and 00000/grid.png, for GenEval's scorer
"""

import json
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.images import contact_sheet, save_image, to_pixels

LAYOUTS = "sheet", "flat", "geneval"


def read_prompts(path):
    """The prompts in a file, a dict each: {"prompt": line} of every line, or what a .jsonl file says in it. Raises
    ValueError for a file that cannot be read, holds nothing, or has a line that is no prompt."""
    try:
        text = Path(path).read_bytes().decode("utf-8-sig")  # a byte-order mark belongs to no prompt
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts file {path!r} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"{path} holds no prompts: write one a line")
    # not splitlines(): U+2028 and others at which it splits may stand in a prompt
    lines = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if not path.endswith(".jsonl"):
        return [{"prompt": line} for line in lines]
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            entries.append(json.loads(line))
            entries[-1]["prompt"].encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            raise ValueError(f'{path}, line {number}: {line[:60]!r} is no JSON object with a "prompt"') from None
    return entries


def make_folder(path):
    """Makes a folder where there is none. Raises ValueError if no file can be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"folder {str(path)!r} cannot be written to ({error.strerror}): choose another") from error


def path_of(folder, layout, i, per_prompt):
    """Where image i goes; there are `per_prompt` of each prompt."""
    if layout == "geneval":
        return folder / f"{i // per_prompt:05d}" / "samples" / f"{i % per_prompt:04d}.png"
    return folder / f"{i:04d}.png"


def write_geneval_sheets(folder, entries, per_prompt):
    """What GenEval's scorer expects beside the samples of each prompt."""
    for number, entry in enumerate(entries):
        home = folder / f"{number:05d}"
        (home / "metadata.jsonl").write_text(json.dumps(entry) + "\n")
        samples = [np.asarray(Image.open(home / "samples" / f"{k:04d}.png")) for k in range(per_prompt)]
        save_image(contact_sheet(to_pixels(np.stack(samples)).permute(0, 3, 1, 2), scale=1), home / "grid.png")
