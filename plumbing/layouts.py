"""The files around sampling: prompts, and images in one of three layouts.

- sheet    0000.png, 0001.png, ..., for latents also 0000.npy, ...; and sheet.png, all images with their prompts
- flat     the images and nothing else, for FID
- geneval  for each prompt 00000/metadata.jsonl, 00000/samples/0000.png, ... and 00000/grid.png, for GenEval's scorer

A folder holds the images of one run: images of an earlier run are removed before the first image is written. The hidden
file .settings.json records the settings, so that an interrupted flat or geneval run can continue.
"""

import contextlib
import json
import re
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from plumbing.images import contact_sheet, save_image, to_pixels
from plumbing.paths import at_home
from plumbing.runtime import claim

LAYOUTS = "sheet", "flat", "geneval"
SETTINGS = ".settings.json"
OF_AN_IMAGE = re.compile(r"(\d{4}|[1-9]\d{4,})(\.png|\.npy|_trajectory\.png|_trajectory\.gif)(\.part)?")
SHEET = re.compile(r"sheet\.png(\.part)?")
PROMPT = re.compile(r"\d{5}|[1-9]\d{5,}")
OF_A_PROMPT = re.compile(r"metadata\.jsonl|grid\.png(\.part)?")


def read_prompts(path):
    """The prompts in a file, a dict each: {"prompt": line} for a text file, or the objects of a .jsonl file.

    Raises ValueError for a file that cannot be read, is empty, or has a line that is no prompt.
    """
    try:
        text = Path(at_home(path)).read_bytes().decode("utf-8-sig")  # without a byte-order mark
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompts file {path!r} cannot be read: {error}") from error
    if not text:
        raise ValueError(f"{path} holds no prompts: write one per line")
    # not splitlines(), which also splits at U+2028 and others that a prompt may contain
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
    """Make a folder if there is none. Raises ValueError if no file can be written into it."""
    try:
        Path(path).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except OSError as error:
        raise ValueError(f"folder {str(path)!r} cannot be written to ({error.strerror}): choose another") from error


def path_of(folder, layout, i, per_prompt):
    """The path of image i, with `per_prompt` images for each prompt."""
    if layout == "geneval":
        return folder / f"{i // per_prompt:05d}" / "samples" / f"{i % per_prompt:04d}.png"
    return folder / f"{i:04d}.png"


def files_named(folder, *patterns):
    """The files in a folder whose names match one of the patterns; none if there is no folder."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return [path for path in paths if path.is_file() and any(pattern.fullmatch(path.name) for pattern in patterns)]


def prompt_folders(folder):
    """The folders of prompts inside a folder, in the geneval layout."""
    return [path for path in folder.iterdir() if path.is_dir() and PROMPT.fullmatch(path.name)]


def files_of_a_run(folder):
    """The files in a folder that have the names of sampled files, in any layout."""
    found = files_named(folder, OF_AN_IMAGE, SHEET)
    for home in prompt_folders(folder):
        found += files_named(home, OF_A_PROMPT) + files_named(home / "samples", OF_AN_IMAGE)
    return found


def goes_on(folder, settings, own):
    """Whether a folder holds part of a flat or geneval run with these settings, which this run continues.

    own: whether the folder is sample.py's default, where any files named like samples may be removed. Raises ValueError
    if the folder's run had other settings; and if a folder that the user named, without a sheet.png, holds files named
    like samples that no recorded run has written.
    """
    path = folder / SETTINGS
    if not path.exists():
        strange = [] if own or files_named(folder, SHEET) else files_of_a_run(folder)
        if strange:
            raise ValueError(f"{folder} holds {strange[0].relative_to(folder)}, which no run of sample.py has left "
                             "there: choose another --folder, or remove it")
        return False
    if settings["layout"] == "sheet" or layout_of(path) == "sheet":
        return False
    claim(path, settings, f"{folder} holds images of other settings: choose another --folder or remove it")
    return True


def layout_of(path):
    """The layout recorded in a file of settings, or "" if the file is damaged."""
    try:
        return json.loads(path.read_text("utf-8"))["layout"]
    except (ValueError, LookupError, TypeError):
        return ""


def start_run(folder, settings, kept):
    """Remove the files of an earlier run from a folder, except for the paths `kept`, and record this run's settings."""
    for path in files_of_a_run(folder):
        if path not in kept:
            path.unlink()
    for home in prompt_folders(folder):
        for empty in home / "samples", home:
            with contextlib.suppress(OSError):  # it holds files that sampling did not write
                empty.rmdir()
    if not kept:
        (folder / SETTINGS).unlink(missing_ok=True)
    claim(folder / SETTINGS, settings, "")


def read_image(path, scale=1):
    """Read an image that was enlarged `scale` times when it was written: its original pixels (H, W, 3), uint8."""
    with Image.open(path) as image:
        return np.asarray(image)[::scale, ::scale]


def write_sheet(folder, labels, scale):
    """Write the contact sheet of the images, which are enlarged `scale` times, with a label under each."""
    images = np.stack([read_image(path_of(folder, "sheet", i, 1), scale) for i in range(len(labels))])
    save_image(contact_sheet(to_pixels(images).permute(0, 3, 1, 2), labels), folder / "sheet.png")


def write_geneval_sheets(folder, entries, per_prompt):
    """Write the files that GenEval's scorer expects beside the samples of each prompt."""
    for number, entry in enumerate(entries):
        home = folder / f"{number:05d}"
        (home / "metadata.jsonl").write_text(json.dumps(entry) + "\n", "utf-8")
        images = np.stack([read_image(home / "samples" / f"{k:04d}.png") for k in range(per_prompt)])
        save_image(contact_sheet(to_pixels(images).permute(0, 3, 1, 2), scale=1), home / "grid.png")
