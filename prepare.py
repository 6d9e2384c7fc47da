"""Makes shards (see shards.py): the emoji of two vendors, folders of captioned pictures, and latents of pictures.

    python data.py emoji                                       out/data/emoji/train and val, by npm
    python data.py folder DIR --out=out/data/mine              from pictures with captions beside them
    python data.py encode --data_dir=out/data/mine --encoder=encoder.pt2 --image_size=256 --out=out/data/mine_latents

An interrupted encoding goes on where it stopped.
"""

import csv
import hashlib
import io
import json
import re
import subprocess
import tarfile
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from tqdm import tqdm

from configurator import claim
from example import PICTURES
from ranks import find_device
from shards import Shards, find_shards, first_example, load_index, write_shard, write_shards

# ---------------------------------------------------------------------------------------------------------------
# python data.py emoji

PACKAGES = ("emoji-datasource-google", "emoji-datasource-twitter")
VERSION = "16.0.0"
TONES = {"1F3FB": "light", "1F3FC": "medium-light", "1F3FD": "medium", "1F3FE": "medium-dark", "1F3FF": "dark"}
EMOJI_VAL = 0.05  # the share of emoji held out
LICENCES = """The pictures are those of the npm packages emoji-datasource-google and emoji-datasource-twitter, by Cal
Henderson (https://github.com/iamcal/emoji-data, MIT licence), laid on white.

google: Noto Emoji, https://github.com/googlefonts/noto-emoji, Apache License 2.0.
twitter: Twemoji, https://github.com/twitter/twemoji, Creative Commons Attribution 4.0 (CC BY 4.0), copyright Twitter,
Inc and other contributors.

"""


def fraction(text):
    """A number in [0, 1) that is a function of the text alone."""
    return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16) / 16**8


def with_article(words):
    """A name with "a" or "an", or as it is where it is plural."""
    first = words.split()[0]
    plural = first in ("women", "men", "people") or (first.endswith("s") and not first.endswith(("ss", "us")))
    return words if plural else f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def emoji_caption(emoji, tones, vendor):
    """What an emoji of emoji.json shows, such as "a red apple, food fruit, google style".

    Half of the captions give the name alone, the others a short name, or the subcategory or category as well; which,
    is a function of emoji and vendor.
    """
    def plain(text):
        text = text.lower().replace(" & ", " and ").replace(": ", " with ").replace(",", "")
        return re.sub(r"[-_\s]+", " ", text).strip()

    u = fraction(f"{emoji['unified']} {'-'.join(tones)} {vendor}")
    short = emoji["short_names"][0]
    name = with_article(plain(short if 0.5 <= u < 0.65 and not short.startswith("flag-") else emoji["name"]))
    more = plain(emoji["subcategory"]) if 0.65 <= u < 0.9 else plain(emoji["category"]) if u >= 0.9 else ""
    tone = f"with {' and '.join(TONES[tone] for tone in tones)} skin tone" if tones else ""
    return ", ".join(part for part in (f"{name} {tone}".strip(), more, f"{vendor} style") if part)


def read_emoji(source):
    """The emoji of a package: vendor, and for each (key, split, caption, PNG bytes); source: the path of its .tgz.

    Raises ValueError where it is not such a package.
    """
    pattern = re.compile(r"package/img/(\w+)/64/([0-9a-f-]+\.png)")
    images, table = {}, None
    try:
        with tarfile.open(source, "r:gz") as tar:
            for member in tar:
                if match := pattern.fullmatch(member.name):
                    vendor, images[match[2]] = match[1], tar.extractfile(member).read()
                elif member.name == "package/emoji.json":
                    table = json.load(tar.extractfile(member))
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(f"{source} cannot be read ({error}); fetch it again with `npm pack`") from error
    if not images or table is None:
        raise ValueError(f"{source} is not one of {' and '.join(PACKAGES)}: no emoji.json or no img/VENDOR/64 in it")
    found = []
    for emoji in table:
        split = "val" if fraction(emoji["unified"]) < EMOJI_VAL else "train"
        variants = {"": emoji, **emoji.get("skin_variations", {})}
        for tones, variant in variants.items():
            if variant["image"] in images:
                key = f"{vendor}-{variant['image'].removesuffix('.png')}"
                caption = emoji_caption(emoji, tones.split("-") if tones else [], vendor)
                found.append((key, split, caption, images[variant["image"]]))
    return vendor, found


def on_white(data):
    """A PNG of the same picture on white, smaller than any photograph's."""
    picture = Image.open(io.BytesIO(data)).convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    file = io.BytesIO()
    flat.save(file, "PNG", optimize=True)
    return file.getvalue()


def prepare_emoji(args):
    out = Path(args.out)
    with tempfile.TemporaryDirectory() as folder:
        sources = args.source
        if not sources:
            try:
                packages = [f"{package}@{VERSION}" for package in PACKAGES]
                subprocess.run(["npm", "pack", "--silent", *packages], cwd=folder, check=True, capture_output=True)
            except (FileNotFoundError, subprocess.CalledProcessError) as error:
                raise OSError(f"npm could not fetch {' and '.join(PACKAGES)} ({error}): install npm, or name files "
                              "that `npm pack` made elsewhere with --source=FILE.tgz") from error
            sources = sorted(Path(folder).glob("*.tgz"))
        emoji = [entry for source in tqdm(sources, desc="read", leave=False) for entry in read_emoji(source)[1]]
    # Shards are read in any order; shuffled all the same, for those who stream them.
    emoji.sort(key=lambda entry: fraction(entry[0]))
    for split in ("train", "val"):
        chosen = [entry for entry in emoji if entry[1] == split]
        count = write_shards(out / split, ((key, {"png": on_white(data), "txt": caption.encode()})
                                           for key, _, caption, data in tqdm(chosen, desc=split, leave=False)))
        print(f"{split}: {count:,} pictures")
    (out / "LICENCES.txt").write_text(LICENCES)
    print(f"wrote {out}")


# ---------------------------------------------------------------------------------------------------------------
# python data.py folder


def read_metadata(folder):
    """The captions {file name: text} of Hugging Face's metadata.jsonl or .csv, or None where there is neither."""
    for name in ("metadata.jsonl", "metadata.csv"):
        path = folder / name
        if not path.exists():
            continue
        with open(path, encoding="utf-8-sig", newline="") as file:
            try:
                lines = (line for line in file if line.strip())
                rows = csv.DictReader(lines) if name.endswith("csv") else map(json.loads, lines)
                return {row["file_name"]: (row["text"] or "").encode("utf-8", "replace").decode() for row in rows}
            except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
                raise ValueError(f"{path} needs a file_name and a text in every row: {error!r}") from error
    return None


def prepare_folder(args):
    folder, out = Path(args.folder), Path(args.out or Path("out/data") / Path(args.folder).resolve().name)
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    metadata = read_metadata(folder)
    suffixes = tuple(f".{suffix}" for suffix in (*PICTURES, "npy"))
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes)
    captions = {}
    for path in files:
        sidecar, name = path.with_suffix(".txt"), path.relative_to(folder).as_posix()
        caption = metadata.get(name) if metadata is not None else (
            sidecar.read_text(encoding="utf-8", errors="replace") if sidecar.exists() else None)
        if caption and caption.strip():
            captions[path] = caption.strip()
    if not captions:
        raise ValueError(f"{folder} holds no captioned picture: put the caption of NAME.png into NAME.txt, or "
                         "file_name and text of all into metadata.jsonl or metadata.csv")
    left = len(files) - len(captions)
    keys = {path: f"{i:08d}" for i, path in enumerate(captions)}  # names may have dots, which keys must not
    captioned = sorted(captions, key=lambda path: fraction(path.relative_to(folder).as_posix()))
    held_out = set(captioned[:max(1, round(args.val * len(captioned)))]) if len(captioned) > 1 else set()
    for split in ("train", "val"):
        chosen = [path for path in captioned if (path in held_out) == (split == "val")]
        write_shards(out / split, ((keys[path], {path.suffix.lower()[1:]: path.read_bytes(),
                                                 "txt": captions[path].encode()})
                                   for path in tqdm(chosen, desc=split, leave=False)))
        print(f"{split}: {len(chosen):,} pictures")
    print(f"wrote {out}" + (f"; {left} pictures without a caption were left out" if left else ""))


# ---------------------------------------------------------------------------------------------------------------
# python data.py encode


def load_exported(path, device):
    """A program saved by torch.export, as a function of a batch. Raises ValueError or OSError for another file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}: the README shows how an autoencoder is exported")
    try:
        if not zipfile.is_zipfile(path):  # of which torch would say much more
            raise ValueError("not a zip archive")
        program = torch.export.load(path)
    except Exception as error:  # what reading garbage raises depends on the garbage
        raise ValueError(f"{path} is not a program saved by torch.export ({type(error).__name__})") from error
    module = program.module().to(device)

    def call(batch):
        try:  # in pieces: torch.export allowed AutoencoderKL no more than 63 pictures at once, and so does memory
            return torch.cat([module(piece) for piece in batch.split(16)])
        except Exception as error:  # what a program says about other sizes depends on the program
            size = "x".join(map(str, batch.shape[1:]))
            raise ValueError(f"{path} cannot take {size}: {str(error).strip().splitlines()[-1]}; give it the size it "
                             "was exported for") from error
    return call


def encode_shards(args, split, out, encoder, device):
    """Encodes the shards of a split, a shard to a shard of `out`, but for those that are there already.

    Returns how many pictures were left out because they are unusable.
    """
    paths, _ = find_shards(args.data_dir, split)
    if first_example(paths)[0]:
        raise ValueError(f"{paths[0]} holds latents already")
    source = Shards(args.data_dir, split, 3, args.image_size, args.image_size)
    left_out, first = 0, 0
    for path, count in zip(tqdm(source.paths, desc=split, unit="shard"), source.header["counts"]):
        numbers = range(first, first + count)
        first += count
        if (out / path.name).exists():
            continue
        batches = [numbers[i:i + args.batch_size] for i in range(0, count, args.batch_size)]
        # forked, since a fresh interpreter would run the script that we are in once more
        loader = DataLoader(source, batch_sampler=batches, num_workers=args.workers, collate_fn=list,
                            multiprocessing_context="fork" if args.workers else None)
        examples = []
        for batch, triples in zip(batches, loader):
            usable = [(number, image, caption) for number, (image, caption, fault) in zip(batch, triples) if not fault]
            left_out += len(batch) - len(usable)
            if not usable:
                continue
            with torch.inference_mode():
                latents = encoder(torch.stack([image for _, image, _ in usable]).to(device)).half().cpu().numpy()
            for (number, _, caption), latent in zip(usable, latents):
                file = io.BytesIO()
                np.save(file, latent)
                examples.append((f"{number:09d}", {"npy": file.getvalue(), "txt": caption.encode()}))
        write_shard(out / path.name, examples)
    return left_out


def measure_latents(data_dir, most=10_000):
    """Mean, and scale to standard deviation 1, of each channel of the training latents in data_dir, two lists."""
    _, shape = first_example(find_shards(data_dir, "train")[0])
    latents = Shards(data_dir, "train", *shape, latent_scale=1.0)
    count = min(most, len(latents))
    some = torch.stack([latents[i * len(latents) // count][0] for i in range(count)]).double()
    deviation = some.std(dim=(0, 2, 3))
    if not (deviation > 1e-6).all():
        raise ValueError(f"a channel of the latents is constant, their standard deviations are {deviation.tolist()}")
    return some.mean(dim=(0, 2, 3)).tolist(), (1 / deviation).tolist()


def prepare_latents(args):
    device = find_device(args.device)
    encoder, out = load_exported(args.encoder, device), Path(args.out)
    splits = {"train": out / "train", "val": out / "val"} if (Path(args.data_dir) / "train").is_dir() else {"all": out}
    sources = {split: load_index(find_shards(args.data_dir, split)[0])[0]["shards"] for split in splits}
    for shards in sources.values():
        if len({Path(name).name for name, _, _ in shards}) < len(shards):
            raise ValueError(f"several shards of data_dir {args.data_dir!r} have one name: encode folder by folder")
    settings = {"data_dir": args.data_dir, "encoder": args.encoder, "image_size": args.image_size,
                "encoder_sha256": hashlib.sha256(Path(args.encoder).read_bytes()).hexdigest(),
                "shards_sha256": hashlib.sha256(json.dumps(sources).encode()).hexdigest()}
    claim(out / "encoding.json", settings,
          f"{out} holds latents made with other settings (its encoding.json): choose another --out, or remove it")
    left_out = sum(encode_shards(args, split, folder, encoder, device) for split, folder in splits.items())
    mean, scale = measure_latents(str(out))
    (out / "latents.json").write_text(json.dumps({"mean": mean, "scale": scale}) + "\n")
    print(f"means {', '.join(f'{m:.3f}' for m in mean)}; scales {', '.join(f'{s:.4f}' for s in scale)}")
    print(f"wrote {out}" + (f"; {left_out} unusable pictures were left out" if left_out else ""))


def add_commands(command):
    """The commands of data.py that this file carries out; command(name, function, help) makes a parser for each."""
    sub = command("emoji", prepare_emoji, "makes shards of the emoji of two vendors, fetched by npm")
    sub.add_argument("--source", action="append", metavar="FILE", help="what `npm pack` made; may be repeated")
    sub.add_argument("--out", default="out/data/emoji")
    sub = command("folder", prepare_folder, "makes shards of a folder of pictures with captions")
    sub.add_argument("folder", metavar="DIR", help="pictures with .txt sidecars, metadata.jsonl or metadata.csv")
    sub.add_argument("--out", help="default out/data/NAME")
    sub.add_argument("--val", type=float, default=0.01, help="share held out for validation")
    sub = command("encode", prepare_latents, "makes shards of latents from shards of pictures")
    sub.add_argument("--data_dir", required=True, help="which shards")
    sub.add_argument("--encoder", required=True, help="saved by torch.export: (B, 3, H, W) in [-1, 1] to latents")
    sub.add_argument("--out", required=True)
    sub.add_argument("--image_size", type=int, default=256)
    sub.add_argument("--batch_size", type=int, default=32)
    sub.add_argument("--workers", type=int, default=0, help="processes that decode pictures")
    sub.add_argument("--device", default="", help="cuda, mps or cpu; the best there is by default")
