"""An interpreter that lacks what Windows lacks. `python tests/windows.py FOLDER` runs the scripts in it.

Our files see no fcntl, no fork, no SIGUSR1 and no files that are replaced or removed while they are open or mapped. The
encoding of text is ASCII (set by the caller's environment), so that whatever relies on UTF-8 by default fails.
"""
import importlib
import multiprocessing
import os
import runpy
import signal
import sys
from pathlib import Path

# libraries know on which platform they are, and are loaded before it changes
import numpy  # noqa: F401
import PIL.ImageFont  # noqa: F401
import torch._dynamo
import torch.distributed
import torch.nn.parallel
import torch.utils.data
import torch.utils.flop_counter  # noqa: F401
import tqdm  # noqa: F401
from PIL import Image

ROOT = Path(__file__).parent.parent
SIGNALS = {"SIGABRT", "SIGFPE", "SIGILL", "SIGINT", "SIGSEGV", "SIGTERM", "SIG_DFL", "SIG_IGN"}
MODULES = "fcntl", "resource", "pwd", "grp", "termios", "tty", "pty", "syslog", "readline"
FUNCTIONS = ("fork", "getuid", "geteuid", "getgid", "getegid", "getpgid", "killpg", "setsid", "nice", "uname", "mkfifo",
             "sched_getaffinity", "sysconf", "statvfs", "getloadavg", "chown", "WIFEXITED", "register_at_fork")
SMALL = ["--device=cpu", "--width=16", "--depth=1", "--heads=2", "--batch_size=4", "--val_examples=4",
         "--num_samples=4", "--val_interval=2", "--optimizer=adamw"]
CAPTION = "ein Häuschen 🏠 und 漢字"


def in_use(path):
    """Whether this process has a file open or mapped."""
    path = os.path.realpath(path)
    links = [os.path.join("/proc/self/fd", number) for number in os.listdir("/proc/self/fd")]
    opened = [os.path.realpath(link) for link in links]
    with open("/proc/self/maps", "rb") as maps:
        return path in opened or os.fsencode(path) in maps.read()


def refusing(function, argument):
    """A function of os that refuses, as on Windows, if its argument of that number is a file in use."""
    def refuse(*paths, **others):
        if in_use(paths[argument]):
            raise PermissionError(13, "another process uses the file", str(paths[argument]))
        return function(*paths, **others)
    return refuse


def become_windows():
    for name in MODULES:
        sys.modules[name] = None  # importing it fails
    for name in dir(signal):
        if name.startswith("SIG") and name not in SIGNALS:
            delattr(signal, name)
    for name in FUNCTIONS:
        if hasattr(os, name):
            delattr(os, name)
    multiprocessing.get_all_start_methods = lambda: ["spawn"]
    multiprocessing.get_context = None
    os.replace = refusing(os.replace, 1)
    os.unlink = refusing(os.unlink, 0)
    os.rename = refusing(os.rename, 1)
    sys.platform = "win32"


def run(script, *settings):
    sys.argv = [script, *settings]
    runpy.run_path(str(ROOT / script), run_name="__main__")


def main(folder):
    become_windows()
    sys.path.insert(0, str(ROOT))
    for room in "", "plumbing", "evidence":
        for path in sorted((ROOT / room).glob("*.py")):
            importlib.import_module(f"{room}.{path.stem}".lstrip("."))

    digits = f"--out_dir={folder / 'digits'}"
    run("train.py", *SMALL, digits, "--max_iters=2")
    run("train.py", digits, "--device=cpu", "--resume=yes", "--max_iters=4")
    run("distill.py", *SMALL, digits, "--max_iters=2")
    run("distill.py", *SMALL, digits, "--max_iters=4", "--resume=auto")
    run("sample.py", "--device=cpu", digits, "--num_samples=2", "--show_trajectory=True", f"--prompt={CAPTION}")
    run("sample.py", "--device=cpu", digits, "--num_samples=2", "--seed=1")  # in place of the images before
    run("evaluate.py", "--device=cpu", digits, "--val_examples=4", "--num_samples=4", "--trajectories=2")

    images = folder / "images"
    images.mkdir()
    for number in range(12):
        Image.new("RGB", (8, 8), (20 * number, 0, 0)).save(images / f"{number}.png")
        (images / f"{number}.txt").write_text(CAPTION, "utf-8")
    shards = f"--data_dir={folder / 'shards'}"
    run("data.py", "folder", str(images), f"--out={folder / 'shards'}", "--val=0.3")
    run("data.py", "shards", shards, f"--out={folder / 'shards.png'}")
    run("data.py", "shards", shards, f"--out={folder / 'shards.png'}", "--split=val")
    mine = f"--out_dir={folder / 'mine'}"
    run("train.py", *SMALL, mine, "--dataset=shards", shards, "--channels=3", "--image_size=8", "--text_len=16",
        "--bad_captions=1", "--workers=2", "--max_iters=2")
    run("sample.py", "--device=cpu", mine, "--num_samples=2")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
