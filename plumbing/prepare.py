"""Makes shards (see shards.py) of emoji and of folders of captioned images, and vocabularies of captions.

    python data.py emoji                                          7,572 images of two vendors' emoji, fetched by npm
    python data.py folder DIR
    python data.py vocab --data_dir=SHARDS --out=NAME.tiktoken
"""

import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
from collections import Counter
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from plumbing.loader import FEW
from plumbing.shards import IMAGES, Shards, find_shards, first_example, write_shards
from plumbing.tokenizer import ASSETS, make_vocabulary

PACKAGES = ("emoji-datasource-google", "emoji-datasource-twitter")
VERSION = "16.0.0"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
EMOJI_VAL = 0.05  # the fraction of emoji held out
UNNAMED = "more columns than there are names (quote a text that holds commas)"
LICENCES = """Images of the npm packages emoji-datasource-google and emoji-datasource-twitter, by Cal Henderson
(https://github.com/iamcal/emoji-data, MIT licence), unchanged.

google: Noto Emoji, https://github.com/googlefonts/noto-emoji, Apache License 2.0.
twitter: Twemoji, https://github.com/twitter/twemoji, CC BY 4.0, copyright Twitter, Inc and other contributors.
"""


def hashed(text):
    """A number in [0, 1) that is a function of the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def write_splits(out, examples, load):
    """Writes examples (key, split, caption, source) to out/train and out/val; load(source) -> {suffix: bytes}."""
    for split in ("train", "val"):
        chosen = [(key, caption, source) for key, its_split, caption, source in examples if its_split == split]
        write_shards(out / split, ((key, {**load(source), "txt": caption.encode()})
                                   for key, caption, source in tqdm(chosen, desc=split, leave=False)))
        print(f"{split}: {len(chosen):,} images")


def emoji_caption(emoji, tones, vendor):
    """What an emoji of emoji.json shows, such as "a red apple, food fruit, google style": half of the captions have the
    name alone, the others a short name, or the subcategory or category as well. tones: list of keys of TONES."""
    def plain(text):
        text = text.lower().replace(" & ", " and ").replace(": ", " with ").replace(",", "")
        return re.sub(r"[-_\s]+", " ", text).strip()

    u = hashed(f"{emoji['unified']} {'-'.join(tones)} {vendor}")
    short = emoji["short_names"][0]
    name = plain(short if 0.5 <= u < 0.65 and not short.startswith("flag-") else emoji["name"])
    first = name.split()[0]
    plural = first in ("women", "men", "people") or first.endswith("s") and not first.endswith(("ss", "us"))
    if not plural:
        name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    more = plain(emoji["subcategory"]) if 0.65 <= u < 0.9 else plain(emoji["category"]) if u >= 0.9 else ""
    tone = f"with {' and '.join(TONES[tone] for tone in tones)} skin tone" if tones else ""
    return ", ".join(part for part in (f"{name} {tone}".strip(), more, f"{vendor} style") if part)


def read_emoji(source):
    """The emoji of a package's .tgz, a list of (key, split, caption, PNG bytes). Raises ValueError for other files."""
    images, table = {}, None
    try:
        with tarfile.open(source, "r:gz") as tar:
            for member in tar:
                if match := re.fullmatch(r"package/img/(\w+)/64/([0-9a-f-]+\.png)", member.name):
                    vendor, images[match[2]] = match[1], tar.extractfile(member).read()
                elif member.name == "package/emoji.json":
                    table = json.load(tar.extractfile(member))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read ({error}); fetch it again with `npm pack`") from error
    if not images or table is None:
        raise ValueError(f"{source} is not one of {' and '.join(PACKAGES)}: no emoji.json or no img/VENDOR/64 in it")
    found = []
    for emoji in table:
        split = "val" if hashed(emoji["unified"]) < EMOJI_VAL else "train"
        for tones, variant in {"": emoji, **emoji.get("skin_variations", {})}.items():
            if variant["image"] in images:
                caption = emoji_caption(emoji, tones.split("-") if tones else [], vendor)
                found.append((f"{vendor}-{Path(variant['image']).stem}", split, caption, images[variant["image"]]))
    return found


def prepare_emoji(args):
    with tempfile.TemporaryDirectory() as folder:
        if not args.source:
            try:
                packages = [f"{package}@{VERSION}" for package in PACKAGES]
                subprocess.run(["npm", "pack", "--silent", *packages], cwd=folder, check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                raise OSError(f"npm could not fetch {' and '.join(PACKAGES)} ({error}): install npm, or name files "
                              "that `npm pack` made elsewhere with --source=FILE.tgz") from error
        sources = args.source or sorted(Path(folder).glob("*.tgz"))
        emoji = [entry for source in tqdm(sources, desc="read", leave=False) for entry in read_emoji(source)]
    emoji.sort(key=lambda entry: hashed(entry[0]))  # shuffled for other readers, which may stream the shards
    write_splits(Path(args.out), emoji, lambda data: {"png": data})
    (Path(args.out) / "LICENCES.txt").write_text(LICENCES)
    print(f"wrote {args.out}")


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
    examples = [(keys[name], "val" if name in held_out else "train", captions[name], files[name]) for name in order]
    write_splits(out, examples, lambda path: {path.suffix.lower()[1:]: path.read_bytes()})
    left_out = Counter({"images without a caption": len(files) - len(captions),
                        "rows that name no image": len(texts.keys() - files.keys())})
    Image.init()  # which is when Pillow knows all formats
    left_out.update(f"{path.suffix} files" for path in found
                    if path.suffix.lower() in Image.EXTENSION and path.suffix.lower()[1:] not in IMAGES)
    print(f"wrote {out}" + "".join(f"; {count} {what} were left out" for what, count in left_out.items() if count))


def prepare_vocabulary(args):
    out = Path(args.out or ASSETS / "captions.tiktoken")
    if args.data_dir and not args.out or out.suffix != ".tiktoken":
        raise ValueError(f"the vocabulary of some shards needs --out=NAME.tiktoken, but --out is {args.out!r}")
    if args.size and not args.data_dir:
        raise ValueError(f"--size={args.size} is for the vocabulary of shards: name them by --data_dir")
    if args.data_dir:
        _, shape = first_example(find_shards(args.data_dir, "train")[0])
        shards = Shards(args.data_dir, "train", *shape)
        contents = make_vocabulary(shards.captions(range(len(shards))), args.size or 4096)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(contents if args.data_dir else args.caption_vocabulary())
    print(f"wrote {out}")


def add_commands(command, caption_vocabulary):
    """Commands of data.py, by command(name, function, help) -> parser. caption_vocabulary() -> bytes of a file."""
    sub = command("emoji", prepare_emoji, "makes shards of the emoji of two vendors, fetched by npm")
    sub.add_argument("--source", action="append", metavar="FILE", help="a .tgz that `npm pack` made; may be repeated")
    sub.add_argument("--out", default="out/data/emoji")
    sub = command("folder", prepare_folder, "makes shards of a folder of captioned images")
    sub.add_argument("folder", metavar="DIR", help="images with .txt sidecars, metadata.jsonl or metadata.csv")
    sub.add_argument("--out", help="default out/data/NAME")
    sub.add_argument("--val", type=float, help="fraction held out; default 0.01, or for small sets up to 0.1")
    sub = command("vocab", prepare_vocabulary, "makes a vocabulary: assets/captions.tiktoken, or that of some shards")
    sub.set_defaults(caption_vocabulary=caption_vocabulary)
    sub.add_argument("--data_dir", default="", help="which shards")
    sub.add_argument("--size", type=int, help="of the vocabulary of shards, in tokens; default 4096")
    sub.add_argument("--out", help="a file NAME.tiktoken")
