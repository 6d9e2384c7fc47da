"""A trained model as a Python object: captions in, images out, and the likelihood of images under captions.

    from pipeline import load

    model = load("out/digits")                                    # a run's out_dir; load() takes the shipped model
    images = model.sample(["the digit one"] * 1000, seed=0)       # (1000, 1, 8, 8), in batches that fit in memory
    log_p = model.log_likelihood(images, ["a 1"] * 1000)          # .nats and .standard_error, each (1000,)

sample.py and evaluate.py are built on this class; nothing here reads a script's settings.
"""

import math
import time
from pathlib import Path
from typing import NamedTuple

import torch

from beyond import CoupledNTM, ResidualDenoiser, cooled, guided_log_density, restarted_steps, sample_with_restarts
from data import get_tokenizer
from flow import forward_trajectory, time_grid
from fm import EULER_STEPS, FlowMatching
from model import bits_per_dim
from networks import NETWORKS
from plumbing import checkpoint
from plumbing.memory import examples_at_once, score_denoise
from plumbing.paths import at_home
from plumbing.records import last_validation
from plumbing.runtime import coarse_products, exact_products, find_device, note
from plumbing.tokenizer import words

SHIPPED = Path(__file__).parent / "assets" / "emoji64"
TRAJECTORIES = 4  # how many trajectories of each candidate best_of scores
MOST_AT_ONCE = 256  # images in a batch, however small they are: larger batches are no faster


class LogLikelihood(NamedTuple):
    """A lower bound on log p(x_{t_min} | caption) of each image, estimated from several trajectories; all (B,).

    For a model of latents, p is the density of normalised latents, as the model reads them.
    """
    nats: torch.Tensor
    standard_error: torch.Tensor  # of the estimate, in nats
    bits_per_dim: torch.Tensor | None  # an upper bound, comparable with others' at t_min = 0 only; None for latents


def scoring_generator(seed):
    """The generator of the noise that images are scored with; its seed is none that images are drawn with."""
    return torch.Generator().manual_seed(-1 - seed)


class TrainedModel:
    """A trained model, from captions to images: an NTM with a way to denoise, or a flow-matching model.

    out_dir: the folder of ckpt.pt and, for denoise "learned", denoiser.pt, which knows its own t_min. device: cuda, mps
    or cpu; empty: the best available. The other arguments are those of set_sampling(). Raises ValueError.

    Attributes: network; kind, "ntm" or "fm"; settings, of the training run; tokenizer; ts (T+1,), the noise levels,
    cleanest first; latents, {"mean", "scale"} per channel if the model samples normalised latents, else None; seconds,
    {stage: seconds so far}.
    """

    def __init__(self, out_dir=SHIPPED, device="", steps=0, denoise="learned", t_min=0.02, shift=1.0):
        self.path = Path(at_home(out_dir)) / "ckpt.pt"
        self.device = find_device(device)
        self.network, trained = checkpoint.load_network(self.path, NETWORKS, self.device)
        self.kind = "fm" if isinstance(self.network, FlowMatching) else "ntm"
        self.settings = trained["settings"]
        self.iteration = trained["iter"]
        self.tokenizer = get_tokenizer(self.settings["tokenizer"], trained.get("vocabulary"))
        self.words = set(trained.get("words", ()))  # of its training captions; older checkpoints do not have them
        self.latents = self.settings.get("latents")
        self.validation = trained.get("validation") or last_validation(self.path.with_name("log.jsonl"))
        self.denoiser = None
        self.decode = None
        self.set_sampling(steps, denoise, t_min, shift)

    # -----------------------------------------------------------------------------------------------------------
    # How it samples

    def set_sampling(self, steps=0, denoise="learned", t_min=0.02, shift=1.0):
        """Set the noise levels and the way to denoise, and reset the clock. Raises ValueError.

        steps: an NTM's T (0: as trained), or flow matching's Euler steps (0: 50). denoise: of an NTM, "learned",
        "score" or "none". t_min: the noise level where an NTM's samples end; a learned denoiser brings its own. shift:
        e^m of flow matching's time grid.
        """
        if denoise not in ("learned", "score", "none"):
            raise ValueError(f"denoise {denoise!r} is unknown: choose 'learned', 'score' or 'none'")
        if type(steps) is not int or steps < 0:
            raise ValueError(f"steps is {steps}, but must be an int of at least 1, or 0 for the default")
        if self.kind == "ntm" and shift != 1:
            raise ValueError(f"shift is {shift}, but an NTM keeps the grid of its training: leave shift at 1")
        self.seconds = {}
        if self.kind == "fm":
            self.denoise = "none"
            self.ts = time_grid(steps or EULER_STEPS, 0.0, 0, shift).to(self.device)
            return
        config = self.network.config
        if steps and steps not in config.steps:
            trained_for = " or ".join(map(str, config.steps))
            note(f"the model was trained for {trained_for} steps: with {steps}, samples may be noise and likelihoods "
                     "mean nothing")
        if denoise == "learned":
            reason = self.why_no_denoiser(steps)
            if reason:
                note(f"{reason}: denoising by the model's own score instead, which is slower")
                denoise = "score"
            else:
                t_min = self.distilled["t_min"]
        self.denoise = denoise
        self.ts = config.time_grid(t_min, steps).to(self.device)

    def why_no_denoiser(self, steps=0):
        """Why trajectories of so many steps have no learned denoiser; "" if they have one, which is then loaded.

        Raises ValueError for the denoiser of another model.
        """
        path = self.path.with_name("denoiser.pt")
        steps = steps or self.network.config.steps[0]
        if not path.exists():
            return f"there is no {path}, which distill.py makes"
        if self.denoiser is None:
            self.load_denoiser(path)
        learned = self.distilled["steps"] or self.denoiser.config.steps[0]
        return f"{path} was distilled for {learned} steps, not {steps}" if steps != learned else ""

    def load_denoiser(self, path):
        """Load the learned denoiser. Raises ValueError for the denoiser of another model."""
        try:
            denoiser, distilled = checkpoint.load_network(path, {"denoiser": ResidualDenoiser}, self.device)
        except ValueError as error:
            raise ValueError(f"{error}; distil anew, or choose --denoise=score") from error
        self.check_denoiser(path, denoiser, distilled)
        self.denoiser = denoiser
        self.distilled = distilled["settings"]

    def check_denoiser(self, path, denoiser, distilled):
        """Raise ValueError for a denoiser that was distilled from another model than this one."""
        for name in ("image_size", "channels", "patch_size", "vocab_size", "text_len"):
            theirs = getattr(denoiser.config, name)
            ours = getattr(self.network.config, name)
            if theirs != ours:
                raise ValueError(f"{path} is of another model: its {name} is {theirs}, the model's {ours}; "
                                 "distil it anew, or choose --denoise=score")
        of_ours = self.iteration, checkpoint.fingerprint(self.network)
        checkpoint.check_teacher(path, distilled, *of_ours, ", or choose --denoise=score")

    def load_decoder(self, path):
        """Load the decoder of this model's latents, a program saved by torch.export, which to_images() then uses.

        Raises ValueError or OSError for a model of images, and for a program that is no decoder.
        """
        from plumbing.latents import load_decoder  # only here: that module also encodes data sets
        self.decode = load_decoder(self.settings | {"decoder": path}, self.device)

    # -----------------------------------------------------------------------------------------------------------
    # Captions

    def encode(self, captions):
        """The token ids (B, L) of captions, on the model's device. Raises ValueError unless given a list of strings."""
        if isinstance(captions, str) or not captions or not all(isinstance(caption, str) for caption in captions):
            raise ValueError(f"captions is {captions!r}: give a list of at least one string")
        return self.tokenizer.encode(captions, self.network.config.text_len).to(self.device)

    def warn_about_captions(self, captions):
        """Warn of words that the model never saw in training, and of captions longer than its text_len.

        Raises ValueError unless given a list of strings.
        """
        self.encode(captions)
        unknown = sorted(words(captions) - self.words)
        if unknown and self.words:
            note(f"the model was trained without the words {', '.join(unknown)[:200]}")
        room = self.network.config.text_len
        cut = [caption for caption in dict.fromkeys(captions) if len(self.tokenizer.tokens(caption)) > room]
        if cut:
            kept = self.tokenizer.decode(self.tokenizer.tokens(cut[0])[:room])
            note(f"{len(cut)} captions are cut to {room} tokens: of {cut[0][:200]!r} the model reads {kept!r}")

    def batches(self, count):
        """The numbers 0 to count - 1 as a list of ranges, each of as many images as fit into about 4 GB."""
        most = examples_at_once(self.network.config, len(self.ts) - 1, gradients=False)
        size = min(most, MOST_AT_ONCE)
        return [range(start, min(start + size, count)) for start in range(0, count, size)]

    # -----------------------------------------------------------------------------------------------------------
    # Images

    def sample(self, captions, guidance=1.0, seed=0, best_of=1, restarts=0, temperature=1.0):
        """An image for each of B captions: (B, C, H, W), in [-1, 1] unless the model samples latents.

        An image depends on its number and caption, and only by rounding on how images are divided into batches.
        """
        self.warn_about_captions(captions)
        images = []
        for numbers in self.batches(len(captions)):
            of_batch = [captions[i] for i in numbers]
            sampled = self.sample_trajectories(of_batch, numbers, guidance, seed, False, best_of, restarts, temperature)
            images.append(sampled[0])
        images = torch.cat(images)
        return self.clipped(images)

    @torch.no_grad()
    def sample_trajectories(
        self, captions, numbers, guidance=0.0, seed=0, in_x_space=False, best_of=1, restarts=0, temperature=1.0
    ):
        """Sample an image for each caption, all in one batch; an image depends on its number, not on its batch.

        in_x_space: carry the trajectory back to x-space even where the denoiser does not need it. restarts: (ours) as
        in sample_with_restarts. best_of: (ours) number of candidates, of which the one with the greatest
        guided_log_density is kept; the first candidate is the image that best_of 1 gives. temperature: (ours) as in
        beyond.cooled. Returns images (B, C, H, W), trajectories x (B, T+1, N, D) or None if these were not needed, and
        -log p of the trajectories in nats, (B,), or None.
        """
        self.check_sampling(guidance, best_of, restarts, temperature)
        text = self.encode(captions)
        # each image has a generator of its own, on the CPU, so that neither its neighbours nor the device change it
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
        with exact_products(self.device):
            how = guidance, restarts, temperature, generators, in_x_space
            candidates = [self.draw(text, *how) for _ in range(best_of)]
            tokens, x, u = candidates[0] if best_of == 1 else self.likeliest(candidates, text, guidance, seed)
            if not tokens.isfinite().all():
                raise ValueError(f"some samples are not finite: choose another guidance than {guidance:g}")
            if in_x_space and x is None:
                x = self.to_x_space(u, self.ts)
            nll = None
            if u is not None and x is not None:
                nll = self.network.trajectory_nll(x, self.ts.expand(len(x), -1), text).sum(dim=1)
        return self.network.unpatchify(tokens), x, nll

    def check_sampling(self, guidance, best_of, restarts, temperature):
        """Raise ValueError for settings that this model cannot be sampled with."""
        if not 0 <= temperature <= 1 or (temperature < 1 and self.kind == "fm"):
            raise ValueError(f"temperature is {temperature}, but must be from 0 to 1, and 1 for flow matching")
        if not 0 <= guidance < math.inf:
            raise ValueError(f"guidance is {guidance}, but must be at least 0")
        T = len(self.ts) - 1
        if type(restarts) is not int or restarts < 0 or (restarts and T < 3):
            raise ValueError(f"restarts is {restarts!r}, but must be an int of at least 0, and 0 for fewer than 3 "
                             "steps")
        cannot_choose = self.kind == "fm" or T < 2
        if type(best_of) is not int or best_of < 1 or (best_of > 1 and cannot_choose):
            where = "flow matching" if self.kind == "fm" else "fewer than 2 steps"
            raise ValueError(f"best_of is {best_of!r}, but must be an int of at least 1, and 1 for {where}")

    def draw(self, text, guidance, restarts, temperature, generators, in_x_space):
        """Draw tokens (B, N, D); x (B, T+1, N, D), or None if not needed; and u like x, or None for flow matching."""
        network, ts = self.network, self.ts
        T = len(ts) - 1
        stage = f"sampling in {T + restarts * len(restarted_steps(T))} steps"

        def randn(*shape):
            return torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)

        with coarse_products(self.device):
            if self.kind == "fm":
                x = self.clock(stage, network.sample, text, ts, guidance, restarts=restarts, randn=randn)
                return x[:, 0], x, None
            if temperature < 1:
                randn = cooled(randn, temperature)
            if restarts:
                u = self.clock(stage, sample_with_restarts, network, text, ts, restarts, guidance, randn=randn)
            else:
                u = self.clock(stage, network.sample, text, ts, guidance, randn=randn)
        x_1_is_read = in_x_space or self.denoise == "score"
        if restarts and x_1_is_read and isinstance(network, CoupledNTM):  # after restarts x_1 is fresh noise
            u = network.couple(u, ts.expand(len(u), -1), text)
        if self.denoise == "learned":
            return self.clock("learned denoising", self.denoiser, u[:, 0], text), None, u
        if self.denoise == "none" and not in_x_space:  # only the cleanest level is asked for
            return self.to_x_space(u[:, :1], ts[:1], steps=T)[:, 0], None, u
        x = self.to_x_space(u, ts)
        if self.denoise == "none":
            return x[:, 0], x, u
        return self.clock("score denoising", score_denoise, network, x, ts, text), x, u

    def likeliest(self, candidates, text, guidance, seed):
        """Merge several results of draw() into one: of each image, the candidate that is likeliest under the model."""
        shape = (TRAJECTORIES, len(self.ts), *candidates[0][0].shape[1:])
        noise = torch.randn(shape, generator=scoring_generator(seed)).to(self.device)
        densities = []
        for tokens, _, _ in candidates:
            if self.denoise == "none":
                tokens = tokens / (1 - self.ts[0])  # tokens are (1 - t_0) x_0 plus a little noise
            arguments = self.network, tokens, text, self.ts, guidance, noise
            densities.append(self.clock("choosing", guided_log_density, *arguments))
        best = torch.stack(densities).argmax(dim=0)
        images = torch.arange(len(text), device=self.device)
        chosen = []
        for parts in zip(*candidates):  # the tokens, the trajectories in x-space, those in u-space
            chosen.append(None if parts[0] is None else torch.stack(parts)[best, images])
        return chosen

    def plain_latents(self, images):
        """Normalised latents (B, C, h, w) back in the scale of the autoencoder."""
        mean, scale = (torch.tensor(self.latents[name])[:, None, None].to(images) for name in ("mean", "scale"))
        return images / scale + mean

    def clipped(self, samples):
        """Samples as their files show them: images clipped to [-1, 1], latents as they are."""
        return samples if self.latents else samples.clamp(-1, 1)

    def to_images(self, samples):
        """Images (B, C, H, W) to look at: samples decoded if there is a decoder, else the samples unchanged."""
        return self.decode(samples) if self.decode else samples

    # -----------------------------------------------------------------------------------------------------------
    # Likelihood

    @torch.no_grad()
    def log_likelihood(self, images, captions, trajectories=8, seed=0, t_min=0.02):
        """The LogLikelihood of images (B, C, H, W) in [-1, 1] under their captions, by several trajectories of each.

        All images see the same noise, so captions can be compared: repeat one image, and take the caption of the
        greatest nats. t_min: the noise level at which images are scored. A model trained from scratch also has a
        density at t_min = 0, where 8-bit images need dequantising. Raises ValueError for a flow-matching model, whose
        likelihood is not implemented.
        """
        if self.kind != "ntm":
            raise ValueError("the likelihood of a flow-matching model is not implemented: load an NTM")
        if trajectories < 2:
            raise ValueError(f"trajectories is {trajectories}, but the standard error needs at least 2")
        self.warn_about_captions(captions)
        images = torch.as_tensor(images)
        self.check_images(images, captions)
        config = self.network.config
        ts = config.time_grid(t_min, len(self.ts) - 1).to(self.device)
        generator = scoring_generator(seed)
        shape = (1, len(ts), config.num_tokens, config.token_dim)
        noises = [torch.randn(shape, generator=generator).to(self.device) for _ in range(trajectories)]
        nats = []
        for numbers in self.batches(len(images)):
            of_batch = [captions[i] for i in numbers]
            nats.append(self.bounds(images[numbers.start:numbers.stop], of_batch, ts, noises))
        nats = torch.cat(nats, dim=1)
        mean = nats.mean(dim=0)
        error = nats.std(dim=0) / math.sqrt(trajectories)
        bits = None if self.latents else bits_per_dim(-mean, config.num_tokens * config.token_dim)
        return LogLikelihood(mean, error, bits)

    def held_out_nll(self):
        """-log p of trajectories of held-out images, in nats per number, from the last validation in training.

        None if that validation had other noise levels, or is not known.
        """
        steps = [nll for name, nll in self.validation.items() if name.startswith("val_step_")]
        if len(steps) != len(self.ts) - 1 or abs(self.settings["t_min"] - self.ts[0].item()) > 1e-6:
            return None
        of_noise = 0.5 * math.log(2 * math.pi * math.e)  # the mean of -log N(x_1; 0, 1)
        return (sum(steps) + of_noise) / len(self.ts)

    def check_images(self, images, captions):
        """Raise ValueError for images (B, C, H, W) whose shape, number or range is not as it must be."""
        expected = (self.network.config.channels, *self.network.config.image_size)
        if images.shape[1:] != expected:
            raise ValueError(f"images are {tuple(images.shape[1:])}, but the model's are {expected}")
        if len(images) != len(captions):
            raise ValueError(f"there are {len(images)} images, but {len(captions)} captions: one caption for each")
        greatest = images.abs().max()
        if not greatest <= (math.inf if self.latents else 1.5):  # "not", so that NaN fails too
            raise ValueError(f"images reach {greatest:g}, but must be in [-1, 1]: rescale them")

    def bounds(self, images, captions, ts, noises):
        """Lower bounds (M, B) in nats on log p of images, Eq. (14), by M trajectories of each.

        ts (T+1,). noises: M tensors (1, T+1, N, D), which all images share.
        """
        text = self.encode(captions)
        x0 = self.network.patchify(images.to(self.device, torch.float32))
        ts = ts.expand(len(x0), -1)
        found = []
        with exact_products(self.device):
            for noise in noises:
                x = forward_trajectory(x0, ts, noise=noise.expand(len(x0), -1, -1, -1))
                found.append(-self.network.trajectory_bound(x, ts, text)[1])
        return torch.stack(found)

    def to_x_space(self, u, ts, **how):
        """NTM.invert, timed if there is a transporter to invert."""
        if not self.network.config.transporter_blocks:
            return self.network.invert(u, ts, **how)
        return self.clock("inversion", self.network.invert, u, ts, **how)

    def clock(self, stage, function, *args, **kwargs):
        """Call a function and return its result; add its seconds, accelerator included, to the stage's."""
        wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(self.device.type, lambda: None)
        wait()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        wait()
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start
        return result


load = TrainedModel  # the name for programs of your own
