"""Checkpoints: written whole or not at all, read without running anything they contain.

A checkpoint is a dict of tensors and plain values: `kind` ("ntm", "fm" or "denoiser"), `model_config` (the fields of
NTMConfig), `settings` (those of the script that wrote it), `model`, `ema`, `optimizers` (a list) and `iter`.

    python checkpoint.py out/shapes assets/shapes     what sampling needs of a model and its denoiser, in float16
"""

import contextlib
import os
import sys
from dataclasses import asdict, fields
from pathlib import Path

import torch

from fm import FlowMatching
from model import NTM, Denoiser, NTMConfig

NETWORKS = {"ntm": NTM, "fm": FlowMatching, "denoiser": Denoiser}


class CheckpointError(SystemExit):
    """What is wrong with a checkpoint, in one line; uncaught, it is all that the user sees."""


def save(path, **contents):
    """Write `contents` to `path` by way of a temporary file, so that whatever happens one whole checkpoint is there.

    Raises CheckpointError if it cannot be written, a full disk for instance; the old one is then still in place.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        kept = "; the one before it is kept" if path.exists() else ""
        raise CheckpointError(f"cannot write checkpoint {path}, is the disk full? {error}{kept}") from error


def load(path, *kinds, device="cpu"):
    """The contents of a checkpoint. Raises CheckpointError if it is missing, damaged, or of none of the `kinds`."""
    try:
        contents = torch.load(path, map_location=device, weights_only=True)
    except FileNotFoundError:
        script = "distill.py" if "denoiser" in kinds else "train.py"
        raise CheckpointError(f"there is no checkpoint {path}: make it with {script}, or set out_dir") from None
    except Exception as error:  # what reading garbage raises depends on the garbage
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"cannot read checkpoint {path}: it is truncated or not a checkpoint ({reason})"
        raise CheckpointError(message) from error
    if not isinstance(contents, dict) or contents.get("kind") not in kinds:
        found = contents.get("kind") if isinstance(contents, dict) else type(contents).__name__
        expected = " or ".join(map(repr, kinds))
        raise CheckpointError(f"{path} is not a {expected} checkpoint of this repository (its kind is {found!r})")
    return contents


def restore(module, state, path):
    """Load a state dict into a module. Raises CheckpointError that names every tensor that does not fit."""
    own = module.state_dict()
    wrong = [f"{name} is missing" for name in own.keys() - state.keys()]
    wrong += [f"{name} is unknown" for name in state.keys() - own.keys()]
    wrong += [f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
              for name in own.keys() & state.keys() if state[name].shape != own[name].shape]
    if wrong:
        raise CheckpointError(f"{path} is of another architecture: {'; '.join(sorted(wrong))}")
    module.load_state_dict(state)


def network_of(contents, path, device="cpu"):
    """The network of a loaded checkpoint with its averaged weights, in evaluation mode."""
    known = {field.name for field in fields(NTMConfig)}
    if unknown := contents["model_config"].keys() - known:
        raise CheckpointError(f"{path} was made by another version: model_config has {', '.join(sorted(unknown))}")
    network = NETWORKS[contents["kind"]](NTMConfig(**contents["model_config"])).to(device)
    restore(network, contents["ema"], path)
    return network.eval().requires_grad_(False)


def config_dict(config):
    """An NTMConfig as plain values for a checkpoint."""
    return asdict(config)


def slim(path, out):
    """Writes what sampling needs of the checkpoint `path`, its averaged weights in float16, to `out`."""
    contents = load(path, *NETWORKS)
    kept = {key: contents[key] for key in ("kind", "model_config", "iter")}
    settings = contents["settings"] | {"out_dir": "", "init_from": "", "data_dir": ""}  # paths are of no use elsewhere
    ema = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in contents["ema"].items()}
    save(out, **kept, settings=settings, ema=ema)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python checkpoint.py OUT_DIR NEW_DIR")
    for name in ("ckpt.pt", "denoiser.pt"):
        slim(Path(sys.argv[1]) / name, Path(sys.argv[2]) / name)
