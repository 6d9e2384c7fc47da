"""Samples images from prompts in a few steps, with the likelihood of their trajectories.

    python sample.py --prompt="a red apple, fluent style"            # by the model that comes with the repository
    python sample.py --out_dir=out/digits --num_samples=16 --seed=1
    python sample.py --out_dir=out/shapes --prompts=prompts.txt --guidance=2 --denoise=score --show_trajectory=True
    python sample.py --prompts=evaluation_metadata.jsonl --layout=geneval --num_samples=4

Leaves in out_dir/images: sheet.png with the prompts under the images, the single images 0000.png, 0001.png, ... and,
with --show_trajectory=True, the levels from noise to image for each, a strip 0000_trajectory.png and a film .gif. Where
the trajectory was carried back to x-space, for these or for --denoise=score|none, its -log p stands beside the prompt.
A model of latents leaves them as 0000.npy, ... and makes images with --decoder; without, the PNGs are a first look.

For judges of many images there are two other layouts (plumbing/layouts.py), which an interrupted run continues.
A flow-matching checkpoint is sampled by Euler's method, without a denoiser or a likelihood. From Python: pipeline.py.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch

from configurator import configure
from data import dataset_class_captions, open_dataset
from pipeline import SHIPPED, load
from plumbing.images import contact_sheet, save_film, save_image, to_pil
from plumbing.layouts import LAYOUTS, make_folder, path_of, read_prompts, write_geneval_sheets
from plumbing.runtime import claim, note, one_line_errors

out_dir = ""  # holds ckpt.pt and, for --denoise=learned, denoiser.pt; empty: assets/emoji. Nothing goes into assets/
prompt = ""  # one caption; empty, and without `prompts`: out_dir/prompts.txt, or captions of the data it was trained on
prompts = ""  # a text file with one caption a line, an empty line asking for anything; or .jsonl, a "prompt" each
num_samples = 16  # images of the one prompt or of each line of the file; without either, images in all
steps = 0  # T; 0: as trained, or 50 for flow matching
guidance = 1.0  # weight of classifier-free guidance; 0: none
restarts = 0  # times that each step of the first half but the first is taken again, from noise added anew
best_of = 1  # candidates for each image, of which the one is kept that the model finds likeliest
denoise = "learned"  # by the denoiser in one pass; "score": by the model's own score; "none": as sampled, at t_min
t_min = 0.02  # the noise level where sampling ends; the denoiser knows its own
shift = 1.0  # e^m of the time grid of flow matching, 1: equal steps; an NTM keeps the one that it was trained on
seed = 0  # the same seed gives the same images, whatever the batch size
batch_size = 64
show_trajectory = False  # also a strip and a film of every level for each image
scale = 1  # how many times single images are enlarged
layout = "sheet"  # "flat": single images and nothing else; "geneval": a folder for each prompt
folder = ""  # where the images go; empty: out_dir/images, or of a model in assets/ out/images/NAME
decoder = ""  # of a model of latents: a program saved by torch.export, latents (B, C, h, w) to images in [-1, 1]
device = ""  # cuda, mps or cpu; empty: the best there is

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


def strip(levels, image, model):
    """Of many levels (T+1, C, H, W) about eight, and the final image (C, H, W), side by side, noise first."""
    shown = slice(None, None, -(-len(levels) // 9))
    names = [f"t = {t:.2f}" for t in model.ts.flip(0)[shown].tolist()] + [f"denoise: {model.denoise}"]
    return contact_sheet(torch.cat([levels.flip(0)[shown], image[None]]), names, columns=len(names))


@one_line_errors()
@torch.no_grad()
def main(config):
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is unknown: choose 'sheet', 'flat' or 'geneval'")
    model = load(source := Path(out_dir or SHIPPED), device, steps, denoise, t_min, shift)
    if "t_min" in config.given and model.denoise == "learned":
        note(f"t_min is {model.ts[0]:g}, the noise level that the denoiser was distilled for, whatever is given")
    captions, entries = captions_to_sample(model)
    if layout == "geneval" and not entries:
        raise ValueError("layout 'geneval' makes a folder for each prompt: name a file of them in --prompts")
    if layout != "sheet" and show_trajectory:
        raise ValueError(f"layout {layout!r} has no place for strips: leave show_trajectory out")
    if decoder:
        model.load_decoder(decoder)
    # what is wrong with captions or folder is told before anything is sampled
    model.note_what_is_lost(captions)
    shipped = source.resolve().parent == SHIPPED.parent.resolve()  # assets/ is not written to
    make_folder(to := Path(folder or (Path("out/images", source.resolve().name) if shipped else source / "images")))
    if layout != "sheet":
        ours = {name: value for name, value in config.items() if name not in ("device", "batch_size")}
        ours |= {"iteration": model.iteration, "denoise": model.denoise,  # "score" until there is a denoiser
                 "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest()}
        claim(to / ".settings.json", ours, f"{to} holds images of other settings: choose another --folder or remove it")

    shown, nlls = [], []
    wanted = [i for i in range(len(captions)) if layout == "sheet" or not path_of(to, layout, i, num_samples).exists()]
    for start in range(0, len(wanted), batch_size):
        numbers = wanted[start:start + batch_size]
        samples, x, nll = model.sample_trajectories([captions[i] for i in numbers], numbers, guidance, seed,
                                                    show_trajectory or model.denoise == "none", best_of, restarts)
        images = model.to_images(samples)
        nlls += [] if nll is None else nll.tolist()
        shown += [images] if layout == "sheet" else []
        for j, i in enumerate(numbers):
            path = path_of(to, layout, i, num_samples)
            if model.latents:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path.with_suffix(".npy"), model.plain_latents(samples[j]).half().cpu().numpy())
            save_image(to_pil(images[j], scale), path)  # the last: a run that continues looks for it
            if show_trajectory:
                levels = model.to_images(model.network.unpatchify(x[j]))
                save_image(strip(levels, images[j], model), path.with_name(f"{i:04d}_trajectory.png"))
                save_film(torch.cat([levels.flip(0), images[j:j + 1]]), path.with_name(f"{i:04d}_trajectory.gif"))
    if layout == "sheet":
        labels = [f"{caption}\n-log p = {nll:.1f}" for caption, nll in zip(captions, nlls)] or captions
        save_image(contact_sheet(torch.cat(shown), labels), to / "sheet.png")
    elif layout == "geneval":
        write_geneval_sheets(to, entries, num_samples)

    for stage, seconds in model.seconds.items():
        print(f"{stage}: {len(wanted) / seconds:.1f} images/s")
    if wanted:
        print(f"all together: {len(wanted) / sum(model.seconds.values()):.1f} images/s on {model.device.type}")
    if nlls:
        mean, numbers = sum(nlls) / len(nlls), x[0].numel()
        print(f"trajectory NLL: {mean:.2f} nats, {mean / numbers:.4f} for each of its {numbers} numbers"
              + (", under the model without guidance" if guidance else ""))
    print("wrote", to / "sheet.png" if layout == "sheet" else f"{len(wanted)} of {len(captions)} images into {to}")


if __name__ == "__main__":
    main(configure(globals()))
