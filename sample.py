"""Samples images from prompts in a few steps, with the likelihood of their trajectories.

    python sample.py --prompt="a red apple, fluent style"            # by the model that comes with the repository
    python sample.py --out_dir=out/digits --num_samples=16 --seed=1
    python sample.py --out_dir=out/shapes --prompts=prompts.txt --guidance=2 --denoise=score --show_trajectory=True
    python sample.py --prompts=evaluation_metadata.jsonl --layout=geneval --num_samples=4
    torchrun --nproc_per_node=8 sample.py --out_dir=out/t2i --decoder=decoder.pt2 --num_samples=10000 --layout=flat

Leaves in out_dir/images: sheet.png with the prompts under the images, the single images 0000.png, 0001.png, ... and,
with --show_trajectory=True, the levels from noise to image for each, a strip 0000_trajectory.png and a film .gif. Where
the trajectory was carried back to x-space, for these or for --denoise=score|none, its -log p stands beside the prompt.
A model of latents leaves them as 0000.npy, ... and makes images with --decoder; without, the PNGs are a first look.
What an earlier run left in the folder under such names is removed.

For judges of many images there are two other layouts (plumbing/layouts.py), which an interrupted run continues.
Under torchrun the ranks share the images, which are the same as without it.
A flow-matching checkpoint is sampled by Euler's method, without a denoiser or a likelihood. From Python: pipeline.py.
"""

import hashlib
import itertools
from collections import ChainMap
from pathlib import Path

import numpy as np
import torch

from configurator import configure
from data import dataset_class_captions, open_dataset
from pipeline import SHIPPED, load
from plumbing.images import contact_sheet, save_film, save_image, to_pil
from plumbing.layouts import (LAYOUTS, goes_on, make_folder, path_of, read_prompts, start_run, write_geneval_sheets,
                              write_sheet)
from plumbing.runtime import from_first_rank, gathered, leave_ranks, note, one_line_errors, start_ranks

out_dir = ""  # the folder of ckpt.pt and denoiser.pt; empty: assets/emoji64. Nothing is written into assets/
prompt = ""  # one caption; if it and `prompts` are empty: out_dir/prompts.txt, or captions of the model's data set
prompts = ""  # a text file with one caption a line, empty for any image; or a .jsonl file with a "prompt" a line
num_samples = 16  # images of each prompt; without prompts, images in all
steps = 0  # T, the number of reverse steps; 0: as trained, or 50 for flow matching
guidance = 1.0  # weight of classifier-free guidance; 0: none
restarts = 0  # (ours) times that noise is added back and a step repeated, for the first half's steps except the first
temperature = 1.0  # (ours) factor on the noise of the last step; 0.3: less grain, at the price of exact sampling
best_of = 1  # (ours) candidates per image; the model keeps the one that it finds likeliest
denoise = "learned"  # "learned": by denoiser.pt in one pass; "score": by the model's score; "none": leave the noise
t_min = 0.02  # noise level where sampling ends; the denoiser sets its own
shift = 1.0  # e^m of flow matching's time grid; 1: equal steps. An NTM keeps the grid of its training
seed = 0  # the same seed gives the same images, whatever the batch size
batch_size = 64  # images that are sampled at once
show_trajectory = False  # also write a strip and a GIF of all noise levels for each image
scale = 1  # enlarge single images so many times
layout = "sheet"  # "sheet": with a contact sheet; "flat": single images alone; "geneval": a folder for each prompt
folder = ""  # where the images go; empty: out_dir/images, or out/images/NAME for a model in assets/
decoder = ""  # for a model of latents: a torch.export program, latents (B, C, h, w) to images in [-1, 1]
device = ""  # cuda, mps or cpu; empty: the best available


def captions_to_sample(model):
    """A caption for each image, and what a file of prompts says about each, a dict a prompt."""
    if prompt and prompts:
        raise ValueError(f"there are both prompt, {prompt!r}, and prompts, {prompts!r}: leave one out")
    entries = read_prompts(prompts) if prompts else [{"prompt": prompt}] if prompt else []
    if entries:
        return [entry["prompt"] for entry in entries for _ in range(num_samples)], entries
    own = model.path.with_name("prompts.txt")
    captions = ([entry["prompt"] for entry in read_prompts(str(own))] if own.exists() else
                dataset_class_captions(model.settings["dataset"]))
    if captions is None:
        try:
            dataset = open_dataset(model.settings, "val")
        except (ValueError, OSError) as error:
            raise ValueError(f"without --prompt, captions are of the model's data set: {error}") from error
        captions = [dataset[i][1] for i in range(min(num_samples, len(dataset)))]
    return [captions[i % len(captions)] for i in range(num_samples)], []


def check_layout():
    """Raises ValueError for a layout that is none, or that has no place for what is asked of it."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose 'sheet', 'flat' or 'geneval'")
    if layout == "geneval" and not prompts and not prompt:
        raise ValueError("layout 'geneval' makes a folder for each prompt: name a file of them in --prompts")
    if layout != "sheet" and show_trajectory:
        raise ValueError(f"layout {layout!r} has no place for strips: leave show_trajectory out")


def folder_of(source):
    """Where the images of the model in the folder `source` go. Nothing is written to assets/."""
    if folder:
        return Path(folder)
    shipped = source.resolve().parent == SHIPPED.parent.resolve()
    return Path("out/images", source.resolve().name) if shipped else source / "images"


def missing(to, settings, count):
    """The numbers of the images, of `count`, that are to be sampled: all, but for those of an interrupted run."""
    make_folder(to)
    if not goes_on(to, settings, own=not folder):
        return list(range(count))
    return [i for i in range(count) if not path_of(to, layout, i, num_samples).exists()]


def sampled(model, captions, batches):
    """For each batch of numbers: these, its samples, the images to look at, and of an NTM trajectories and nats."""
    in_x_space = show_trajectory or model.denoise == "none"
    for numbers in batches:
        of_batch = [captions[i] for i in numbers]
        how = guidance, seed, in_x_space, best_of, restarts, temperature
        samples, x, nll = model.sample_trajectories(of_batch, numbers, *how)
        yield numbers, samples, model.to_images(samples), x, nll


def write_images(model, to, numbers, samples, images, x):
    """Writes what the layout has of each image of a batch."""
    for j, i in enumerate(numbers):
        path = path_of(to, layout, i, num_samples)
        if model.latents and layout == "sheet":  # the others are for judges, some of which take .npy for an image
            np.save(path.with_suffix(".npy"), model.plain_latents(samples[j]).half().cpu().numpy())
        save_image(to_pil(images[j], scale), path)  # the last of an image: a run that goes on looks for it
        if show_trajectory:
            levels = model.to_images(model.network.unpatchify(x[j]))
            save_image(strip(levels, images[j], model), path.with_name(f"{i:04d}_trajectory.png"))
            save_film(torch.cat([levels.flip(0), images[j:j + 1]]), path.with_name(f"{i:04d}_trajectory.gif"))


def strip(levels, image, model):
    """Of many levels (T+1, C, H, W) about eight, and the final image (C, H, W), side by side, noise first."""
    shown = slice(None, None, -(-len(levels) // 9))
    names = [f"t = {t:.2f}" for t in model.ts.flip(0)[shown].tolist()] + [f"denoise: {model.denoise}"]
    return contact_sheet(torch.cat([levels.flip(0)[shown], image[None]]), names, columns=len(names))


def report(model, count, seconds, nlls):
    """Prints the speed of `count` images, by the seconds of each stage on each rank, and the likelihood of some."""
    slowest = {stage: max(of_rank.get(stage, 0) for of_rank in seconds) for stage in seconds[0]}
    for stage, of_stage in slowest.items():
        print(f"{stage}: {count / of_stage:.1f} images/s")
    if count:
        everything = max(sum(of_rank.values()) for of_rank in seconds)
        where = f"{len(seconds)} x {model.device.type}" if len(seconds) > 1 else model.device.type
        print(f"all together: {count / everything:.1f} images/s on {where}")
    if nlls:
        mean = sum(nlls) / len(nlls)
        numbers = len(model.ts) * model.network.config.num_tokens * model.network.config.token_dim
        line = f"trajectory NLL: {mean:.2f} nats, {mean / numbers:.4f} for each of its {numbers} numbers"
        if guidance:
            line += ", under the model without guidance"
        typical = model.held_out_nll()
        if typical is not None:
            line += f"; trajectories of held-out images have {typical:.4f} (lower is likelier)"
        print(line)


@one_line_errors()
@torch.no_grad()
def main(config):
    where, rank, world = start_ranks(device)
    check_layout()
    source = Path(out_dir or SHIPPED)
    model = load(source, where, steps, denoise, t_min, shift)
    if "t_min" in config.given and model.denoise == "learned":
        note(f"t_min is {model.ts[0]:g}, the noise level that the denoiser was distilled for, whatever is given")
    captions, entries = captions_to_sample(model)
    if decoder:
        model.load_decoder(decoder)
    elif model.latents and layout != "sheet":
        note("without --decoder the images are a first look at latents, and nothing that a score could be taken of")

    # what is wrong with captions or folder is told before anything is sampled
    model.warn_about_captions(captions)
    to = folder_of(source)
    settings = {name: value for name, value in config.items() if name not in ("device", "batch_size")}
    settings |= {"iteration": model.iteration, "denoise": model.denoise,  # "score" until there is a denoiser
                 "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest()}
    wanted = from_first_rank(missing, to, settings, len(captions))

    # the ranks take the batches in turns; what is wrong with the first is told before an earlier run's images go
    batches = [wanted[start:start + batch_size] for start in range(0, len(wanted), batch_size)]
    drawn = sampled(model, captions, batches[rank::world])
    first = list(itertools.islice(drawn, 1))
    done = {path_of(to, layout, i, num_samples) for i in set(range(len(captions))) - set(wanted)}
    from_first_rank(start_run, to, settings, done)
    nlls = {}
    for numbers, samples, images, x, nll in itertools.chain(first, drawn):
        write_images(model, to, numbers, samples, images, x)
        if nll is not None:
            nlls |= zip(numbers, nll.tolist())

    nlls = dict(ChainMap(*gathered(nlls)))
    seconds = gathered(model.seconds)
    if rank == 0:
        if layout == "sheet":
            labels = [f"{caption}\n-log p = {nlls[i]:.1f}" if nlls else caption for i, caption in enumerate(captions)]
            write_sheet(to, labels, scale)
        elif layout == "geneval":
            write_geneval_sheets(to, entries, num_samples)
        report(model, len(wanted), seconds, nlls.values())
        print("wrote", to / "sheet.png" if layout == "sheet" else f"{len(wanted)} of {len(captions)} images into {to}")
    leave_ranks()


if __name__ == "__main__":
    main(configure(globals()))
