"""An autoencoder without training (ours): a fixed orthonormal transform of each 2x2 block of pixels into four numbers.

    python -m evidence.blocks --out=out/blocks     encoder.pt2 and decoder.pt2, for data.py encode and --decoder

config/t2i_tiny.py uses this autoencoder to try the recipe of config/t2i.py, on latents, in an hour on one core.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from plumbing.console import module_parser
from plumbing.paths import at_home
from plumbing.runtime import one_line_errors

SIDE = 2  # pixels of a block


def basis():
    """The four orthonormal directions, (4, 3, 2, 2), that are kept of the twelve numbers of a block.

    They are the block's mean grey, its two mean opponent colours, and the difference of grey along its diagonal.
    """
    grey = torch.tensor([1.0, 1.0, 1.0])
    red_green = torch.tensor([1.0, -1.0, 0.0])
    yellow_blue = torch.tensor([1.0, 1.0, -2.0])
    mean = torch.ones(SIDE, SIDE)
    diagonal = torch.tensor([[1.0, 0.0], [0.0, -1.0]])
    pairs = (grey, mean), (red_green, mean), (yellow_blue, mean), (grey, diagonal)
    directions = torch.stack([colour[:, None, None] * pattern for colour, pattern in pairs])
    return directions / directions.square().sum(dim=(1, 2, 3), keepdim=True).sqrt()


class Encoder(nn.Module):
    """Images (B, 3, H, W) to latents (B, 4, H/2, W/2)."""

    def __init__(self):
        super().__init__()
        self.register_buffer("basis", basis())

    def forward(self, images):
        return F.conv2d(images, self.basis, stride=SIDE)


class Decoder(Encoder):
    """Latents (B, 4, h, w) to images (B, 3, 2h, 2w), in which the details that the encoder drops are zero."""

    def forward(self, latents):
        return F.conv_transpose2d(latents, self.basis, stride=SIDE)


def export(module, example, path):
    """Save a module by torch.export, for any number of images and any size that blocks divide."""
    batch, height, width = (torch.export.Dim(name) for name in ("batch", "height", "width"))
    step = SIDE if example.shape[1] == 3 else 1  # images have whole blocks
    shapes = {0: batch, 2: step * height, 3: step * width}
    torch.export.save(torch.export.export(module, (example,), dynamic_shapes=(shapes,)), path)


@one_line_errors()
def main(arguments=None):
    parser = module_parser(
        "evidence.blocks",
        "Saves an encoder of 2x2 blocks of pixels and its decoder.",
        ["--out=out/blocks"],
    )
    parser.add_argument("--out", type=at_home, default="out/blocks", help="the folder; default %(default)s")
    folder = Path(parser.parse_args(arguments).out)
    folder.mkdir(parents=True, exist_ok=True)
    export(Encoder(), torch.zeros(2, 3, 16, 16), folder / "encoder.pt2")
    export(Decoder(), torch.zeros(2, 4, 8, 8), folder / "decoder.pt2")
    print(f"wrote encoder.pt2 and decoder.pt2 to {folder}")


if __name__ == "__main__":
    main()
