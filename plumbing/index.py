"""The shards that a path names, and the index of where each example begins in them."""

import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import tarfile
import uuid
from pathlib import Path

import numpy as np
from tqdm import tqdm

from plumbing.examples import Unusable, key_and_suffix, split_examples
from plumbing.lock import lock_file
from plumbing.paths import at_home, expand, wildcards
from plumbing.runtime import CAN_FORK

BLOCK = 512  # bytes, of a tar
VERSION = 2  # of the index's format; an index of another version is rebuilt


def find_shards(data_dir, split):
    """The shards that data_dir names, in order, and whether they belong to the split alone.

    data_dir: a folder, a tar, a glob, or a brace range such as cc12m-{00000..01242}.tar; ~ is the home folder. A folder
    may have subfolders train/ and val/; then the shards are the split's own. A name with [ ] or { } that exists is
    taken literally. Raises FileNotFoundError where there are no shards, or one of a range is missing.
    """
    folder = Path(at_home(data_dir))
    own = any((folder / name).is_dir() for name in ("train", "val"))
    if data_dir and folder.is_dir():
        paths = tars_in(folder / split if own else folder)
    else:
        paths = shards_named(folder) if data_dir else []
    if not paths:
        raise FileNotFoundError(f"there are no shards in data_dir {data_dir!r} for {split!r}: name a folder of .tar "
                                "files, or of train/ and val/ that hold them, a glob, or NAME-{00000..00099}.tar; "
                                "`python data.py folder` makes shards")
    return paths, own


def tars_in(folder):
    """The .tar files in a folder, except for hidden ones, such as those that macOS adds."""
    return sorted(path for path in folder.glob("*.tar") if path.is_file() and not path.name.startswith("."))


def shards_named(pattern):
    """The shards that a path with braces or wildcards names; a folder stands for the shards in it.

    Raises FileNotFoundError where one of several names is missing.
    """
    paths, missing = expand(pattern), []
    found = []
    for path in paths:
        matches = wildcards(path)
        for match in matches:
            found += tars_in(match) if match.is_dir() else [match]
        if not matches:
            missing.append(path)
    if missing and len(paths) > 1:
        raise FileNotFoundError(f"{len(missing)} of {len(paths)} shards {pattern} are missing, {missing[0]} first")
    return found


def scan(path):
    """The blocks where a shard's examples begin and where the shard ends, uint32; and its faults in words, or ""."""
    scanner, size = Scanner(), path.stat().st_size
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    scanner.take(member.name, member.offset // BLOCK)
            end = tar.offset
        faults = ["it has no end"] if end >= size else []
        if not faults and np.memmap(path, dtype=np.uint8, mode="r", offset=end).any():  # other than empty blocks
            faults = [f"what follows its byte {end} is not a member"]
    except OSError:
        raise
    except Exception as error:  # a damaged file may raise anything
        faults = [str(error) or type(error).__name__]  # the examples so far are good, perhaps except the last
        end = -(-size // BLOCK) * BLOCK
    scanner.end_run()
    return np.array([*scanner.starts, end // BLOCK], dtype=np.uint32), "; ".join(faults + scanner.faults())


class Scanner:
    """The examples found among a shard's members, which are taken in order. starts: the blocks where they begin.

    apart: how many parts of examples are not adjacent to the rest; first_apart: the first of them, in words.
    """

    def __init__(self):
        self.starts, self.key, self.run = [], None, []
        self.seen = {}  # {key: the suffixes of its examples so far}
        self.apart, self.first_apart = 0, ""

    def take(self, name, block):
        """Add the member `name`, whose header is at `block`; a new key ends the run of the key before."""
        parts = key_and_suffix(name)
        if parts is None:
            return
        key, suffix = parts
        if key != self.key:
            self.end_run()
            self.key = key
        self.run.append((suffix, block))

    def end_run(self):
        """Split the run of members of one key into examples."""
        if not self.run:
            return
        for key, members in split_examples(self.key, self.run):
            self.starts.append(members[0][1])
            suffixes = tuple(suffix for suffix, _ in members)
            before = self.seen.get(key, ())
            if before and not set(before) & set(suffixes):  # a repeated suffix: another example of that key
                self.apart += 1
                self.first_apart = self.first_apart or f"{key}.{suffixes[0]} is not beside {key}.{before[-1]}"
            self.seen[key] = before + suffixes
        self.run = []

    def faults(self):
        if not self.apart:
            return []
        others = f", nor are {self.apart - 1} others beside theirs" if self.apart > 1 else ""
        return [f"{self.first_apart}{others}: the members of an example have to be adjacent, as `tar --sort=name` "
                "puts them"]


def read_index(path, shards):
    """The header and the mapped starts of an index; None if there is none for exactly these shards."""
    try:
        with open(path, "rb") as file:
            header = json.loads(file.readline())
            starts = np.memmap(path, dtype=np.uint32, mode="r", offset=file.tell())
    except (OSError, ValueError):
        return None
    if not isinstance(header, dict) or header.get("version") != VERSION or header.get("shards") != shards:
        return None
    return (header, starts) if len(starts) == sum(header["counts"]) + len(shards) else None


def load_index(paths):
    """The index of shards: its header, and the blocks where examples begin, those of each shard followed by its end.

    The header is {"version", "shards": name, size and time of each, "counts": of examples, "faults": {name: fault}}.
    The first process to come builds the index if there is none, or the shards have changed. Raises OSError if it cannot
    be written.
    """
    folder = paths[0].parent
    shards = [[os.path.relpath(path, folder), path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    digest = hashlib.sha256(json.dumps([name for name, _, _ in shards]).encode()).hexdigest()[:8]
    path = folder / f"shards-{digest}.index"
    if not read_index(path, shards):
        try:
            lock = open(path.with_suffix(".lock"), "w", encoding="utf-8")
        except OSError as error:
            raise OSError(f"the index of the shards cannot be written beside them ({error}): make the folder writable, "
                          "or link the shards into one that is") from error
        with lock:
            with contextlib.suppress(OSError):  # without locks every process builds the same index
                lock_file(lock, wait=True)
            if not read_index(path, shards):
                build_index(path, paths, shards)
    return read_index(path, shards)


def build_index(path, paths, shards):
    """Scan the shards `paths`, by several processes where they can fork, and write their index to `path`."""
    with contextlib.ExitStack() as stack:
        scan_all = map
        if CAN_FORK:  # a fresh interpreter, as on Windows, would run the calling script again
            pool = multiprocessing.get_context("fork").Pool(min(len(paths), os.cpu_count()))
            scan_all = stack.enter_context(pool).imap
        scanned = list(tqdm(scan_all(scan, paths), total=len(paths), desc="index", unit="shard", leave=False))
    text = json.dumps({"version": VERSION, "shards": shards,
                       "counts": [len(starts) - 1 for starts, _ in scanned],
                       "faults": {name: fault for (name, _, _), (_, fault) in zip(shards, scanned) if fault}})
    part = path.with_suffix(f".{uuid.uuid4().hex[:8]}.part")  # a name that no other process writes
    with open(part, "wb") as file:
        file.write((text + " " * (-(len(text) + 1) % 4) + "\n").encode())  # padding aligns the numbers
        file.write(np.concatenate([starts for starts, _ in scanned]).tobytes())
    os.replace(part, path)


def files_in(path, start, stop):
    """The files (name, bytes) of an example, in blocks [start, stop) of a shard. Raises Unusable."""
    try:
        with open(path, "rb") as file:
            file.seek(int(start) * BLOCK)
            blocks = io.BytesIO(file.read(int(stop - start) * BLOCK))
        with tarfile.open(fileobj=blocks, mode="r:") as tar:
            return [(member.name, tar.extractfile(member).read()) for member in list(tar)
                    if member.isfile() and key_and_suffix(member.name)]
    except Exception as error:  # a damaged file may raise anything
        raise Unusable(f"its shard is truncated or cannot be read ({str(error) or type(error).__name__})") from error


def read_members(path, start, stop):
    """The members {suffix: bytes} of the example in blocks [start, stop) of a shard. Raises Unusable."""
    return {key_and_suffix(name)[1]: data for name, data in files_in(path, start, stop)}
