"""Random numbers: hashes in place of a generator, and a rank's rows of the numbers drawn for a whole batch."""

import math

import numpy as np
import torch

PIECE = 2**22  # numbers drawn at once, 16 MB; a multiple of 16, the group in which torch draws normal numbers on a CPU
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # splitmix64's: 2^64 over the golden ratio


def mix(z):
    """The finalizer of splitmix64: uint64 -> uint64, in which every input bit affects every output bit."""
    z = z ^ (z >> np.uint64(30))
    z = z * np.uint64(0xBF58476D1CE4E5B9)
    z = z ^ (z >> np.uint64(27))
    z = z * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def uniforms(seed, indices, n):
    """Numbers in [0, 1), float64 (B, n), each a function of (seed, indices[b], column); any integers are allowed."""
    seed = np.array([seed % 2**64], dtype=np.uint64)
    indices = np.asarray(indices, dtype=np.int64).astype(np.uint64)
    columns = np.arange(1, n + 1, dtype=np.uint64)
    start = mix(seed + GOLDEN)
    streams = mix(start + indices * GOLDEN)
    bits = mix(streams[:, None] + columns * GOLDEN)
    mantissas = bits >> np.uint64(11)
    return mantissas * 2.0**-53


def drawn(draw, shape, rows, device=None, dtype=torch.float32):
    """Rows `rows`, a slice, of the result of draw(tensor), such as tensor.normal_, on a tensor of `shape`.

    All rows are drawn, piece by piece, and the others dropped, so that a row is the same with any number of ranks.
    On a CPU the rows equal those of a single draw bit for bit.
    """
    first, stop, _ = rows.indices(shape[0])
    numbers_of_a_row = math.prod(shape[1:])
    total = math.prod(shape)
    begin = first * numbers_of_a_row
    end = stop * numbers_of_a_row
    kept = torch.empty(end - begin, device=device, dtype=dtype)
    others = kept.new_empty(min(PIECE + 15, total) if len(kept) < total else 0)
    starts = range(0, max(1, total - 15), PIECE)  # the last piece has at least 16 numbers, if there are so many
    for start, next_start in zip(starts, [*starts[1:], total]):
        if begin <= start and next_start <= end:
            draw(kept[start - begin:next_start - begin])
            continue
        piece = draw(others[:next_start - start])
        low = max(start, begin)
        high = min(next_start, end)
        if low < high:
            kept[low - begin:high - begin] = piece[low - start:high - start]
    return kept.view(stop - first, *shape[1:])


def randn(shape, rows=slice(None), generator=None, device=None):
    """Rows `rows` of torch.randn(shape)."""
    return drawn(lambda tensor: tensor.normal_(generator=generator), shape, rows, device)
