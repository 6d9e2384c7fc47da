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
A flow-matching checkpoint is sampled by Euler's method, without a denoiser or a likelihood. From Python: load().
"""

import hashlib
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from configurator import configure
from data import dataset_class_captions, get_tokenizer, open_dataset
from flow import bits_per_dim, forward_trajectory, taken_again, time_grid
from fm import EULER_STEPS, FlowMatching
from model import NTM, Denoiser
from plumbing import checkpoint
from plumbing.images import contact_sheet, save_film, save_image, to_pil
from plumbing.layouts import LAYOUTS, make_folder, path_of, read_prompts, write_geneval_sheets
from plumbing.runtime import claim, coarse_products, find_device, note, one_line_errors
from plumbing.tokenizer import words

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

SHIPPED = Path(__file__).parent / "assets" / "emoji"
TRAJECTORIES = 2  # of each candidate that best_of compares


class LogLikelihood(NamedTuple):
    """A lower bound on log p(x_{t_min} | caption) of each image, estimated from several trajectories; all (B,)."""
    nats: torch.Tensor
    standard_error: torch.Tensor  # of the estimate, in nats
    bits_per_dim: torch.Tensor  # an upper bound; other models' are to be compared with those at t_min = 0


class TrainedModel:
    """Captions in, images out: an NTM with a way to denoise, or a flow-matching model.

    out_dir: holds ckpt.pt and, for denoise "learned", denoiser.pt, which knows its own t_min. device: cuda, mps or cpu;
    empty: the best there is; the rest is choose()'s. Raises ValueError.

    network, kind ("ntm" or "fm"), settings (of its training), tokenizer, ts (T+1,): its noise levels, cleanest first.
    latents: {"mean", "scale"} of each channel if it samples normalised latents, else None; seconds: {stage: so far}.
    """

    def __init__(self, out_dir=SHIPPED, device="", *chosen, **by_name):
        self.path, self.device = Path(out_dir) / "ckpt.pt", find_device(device)
        self.network, trained = checkpoint.load_network(self.path, {"ntm": NTM, "fm": FlowMatching}, self.device)
        self.kind, self.settings, self.iteration = trained["kind"], trained["settings"], trained["iter"]
        self.tokenizer = get_tokenizer(self.settings["tokenizer"], trained.get("vocabulary"))
        self.words = set(trained.get("words", ()))  # of its training captions; older checkpoints do not have them
        self.latents, self.denoiser = self.settings.get("latents"), None
        self.choose(*chosen, **by_name)

    def choose(self, steps=0, denoise="learned", t_min=0.02, shift=1.0):
        """Sets noise levels and way to denoise, and the clock to zero. steps: T, or Euler's; 0: as trained, or 50.
        denoise: of an NTM. shift: of Euler's steps."""
        if denoise not in ("learned", "score", "none"):
            raise ValueError(f"denoise {denoise!r} is unknown: choose 'learned', 'score' or 'none'")
        if type(steps) is not int or steps < 0:
            raise ValueError(f"steps is {steps}, but must be an int of at least 1, or 0 for the default")
        config, self.seconds = self.network.config, {}
        if self.kind == "fm":
            self.denoise, ts = "none", time_grid(steps or EULER_STEPS, 0.0, 0, shift)
        else:
            if shift != 1:
                raise ValueError(f"shift is {shift}, but is of flow matching: an NTM keeps the grid of its training")
            if steps and steps not in config.steps:
                note(f"the model was trained for {' or '.join(map(str, config.steps))} steps: in {steps}, samples and "
                     "likelihoods are worse")
            if denoise == "learned" and (obstacle := self.obstacle(steps)):
                note(f"{obstacle}: denoising by the model's own score instead, which is slower")
                denoise = "score"
            self.denoise = denoise
            ts = config.time_grid(self.distilled["t_min"] if denoise == "learned" else t_min, steps)
        self.ts = ts.to(self.device)

    def obstacle(self, steps=0):
        """Why trajectories of so many steps have no learned denoiser, or "" if they have: it is then loaded. Raises
        ValueError for the denoiser of another model."""
        path, steps = self.path.with_name("denoiser.pt"), steps or self.network.config.steps[0]
        if not path.exists():
            return f"there is no {path}, which distill.py makes"
        if self.denoiser is None:
            denoiser, distilled = checkpoint.load_network(path, {"denoiser": Denoiser}, self.device)
            for name in ("image_size", "channels", "patch_size", "vocab_size", "text_len"):
                theirs, ours = getattr(denoiser.config, name), getattr(self.network.config, name)
                if theirs != ours:
                    raise ValueError(f"{path} is of another model: its {name} is {theirs}, the model's {ours}; "
                                     "distil it anew, or choose --denoise=score")
            if distilled.get("teacher", self.iteration) != self.iteration:
                raise ValueError(f"{path} was distilled from iteration {distilled['teacher']}, the model is at "
                                 f"{self.iteration}: remove it and distil anew, or choose --denoise=score")
            self.denoiser, self.distilled = denoiser, distilled["settings"]
        learned = self.distilled["steps"] or self.denoiser.config.steps[0]
        return f"{path} was distilled for {learned} steps, not {steps}" if steps != learned else ""

    def remark(self, captions):
        """Notes what of the captions is lost on the model: words it was never shown, and what it has no room for.
        Raises ValueError for what is no list of captions."""
        self.encode(captions)
        if self.words and (unknown := sorted(words(captions) - self.words)):
            note(f"the model was trained without the words {', '.join(unknown)[:200]}")
        room = self.network.config.text_len
        if cut := [caption for caption in dict.fromkeys(captions) if len(self.tokenizer.tokens(caption)) > room]:
            kept = self.tokenizer.decode(self.tokenizer.tokens(cut[0])[:room])
            note(f"captions are cut to {room} tokens, {len(cut)} of these: of {cut[0][:200]!r} it reads {kept!r}")

    def encode(self, captions):
        """Token ids (B, L) on the model's device."""
        if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions is {captions!r}: give a list of at least one string")
        return self.tokenizer.encode(captions, self.network.config.text_len).to(self.device)

    def sample(self, captions, guidance=1.0, seed=0, best_of=1, restarts=0):
        """An image for each of B captions: (B, C, H, W), in [-1, 1] unless they are latents."""
        self.remark(captions)
        images, *_ = self.sample_trajectories(captions, range(len(captions)), guidance, seed, False, best_of, restarts)
        return images if self.latents else images.clamp(-1, 1)

    @torch.no_grad()
    def sample_trajectories(self, captions, numbers, guidance=0.0, seed=0, levels=False, best_of=1, restarts=0):
        """Samples an image for each caption; image `number` is the same in whatever batch it is sampled.

        levels: carry the trajectory back to x-space even where only the score needs it. restarts: sample()'s.
        best_of: candidates, of which that with the greatest guided_score is kept; the first is what there is without.
        Returns images (B, C, H, W); the trajectory x (B, T+1, N, D) and its -log p in nats, (B,), or None, None.
        """
        network, ts, text = self.network, self.ts, self.encode(captions)
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}, but must be at least 0")
        for name, value, least, fewest, never in [("best_of", best_of, 1, 2, self.kind == "fm"),
                                                  ("restarts", restarts, 0, 3, False)]:
            if type(value) is not int or value < least or value > least and (never or len(ts) <= fewest):
                raise ValueError(f"{name} is {value!r}, but must be an int of at least {least}, and {least} for "
                                 + ("flow matching" if never else f"fewer than {fewest} steps"))
        # each image has a generator of its own, on the CPU, so that neither its neighbours nor the device change it
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
        drawn = [self.draw(text, guidance, restarts, generators, levels) for _ in range(best_of)]
        tokens, x, u = drawn[0]
        if best_of > 1:
            noise = torch.randn(TRAJECTORIES, len(ts), *tokens.shape[1:], generator=torch.Generator().manual_seed(seed))
            scores = [self.clock("choosing", network.guided_score, candidate, ts, text, guidance, noise.to(self.device))
                      for candidate, *_ in drawn]
            best = torch.stack(scores).argmax(dim=0), torch.arange(len(text), device=self.device)
            tokens, x, u = (None if of_all[0] is None else torch.stack(of_all)[best] for of_all in zip(*drawn))
        if not tokens.isfinite().all():
            raise ValueError(f"some samples are not finite: choose another guidance than {guidance:g}")
        if levels and x is None:
            x = self.clock("inversion", network.invert, u, ts)
        nll = None if u is None or x is None else network.trajectory_nll(x, ts.expand(len(x), -1), text).sum(dim=1)
        return network.unpatchify(tokens), x, nll

    def draw(self, text, guidance, restarts, generators, levels):
        """Clean tokens (B, N, D); the trajectory x (B, T+1, N, D), or None if not needed; and u, of an NTM."""
        network, ts, T = self.network, self.ts, len(self.ts) - 1
        stage = f"sampling in {T + restarts * len(taken_again(T))} steps"
        def randn(*shape):
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

        with coarse_products(self.device):
            u = self.clock(stage, network.sample, text, ts, guidance, restarts=restarts, randn=randn)
        if self.kind == "fm":
            return u[:, 0], u, None
        if restarts and (levels or self.denoise == "score"):  # they leave an x_1 that is fresh noise
            u = network.coupled(u, ts.expand(len(u), -1), text)
        if self.denoise == "learned":
            return self.clock("learned denoising", self.denoiser, u[:, 0], text), None, u
        if self.denoise == "none" and not levels:  # the cleanest level is all there is to see
            return self.clock("inversion", network.invert, u[:, :1], ts[:1], steps=T)[:, 0], None, u
        x = self.clock("inversion", network.invert, u, ts)
        by_score = self.denoise == "score"
        return self.clock("score denoising", network.score_denoise, x, ts, text) if by_score else x[:, 0], x, u

    @torch.no_grad()
    def log_likelihood(self, images, captions, trajectories=8, seed=0, t_min=0.02):
        """A LogLikelihood of each of the images (B, C, H, W) in [-1, 1] under its caption, from some trajectories each.

        All images see the same noise, so that captions can be compared: expand one image, and take the greatest. t_min:
        the noise level of the images that it is about; at 0, where a model trained from scratch has a density, images
        of 8 bits want dequantising. Raises ValueError for a flow-matching model, whose likelihood is not implemented.
        """
        if self.kind != "ntm":
            raise ValueError("the likelihood of a flow-matching model is not implemented: load an NTM")
        if trajectories < 2:
            raise ValueError(f"trajectories is {trajectories}, but the standard error needs at least 2")
        self.remark(captions)
        network, text, images = self.network, self.encode(captions), torch.as_tensor(images)
        if images.shape[1:] != (expected := (network.config.channels, *network.config.image_size)):
            raise ValueError(f"images are {tuple(images.shape[1:])}, but the model's are {expected}")
        if len(images) != len(captions):
            raise ValueError(f"there are {len(images)} images, but {len(captions)} captions: one caption for each")
        if not images.abs().max() <= (math.inf if self.latents else 1.5):  # nor if some are NaN
            raise ValueError(f"images reach {images.abs().max():g}, but are to be in [-1, 1]")
        x0 = network.patchify(images.to(self.device, torch.float32))
        ts = network.config.time_grid(t_min, len(self.ts) - 1).to(self.device).expand(len(x0), -1)
        generator, nats = torch.Generator().manual_seed(seed), []
        for _ in range(trajectories):
            noise = torch.randn(1, *ts.shape[1:], *x0.shape[1:], generator=generator).to(x0).expand(len(x0), -1, -1, -1)
            nats.append(-network.trajectory_bound(forward_trajectory(x0, ts, noise=noise), ts, text)[1])
        mean, error = (nats := torch.stack(nats)).mean(dim=0), nats.std(dim=0) / math.sqrt(trajectories)
        return LogLikelihood(mean, error, bits_per_dim(-mean, x0[0].numel()))

    def plain_latents(self, images):
        """Normalised latents (B, C, h, w) as the autoencoder knows them."""
        mean, scale = (torch.tensor(self.latents[name])[:, None, None].to(images) for name in ("mean", "scale"))
        return images / scale + mean

    def clock(self, stage, function, *args, **kwargs):
        """The function's result; its seconds, an accelerator waited for, are added to the stage's."""
        wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(self.device.type, lambda: None)
        wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start
        return result


load = TrainedModel  # as programs of one's own call it


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
    if decoder and not model.latents:
        raise ValueError(f"decoder is {decoder!r}, but this model makes images, not latents: leave it out")
    if decoder:
        from plumbing.latents import load_exported  # and with it what encodes data sets
    decode = load_exported(decoder, model.device) if decoder else None
    # what is wrong with captions or folder is told before anything is sampled
    model.remark(captions)
    shipped = source.resolve().parent == SHIPPED.parent.resolve()  # assets/ is not written to
    make_folder(to := Path(folder or (Path("out/images", source.resolve().name) if shipped else source / "images")))
    if layout != "sheet":
        ours = {name: value for name, value in config.items() if name not in ("device", "batch_size")}
        ours |= {"iteration": model.iteration, "denoise": model.denoise,  # "score" until there is a denoiser
                 "captions": hashlib.sha256("\n".join(captions).encode()).hexdigest()}
        claim(to / ".settings.json", ours, f"{to} holds images of other settings: choose another --folder or remove it")

    def decoded(images):
        """What to look at: the images that the decoder makes of normalised latents; without one, the samples."""
        return decode(model.plain_latents(images)).clamp(-1, 1) if decode else images

    shown, nlls = [], []
    wanted = [i for i in range(len(captions)) if layout == "sheet" or not path_of(to, layout, i, num_samples).exists()]
    for start in range(0, len(wanted), batch_size):
        numbers = wanted[start:start + batch_size]
        samples, x, nll = model.sample_trajectories([captions[i] for i in numbers], numbers, guidance, seed,
                                                    show_trajectory or model.denoise == "none", best_of, restarts)
        images = decoded(samples)
        nlls += [] if nll is None else nll.tolist()
        shown += [images] if layout == "sheet" else []
        for j, i in enumerate(numbers):
            path = path_of(to, layout, i, num_samples)
            if model.latents:
                path.parent.mkdir(parents=True, exist_ok=True)
                np.save(path.with_suffix(".npy"), model.plain_latents(samples[j]).half().cpu().numpy())
            save_image(to_pil(images[j], scale), path)  # the last: a run that continues looks for it
            if show_trajectory:
                levels = decoded(model.network.unpatchify(x[j]))
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
