"""Sample images from prompts in a few steps, with the likelihood of their trajectories.

    python sample.py --prompt="a red apple, fluent style"            # by the shipped model
    python sample.py --out_dir=out/digits --num_samples=16 --seed=1
    python sample.py --out_dir=out/shapes --prompts=prompts.txt --guidance=2 --denoise=score --show_trajectory=True
    python sample.py --prompts=evaluation_metadata.jsonl --layout=geneval --num_samples=4
    torchrun --nproc_per_node=8 sample.py --out_dir=out/t2i --decoder=decoder.pt2 --num_samples=10000 --layout=flat

Writes into out_dir/images: sheet.png with the prompts under the images, and the single images 0000.png, 0001.png, ...
With --show_trajectory=True each image also gets a strip of its levels, 0000_trajectory.png, and a film of them, a .gif.
With --show_trajectory, or --denoise=score or none, the sheet shows each sample's -log p.
A model of latents also writes 0000.npy, ...; --decoder makes images of latents, and without it the PNGs are a preview.
Images that an earlier run left in the folder are removed.

Two other layouts (plumbing/layouts.py) are for programs that score many images; these continue an interrupted run.
Under torchrun the ranks share the work, and the images stay the same.
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
from plumbing.runtime import from_first_rank, gathered, leave_ranks, meet_ranks, note, one_line_errors, start_ranks

out_dir = ""  # the folder of ckpt.pt and denoiser.pt; empty: the shipped model, assets/emoji64
prompt = ""  # one caption; without prompt and prompts: captions of out_dir/prompts.txt, or of the model's data set
prompts = ""  # a text file with a caption per line (an empty line: any image), or a .jsonl with a "prompt" per line
num_samples = 16  # images per prompt; without prompts, images in all
steps = 0  # T, the number of reverse steps; 0: as trained, or 50 for flow matching
guidance = 1.0  # weight of classifier-free guidance; 0: none
restarts = 0  # (ours) times to add noise back and repeat a step; in the first half of the steps, except the first
temperature = 1.0  # (ours) factor on the noise of the last step; 0.3: less grain, but no longer exact sampling
best_of = 1  # (ours) candidates per image, of which the likeliest under the model is kept
denoise = "learned"  # "learned": one pass of denoiser.pt; "score": by the model's own score; "none": keep the noise
t_min = 0.02  # noise level where sampling ends; a learned denoiser sets its own
shift = 1.0  # e^m of flow matching's time grid, 1 for equal steps; an NTM keeps the grid of its training
seed = 0  # the same seed gives the same images, whatever the batch size
batch_size = 64  # images sampled at once
show_trajectory = False  # also write a strip and a GIF of all noise levels for each image
scale = 1  # factor by which single images are enlarged
layout = "sheet"  # "sheet": images and a contact sheet; "flat": images alone; "geneval": a folder for each prompt
folder = ""  # where the images go; empty: out_dir/images, or out/images/NAME for a model in assets/
decoder = ""  # for a model of latents: a program saved by torch.export, from latents (B, C, h, w) to images in [-1, 1]
device = ""  # cuda, mps or cpu; empty: the best available


def captions_to_sample(model):
    """The caption of each image; and a dict per prompt, none if there are only default captions. Raises ValueError."""
    if prompt and prompts:
        raise ValueError(f"prompt is {prompt!r} and prompts is {prompts!r}, but only one may be given: leave one out")
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
            raise ValueError(f"without --prompt, the captions are those of the model's data set: {error}") from error
        captions = [dataset[i][1] for i in range(min(num_samples, len(dataset)))]
    return [captions[i % len(captions)] for i in range(num_samples)], []


def check_layout():
    """Raise ValueError for an unknown layout, or one that does not go with the other settings."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose 'sheet', 'flat' or 'geneval'")
    if layout == "geneval" and not prompts and not prompt:
        raise ValueError("layout 'geneval' makes a folder for each prompt: name a file of them in --prompts")
    if layout != "sheet" and show_trajectory:
        raise ValueError(f"layout {layout!r} has no place for strips: leave show_trajectory out")


def folder_of(source):
    """The folder for the images of the model in the folder `source`; without --folder never in assets/."""
    if folder:
        return Path(folder)
    shipped = source.resolve().parent == SHIPPED.parent.resolve()
    return Path("out/images", source.resolve().name) if shipped else source / "images"


def missing(to, settings, count):
    """The numbers of the images that are still to be sampled, out of `count`: an interrupted run continues."""
    make_folder(to)
    if not goes_on(to, settings, own=not folder):
        return list(range(count))
    return [i for i in range(count) if not path_of(to, layout, i, num_samples).exists()]


def sampled(model, captions, batches):
    """Yield each batch's numbers, samples, images to show, trajectories and their -log p; the last two may be None."""
    in_x_space = show_trajectory or model.denoise == "none"
    for numbers in batches:
        of_batch = [captions[i] for i in numbers]
        how = guidance, seed, in_x_space, best_of, restarts, temperature
        samples, x, nll = model.sample_trajectories(of_batch, numbers, *how)
        yield numbers, samples, model.to_images(samples), x, nll


def write_images(model, to, numbers, samples, images, x):
    """Write the files of each image of a batch, as the layout asks for."""
    for j, i in enumerate(numbers):
        path = path_of(to, layout, i, num_samples)
        if model.latents and layout == "sheet":  # other layouts feed scoring programs, which might read a .npy
            np.save(path.with_suffix(".npy"), model.plain_latents(samples[j]).half().cpu().numpy())
        save_image(to_pil(images[j], scale), path)  # last in layouts that continue: the PNG marks an image as done
        if show_trajectory:
            levels = model.to_images(model.network.unpatchify(x[j]))
            save_image(strip(levels, images[j], model), path.with_name(f"{i:04d}_trajectory.png"))
            save_film(torch.cat([levels.flip(0), images[j:j + 1]]), path.with_name(f"{i:04d}_trajectory.gif"))


def strip(levels, image, model):
    """At most nine of the levels (T+1, C, H, W), noise first, and the final image (C, H, W), side by side."""
    shown = slice(None, None, -(-len(levels) // 9))
    names = [f"t = {t:.2f}" for t in model.ts.flip(0)[shown].tolist()] + [f"denoise: {model.denoise}"]
    return contact_sheet(torch.cat([levels.flip(0)[shown], image[None]]), names, columns=len(names))


def report(model, count, seconds, nlls):
    """Print how fast `count` images were sampled, and the mean of their trajectory NLLs.

    seconds: {stage: seconds} of each rank. nlls: in nats, empty if unknown.
    """
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
        huge = abs(mean) > 1e6 * numbers  # with steps that the model was not trained for
        total, each = (".1e", ".1e") if huge else (".2f", ".4f")
        line = f"trajectory NLL: {mean:{total}} nats, {mean / numbers:{each}} for each of its {numbers} numbers"
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
        note(f"t_min is {model.ts[0]:g}, the noise level that the denoiser was distilled for: the given one is ignored")
    captions, entries = captions_to_sample(model)
    if decoder:
        model.load_decoder(decoder)
    elif model.latents and layout != "sheet":
        note("without --decoder the images are a preview of latents: do not score them")

    # report faults of captions and folder before sampling
    model.warn_about_captions(captions)
    to = folder_of(source)
    settings = {name: value for name, value in config.items() if name not in ("device", "batch_size")}
    settings |= {"iteration": model.iteration, "denoise": model.denoise,  # "score" where there is no denoiser
                 "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest()}
    wanted = from_first_rank(missing, to, settings, len(captions))

    if rank == 0 and wanted:
        print(f"draws {len(wanted)} images on {model.device.type}", flush=True)

    # ranks take batches in turn; if the first batch fails, the images of an earlier run are still there
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
    meet_ranks()
    leave_ranks()


if __name__ == "__main__":
    main(configure(globals()))
