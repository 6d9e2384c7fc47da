"""Paths as people write them: ~ for the home folder, ranges in braces, wildcards. A name that exists stays as it is."""

import glob
import os
import re
from pathlib import Path

BRACES = r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}"


def at_home(path):
    """A path or sit:PATH, as a str, with ~ replaced by the home folder: shells leave the ~ in --out_dir=~/x."""
    path = str(path)
    if os.path.lexists(path):
        return path
    prefix = "sit:" if path.startswith("sit:") else ""
    return prefix + os.path.expanduser(path.removeprefix(prefix))


def existing_part(path):
    """The innermost existing folder of a path, and the rest of the path, a str."""
    folder = next(parent for parent in path.parents if parent.is_dir())
    return folder, str(path.relative_to(folder))


def expand(path):
    """The paths that a shell makes of ranges {000..123} and lists {a,b} in a path; [path] if the path exists."""
    path = Path(path)
    if path.exists():
        return [path]
    folder, rest = existing_part(path)
    return [folder / name for name in expand_braces(rest)]


def expand_braces(text):
    match = re.search(BRACES, text)
    if not match:
        return [text]
    first, end, names = match.groups()
    if first is None:
        middles = names.split(",")
    else:
        step = 1 if int(first) <= int(end) else -1
        middles = [f"{i:0{len(first)}d}" for i in range(int(first), int(end) + step, step)]
    before, after = text[:match.start()], text[match.end():]
    return [name for middle in middles for name in expand_braces(before + middle + after)]


def wildcards(path):
    """The files and folders that a path with * ? [ ] names, in order; [path] if the path exists."""
    if path.exists():
        return [path]
    folder, rest = existing_part(path)
    return [folder / name for name in sorted(glob.glob(rest, root_dir=folder))]
