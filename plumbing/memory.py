"""Limits of memory: how many examples fit at once, and how to apply a function to a batch in parts."""

import torch

LIMIT = 4_000_000_000  # bytes, in addition to the weights
NUMBERS = 13  # activations of a layer per token and unit of width


def examples_at_once(config, steps, gradients=True):
    """How many trajectories of `steps` steps fit into about 4 GB, at least 1; config: an NTMConfig.

    gradients: True if the activations of all layers are kept, as for a score; False: of one layer at a time.
    """
    depth, transporter_layers = 1, 1
    if gradients:
        depth = config.depth
        transporter_layers = config.transporter_blocks * config.transporter_layers
    tokens = config.text_len + config.num_tokens
    units = steps * depth * tokens * config.width
    units += (steps + 1) * transporter_layers * config.num_tokens * config.transporter_width
    bytes_each = 4 * NUMBERS * units
    return max(1, LIMIT // bytes_each)


def in_chunks(function, chunk, *tensors):
    """The result of function(*tensors), computed for at most `chunk` examples at a time.

    tensors: each (B, ...), split along the batch. The function returns a tensor (B, ...), or several in a tuple.
    """
    parts = zip(*(tensor.split(chunk) for tensor in tensors), strict=True)
    results = [function(*part) for part in parts]
    if torch.is_tensor(results[0]):
        return torch.cat(results)
    return tuple(torch.cat(of_parts) for of_parts in zip(*results))


def score_denoise(model, x, ts, text, chunk=0):
    """model.score_denoise(x, ts, text), an NTM's, `chunk` examples at a time; 0: as many as fit."""
    steps = x.shape[1] - 1
    chunk = chunk or examples_at_once(model.config, steps)
    return in_chunks(model.score_denoise, chunk, x, ts.expand(x.shape[:2]), text)
