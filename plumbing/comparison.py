"""Two folders of PNGs for programs that compare images, such as clean-fid and torch-fidelity: samples of a model of
latents, decoded, and real images of the same size, prepared as for encoding. There is nothing else in them."""

import json

from tqdm import tqdm

from plumbing.images import save_image, to_pil
from plumbing.layouts import OF_AN_IMAGE, files_named, make_folder
from plumbing.loader import collate
from plumbing.runtime import note, rank_and_world
from plumbing.shards import Shards


def empty_folder(folder):
    """Makes a folder, or removes the images that an earlier run has left there."""
    make_folder(folder)
    for path in files_named(folder, OF_AN_IMAGE):
        path.unlink()


def write_folder(folder, numbers, images):
    """Writes images (n, C, H, W) in [-1, 1] under their numbers: 0000.png, 0001.png, ..."""
    for number, image in zip(numbers, images):
        save_image(to_pil(image), folder / f"{number:04d}.png")


def source_of(latents):
    """Where `data.py encode` has found the images of shards of latents, or "" if they were not made by it."""
    shard = latents.paths[0]
    for folder in shard.parent, shard.parent.parent:
        try:
            return json.loads((folder / "encoding.json").read_text("utf-8"))["data_dir"]
        except (OSError, ValueError, LookupError, TypeError):
            continue
    return ""


def open_real_images(latents, height, width, images_dir):
    """The held-out images that shards of latents were made of, scaled and cropped to height x width; or None, and a
    note, where they are no longer. images_dir: which shards; empty: those that were encoded. Raises ValueError or
    OSError for an images_dir that is given."""
    source = images_dir or source_of(latents)
    try:
        if not source:
            raise ValueError("there is no encoding.json beside the latents")
        return Shards(source, "val", 3, height, width)
    except (OSError, ValueError) as error:
        if images_dir:
            raise
        note(f"in place of the real images there are reconstructions, decoded latents: name the images in --real_dir "
             f"({error})")
        return None


def write_real_images(folder, latents, count, to_images, device, images_dir="", batch_size=100):
    """Writes `count` real images, or as many as are held out, into an empty folder, by all ranks.

    latents: the held-out set that the model is compared with. to_images: its latents (B, C, h, w), on the device, to
    images, which decides their size. images_dir: as open_real_images's.
    """
    height, width = to_images(latents[0][0][None].to(device)).shape[2:]
    images = open_real_images(latents, height, width, images_dir)
    there = len(latents if images is None else images)
    if there < count:
        note(f"there are only {there} real images for {count} samples: a distance wants as many of both")
    count = min(count, there)
    rank, world = rank_and_world()
    for start in tqdm(range(0, count, batch_size)[rank::world], "real images", leave=False, disable=rank > 0):
        numbers = list(range(start, min(start + batch_size, count)))
        if images is None:
            batch = to_images(collate(latents.__getitems__(numbers))[0].to(device))
        else:
            batch = collate(images.__getitems__(numbers))[0]
        write_folder(folder, numbers, batch)
