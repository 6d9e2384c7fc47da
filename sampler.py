"""A trained model, ready to draw: what sample.py and evaluate.py share."""

import time
from pathlib import Path

import torch

import checkpoint
from data import get_tokenizer
from fm import EULER_STEPS


class Sampler:
    """Captions in, pictures out, by an NTM in a few steps and a way to clean them, or by a flow-matching model.

    model, kind ("ntm" or "fm"), settings (of its training), tokenizer, grid (T+1,) of noise levels, cleanest first.
    latents: {"mean", "scale"} of each channel, where it draws normalised latents, else None.
    seconds: of each stage so far, {stage: seconds}.
    """

    def __init__(self, out_dir, device, steps=0, denoise="learned", t_min=0.02):
        """Loads out_dir/ckpt.pt and, for denoise "learned", denoiser.pt, which knows its own t_min.

        steps: T, or Euler's; 0: as trained, or 50. denoise: "learned", "score" or "none", for an NTM. Raises ValueError
        for a wrong setting and CheckpointError for a wrong file.
        """
        if denoise not in ("learned", "score", "none"):
            raise ValueError(f"denoise {denoise!r} is unknown: choose 'learned', 'score' or 'none'")
        if steps < 0:
            raise ValueError(f"steps is {steps}, but must be at least 1, or 0 for the default")
        path = Path(out_dir) / "ckpt.pt"
        trained = checkpoint.load(path, "ntm", "fm", device=device)
        self.kind, self.settings, self.iteration = trained["kind"], trained["settings"], trained["iter"]
        self.model, self.device = checkpoint.network_of(trained, path, device), device
        self.tokenizer, self.latents = get_tokenizer(self.settings["tokenizer"]), self.settings.get("latents")
        self.denoise, self.seconds = denoise if self.kind == "ntm" else "none", {}
        if self.denoise == "learned":
            self.denoiser, t_min = self.load_denoiser(path.with_name("denoiser.pt"))
        if self.kind == "ntm":
            self.grid = self.model.config.time_grid(t_min, steps).to(device)
        else:
            self.grid = torch.linspace(0, 1, (steps or EULER_STEPS) + 1).to(device)

    def load_denoiser(self, path):
        """The denoiser, and the noise level that it was trained for."""
        if not path.exists():
            raise ValueError(f"there is no {path}: make it with distill.py, or choose --denoise=score")
        distilled = checkpoint.load(path, "denoiser", device=self.device)
        denoiser = checkpoint.network_of(distilled, path, self.device)
        for name in ("image_size", "channels", "patch_size", "vocab_size", "text_len"):
            theirs, ours = getattr(denoiser.config, name), getattr(self.model.config, name)
            if theirs != ours:
                raise ValueError(f"{path} is of another model: its {name} is {theirs}, the model's {ours}; "
                                 "distil it anew, or choose --denoise=score")
        return denoiser, distilled["settings"]["t_min"]

    def encode(self, captions):
        """Token ids (B, L) on the model's device."""
        return self.tokenizer.encode(captions, self.model.config.text_len).to(self.device)

    @torch.no_grad()
    def draw(self, captions, numbers, guidance=0.0, seed=0, levels=False):
        """Draws one picture for each caption; picture `number` is the same in whatever batch it is drawn.

        levels: carry the trajectory back to x-space even if the denoiser does not need it. Returns images (B, C, H, W);
        the trajectory x (B, T+1, N, D) and its -log p in nats, (B,), each None if there is none.
        """
        # each picture has a generator of its own, on the CPU, so that neither its neighbours nor the device change it
        generators = [torch.Generator().manual_seed(seed * 1_000_003 + number) for number in numbers]
        model, grid, text = self.model, self.grid, self.encode(captions)
        shape = len(grid) if self.kind == "ntm" else 1, model.config.num_tokens, model.config.token_dim
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(self.device)
        stage = f"sampling in {len(grid) - 1} steps"
        if self.kind == "fm":
            x = self.clock(stage, model.sample, text, len(grid) - 1, guidance, noise=noise[:, 0])
            return model.unpatchify(x[:, 0]), x, None
        u = self.clock(stage, model.sample, text, grid, guidance, noise=noise)
        x = nll = None
        if self.denoise != "learned" or levels:
            x = self.clock("inversion", model.invert, u, grid)
            nll = model.trajectory_nll(x, grid.expand(len(x), -1), text).sum(dim=1)
        if self.denoise == "learned":
            tokens = self.clock("learned denoising", self.denoiser, u[:, 0], text)
        elif self.denoise == "score":
            tokens = self.clock("score denoising", model.score_denoise, x, grid, text)
        else:
            tokens = x[:, 0]
        return model.unpatchify(tokens), x, nll

    def plain_latents(self, images):
        """Normalised latents (B, C, h, w) as the autoencoder knows them."""
        mean, scale = (torch.tensor(self.latents[name])[:, None, None].to(images) for name in ("mean", "scale"))
        return images / scale + mean

    def clock(self, stage, function, *args, **kwargs):
        """The function's result; its seconds, an accelerator waited for, are added to the stage's."""
        start = time.perf_counter()
        result = function(*args, **kwargs)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0) + time.perf_counter() - start
        return result
