"""Makes shards (see shards.py) of folders of captioned images, and vocabularies of captions.

    python data.py folder DIR
    python data.py vocab --data_dir=SHARDS --out=NAME.tiktoken
"""

import csv
import hashlib
import io
import json
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from plumbing.loader import FEW
from plumbing.shards import IMAGES, Shards, find_shards, first_example, write_shards
from plumbing.tokenizer import make_vocabulary

UNNAMED = "more columns than there are names (quote a text that holds commas)"


def hashed(text):
    """A number in [0, 1) that is a function of the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def write_splits(out, examples):
    """Writes examples (key, split, members {suffix: bytes or a path}) to out/SPLIT, for each of the splits."""
    for split in sorted({split for _, split, _ in examples}):
        chosen = [(key, members) for key, its_split, members in examples if its_split == split]
        write_shards(out / split, ((key, {suffix: data.read_bytes() if isinstance(data, Path) else data
                                          for suffix, data in members.items()})
                                   for key, members in tqdm(chosen, desc=split, leave=False)))
        print(f"{split}: {len(chosen):,} images")


def read_captions(folder, files):
    """{file name: text} of Hugging Face's metadata.jsonl or .csv, or where there is neither of the files' sidecars."""
    path = next((path for name in ("metadata.jsonl", "metadata.csv") if (path := folder / name).exists()), None)
    if path is None:
        sidecars = {name: path.with_suffix(".txt") for name, path in files.items()}
        return {name: read_text(path) for name, path in sidecars.items() if path.exists()}
    text = read_text(path)
    try:
        rows = (list(csv.DictReader(io.StringIO(text), restkey=UNNAMED)) if path.suffix == ".csv" else
                [json.loads(line) for line in text.split("\n") if line.strip()])  # strings may hold other line ends
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{path} needs a file_name and a text in every row: {error}") from error
    captions = {}
    for number, row in enumerate(rows, 1):
        row = row if isinstance(row, dict) else {"no columns:": row}
        name, text = row.get("file_name"), row.get("text", ...) or ""
        if not isinstance(name, str) or not isinstance(text, str) or UNNAMED in row:
            columns = ", ".join(f"{column} {value!r:.40}" for column, value in row.items()) or "none"
            raise ValueError(f"{path} needs a file_name and a text in every row; row {number} has {columns}")
        if name in captions:
            raise ValueError(f"{path} has two captions of {name}, the second in row {number}: leave one out")
        captions[name] = text.encode("utf-8", "replace").decode()  # JSON can hold half a surrogate pair
    return captions


def read_text(path):
    """The text of a file in UTF-8, without the mark that some editors put first. Raises ValueError for other files."""
    try:
        return path.read_text("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}): convert it") from error


def prepare_folder(args):
    folder, out = Path(args.folder), Path(args.out or Path("out/data") / Path(args.folder).resolve().name)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    found = [path for path in sorted(folder.rglob("*")) if not path.name.startswith(".")]  # as macOS leaves them
    files = {path.relative_to(folder).as_posix(): path for path in found if path.suffix.lower()[1:] in (*IMAGES, "npy")}
    texts = read_captions(folder, files)
    captions = {name: texts[name].strip() for name in files if texts.get(name, "").strip()}
    if not captions:
        raise ValueError(f"{folder} holds no captioned image: put the caption of NAME.png into NAME.txt, or "
                         "file_name and text of all into metadata.jsonl or metadata.csv")
    if len(captions) == 1:
        raise ValueError(f"{folder} holds one captioned image: it takes two, one to train on and one to validate")
    keys = {name: f"{i:08d}" for i, name in enumerate(captions)}  # names may have dots, which keys must not
    order = sorted(captions, key=hashed)
    val = args.val or max(0.01, min(0.1, FEW / len(order)))
    held_out = set(order[:min(max(1, round(val * len(order))), len(order) - 1)])
    examples = [(keys[name], "val" if name in held_out else "train",
                 {files[name].suffix.lower()[1:]: files[name], "txt": captions[name].encode()}) for name in order]
    write_splits(out, examples)
    left_out = Counter({"images without a caption": len(files) - len(captions),
                        "rows that name no image": len(texts.keys() - files.keys())})
    Image.init()  # which is when Pillow knows all formats
    left_out.update(f"{path.suffix} files" for path in found
                    if path.suffix.lower() in Image.EXTENSION and path.suffix.lower()[1:] not in IMAGES)
    print(f"wrote {out}" + "".join(f"; {count} {what} were left out" for what, count in left_out.items() if count))


def prepare_vocabulary(args):
    out = Path(args.out)
    if out.suffix != ".tiktoken":
        raise ValueError(f"a vocabulary needs --out=NAME.tiktoken, but --out is {args.out!r}")
    _, shape = first_example(find_shards(args.data_dir, "train")[0])
    shards = Shards(args.data_dir, "train", *shape)
    contents = make_vocabulary(shards.captions(range(len(shards))), args.size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(contents)
    print(f"wrote {out}")


def add_commands(command):
    """Commands of data.py, by command(name, function, help) -> parser."""
    sub = command("folder", prepare_folder, "makes shards of a folder of captioned images")
    sub.add_argument("folder", metavar="DIR", help="images with .txt sidecars, metadata.jsonl or metadata.csv")
    sub.add_argument("--out", help="default out/data/NAME")
    sub.add_argument("--val", type=float, help="fraction held out; default 0.01, or for small sets up to 0.1")
    sub = command("vocab", prepare_vocabulary, "makes a vocabulary of some shards' captions")
    sub.add_argument("--data_dir", required=True, help="which shards")
    sub.add_argument("--size", type=int, default=4096, help="in tokens; default 4096")
    sub.add_argument("--out", required=True, help="a file NAME.tiktoken")
