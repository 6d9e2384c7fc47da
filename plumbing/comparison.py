"""Folders of PNGs for programs that compare images, such as clean-fid and torch-fidelity.

One folder holds decoded samples of a model of latents, the other real images of the same size, cropped as for encoding.
Neither holds any other file.
"""

import json

from tqdm import tqdm

from plumbing.images import save_image, to_pil
from plumbing.layouts import OF_AN_IMAGE, files_named, make_folder
from plumbing.loader import collate
from plumbing.runtime import note, rank_and_world
from plumbing.shards import Shards


def empty_folder(folder):
    """Make a folder, or remove the images that an earlier run left in it."""
    make_folder(folder)
    for path in files_named(folder, OF_AN_IMAGE):
        path.unlink()


def write_folder(folder, numbers, images):
    """Write images (n, C, H, W) in [-1, 1] under their numbers: 0000.png, 0001.png, ..."""
    for number, image in zip(numbers, images):
        save_image(to_pil(image), folder / f"{number:04d}.png")


def source_of(latents):
    """The folder whose images `data.py encode` made into these latents; "" if they were made in another way."""
    shard = latents.paths[0]
    for folder in shard.parent, shard.parent.parent:
        try:
            return json.loads((folder / "encoding.json").read_text("utf-8"))["data_dir"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return ""


def open_real_images(latents, to_images, device, images_dir):
    """The held-out images that latents were made of, in the size of decoded ones; None and a note if there are none.

    to_images: a function from latents (B, C, h, w), on the device, to images. images_dir: the images' shards; empty:
    those that were encoded. Raises ValueError or OSError for an images_dir that is given but cannot be read.
    """
    height, width = to_images(latents[0][0][None].to(device)).shape[2:]
    source = images_dir or source_of(latents)
    try:
        if not source:
            raise ValueError("there is no encoding.json beside the latents")
        return Shards(source, "val", 3, height, width)
    except (OSError, ValueError) as error:
        if images_dir:
            raise
        note(f"the real images cannot be read ({error}): decoded latents take their place, unless --real_dir names "
             "them")
        return None


def write_real_images(folder, latents, count, to_images, device, images_dir="", batch_size=100):
    """Write `count` real images, or as many as are held out, into an empty folder, by all ranks.

    latents: the held-out set to compare the model with. The rest is as in open_real_images.
    """
    images = open_real_images(latents, to_images, device, images_dir)
    there = len(latents if images is None else images)
    if there < count:
        note(f"there are only {there} real images for {count} samples: compare equal numbers")
    count = min(count, there)
    rank, world = rank_and_world()
    for start in tqdm(range(0, count, batch_size)[rank::world], "real images", leave=False, disable=rank > 0):
        numbers = list(range(start, min(start + batch_size, count)))
        if images is None:
            batch = to_images(collate(latents.__getitems__(numbers))[0].to(device))
        else:
            batch = collate(images.__getitems__(numbers))[0]
        write_folder(folder, numbers, batch)
