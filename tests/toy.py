"""A run of train.py on the least that it can train, with data and a tokenizer of its own."""
import contextlib
import signal
from dataclasses import replace

import pytest
import torch
from helpers import contents
from torch import nn

import train
from configurator import Settings
from model import ImageModel, NTMConfig
from plumbing.images import to_pixels
from plumbing.tokenizer import NULL, PAD

SETTINGS = {name: value for name, value in vars(train).items()
            if not name.startswith("_") and type(value) in (bool, int, float, str, tuple, type(None)) and name.islower()}
SETTINGS |= dict(device="cpu", image_size=2, text_len=3, caption_dropout=0.0, batch_size=4, max_iters=6, lr=0.01,
                 optimizer="adamw", min_lr=0.001, warmup_iters=2, weight_decay=0.1, ema=0.9, log_interval=1,
                 val_interval=100, val_examples=1, num_samples=1)


class Items(list):
    eight_bit = True

    def __getitems__(self, indices):
        return [self[i] for i in indices]


# captioned by their numbers
DATA = Items((to_pixels(torch.full((1, 2, 2), 20 * i)), str(i)) for i in range(12))
TINY = NTMConfig(image_size=4, width=8, depth=1, heads=2, transporter_width=8, transporter_blocks=1,
                 transporter_layers=1)


class Numbers:
    """A tokenizer of those captions."""

    vocab_size, cut, vocabulary = 14, 0, None

    def tokens(self, caption):
        return [int(caption) + 2]

    def falls_apart(self, caption):
        return False

    def encode(self, captions, length):
        return torch.tensor([[int(caption) + 2] * length if caption else [NULL, PAD, PAD] for caption in captions])


class Toy(ImageModel):
    """The least that train.py can train: a weight for every pixel."""

    def __init__(self, config=TINY):
        super().__init__(config)
        self.weight = nn.Parameter(torch.linspace(-1, 1, 4))

    def forward(self, images):
        return images.flatten(1) @ self.weight


def draw_numbers(model, noised, images, text, config, batches, generator):
    return (batches.randn((config["batch_size"],), generator=generator),)


def squares(network, images, text, draws):
    return (network(images) - draws[0]).square().mean()


def sample_sheet(ema, text, ts, generator, chunk):
    return torch.rand(len(text), 1, 2, 2)


def end_by(number):
    """The context of a run that gets a signal: after Ctrl-C alone it has an exit status."""
    return pytest.raises(SystemExit, match="130") if number == signal.SIGINT else contextlib.nullcontext()


def fit(out_dir, objective=squares, validate=lambda ema, i: {"val_loss": 0.0}, **settings):
    """Trains a Toy by train.py; returns it with the path of its checkpoint."""
    config = Settings(SETTINGS | settings | {"out_dir": str(out_dir)})
    config.given = settings.keys() | {"out_dir"}
    path, models = out_dir / "ckpt.pt", []

    def build(config, *_):
        models.append(Toy(replace(TINY, text_len=config["text_len"])))
        return models[-1], None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "build_model", build)
        patch.setattr(train, "draw_levels", draw_numbers)
        patch.setattr(train, "TrainingLoss", lambda model, config: model)
        patch.setattr(train, "open_dataset", lambda config, split: DATA)
        patch.setattr(train, "get_tokenizer", lambda name, vocabulary: Numbers())
        patch.setattr(train, "sample_images", sample_sheet)
        patch.setattr(train, "losses_of_batch", lambda network, frozen, aux_weight, images, text, *draws: {
            "loss": objective(network, images, text, draws)})
        # called once the checkpoint of that iteration is written
        patch.setattr(train, "validate", lambda ema, *_: validate(ema, contents(path)["iter"]))
        train.main(config)
    return models[0], path
