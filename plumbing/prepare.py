"""Make shards (see shards.py) from folders of captioned images (see folders.py), and vocabularies from captions.

    python data.py folder DIR
    python data.py vocab --data_dir=SHARDS --out=NAME.tiktoken
"""

from pathlib import Path

from tqdm import tqdm

from plumbing.folders import (READ, choose_held_out, files_below, hashed, printable, read_captions,
                              twins, unread_formats)
from plumbing.loader import FEW
from plumbing.shards import IMAGES, Shards, find_shards, first_example, write_shards
from plumbing.tokenizer import make_vocabulary


def write_splits(out, examples):
    """Write examples (key, split, members {suffix: bytes or a path}) into out/SPLIT for each split."""
    for split in sorted({split for _, split, _ in examples}):
        chosen = [(key, members) for key, its_split, members in examples if its_split == split]
        write_shards(out / split, ((key, {suffix: data.read_bytes() if isinstance(data, Path) else data
                                          for suffix, data in members.items()})
                                   for key, members in tqdm(chosen, desc=split, leave=False)))
        print(f"{split}: {len(chosen):,} images")


def prepare_folder(args):
    """Run the command `folder`: write shards of a folder's captioned images, and print what was left out."""
    folder = Path(args.folder)
    out = Path(args.out or Path("out/data", folder.resolve().name))
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no folder {folder}")
    files, left_out = files_below(folder)
    images = [name for name, path in files.items() if path.suffix.lower() in READ]
    captions, unknown = read_captions(folder, files, images)
    left_out.update({"images without a caption": len(images) - len(captions),
                     "rows that name no image": len(unknown)})
    left_out.update(unread_formats(files))
    told = [f"{count} {what} were left out" for what, count in left_out.items() if count]
    told += [f"the first of these rows names {unknown[0]!r}"] if unknown else []
    if len(captions) < 2:
        explain_too_few(folder, len(captions), told)
    order = sorted(captions, key=hashed)
    groups = twins(order, files)
    told += remarks(captions, groups)

    keys = {name: f"{i:08d}" for i, name in enumerate(captions)}  # names may have dots, which keys must not
    held_out = choose_held_out(groups, args.val or max(0.01, min(0.1, FEW / len(captions))))
    examples = [(keys[name], "val" if name in held_out else "train",
                 {files[name].suffix.lower()[1:]: files[name], "txt": captions[name].encode()})
                for name in order]
    write_splits(out, examples)
    print("; ".join([f"wrote {printable(out)}", *told]))


def remarks(captions, groups):
    """Lines about what may surprise in the division of the images into train and val, a list."""
    told, homes = [], {name.split("/")[0] for name in captions if "/" in name}
    if "train" in homes and homes & {"val", "valid", "validation", "test"}:
        told.append("its folders, such as train and val, were merged and divided anew")
    if len(groups) == 1:
        told.append("all images are copies of one image, which is in both train and val")
    return told


def explain_too_few(folder, count, told):
    """Raise ValueError for a folder with one captioned image or none; told: lines about what was left out."""
    besides = "".join(f"; {line}" for line in told)
    if count == 0:
        raise ValueError(f"{printable(folder)} holds no captioned image{besides}: put the caption of NAME.png into "
                         "NAME.txt, or file_name and text of all into metadata.jsonl or metadata.csv; images may be "
                         f"{', '.join(IMAGES)}: convert others")
    raise ValueError(f"{printable(folder)} holds one captioned image{besides}: it takes two, one to train on and one "
                     "to validate")


def prepare_vocabulary(args):
    """Run the command `vocab`: write a .tiktoken file made from the captions in shards."""
    out = Path(args.out)
    if out.suffix != ".tiktoken":
        raise ValueError(f"a vocabulary needs --out=NAME.tiktoken, but --out is {args.out!r}")
    _, shape = first_example(find_shards(args.data_dir, "train")[0])
    shards = Shards(args.data_dir, "train", *shape)
    numbers = tqdm(range(len(shards)), desc="captions", leave=False)
    contents = make_vocabulary(shards.captions(numbers), args.size)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_bytes(contents)
    print(f"wrote {out}")


def add_commands(command):
    """Add commands to data.py, by command(name, function, help, examples) -> parser."""
    examples = ["python data.py folder ~/pictures", "python data.py folder ~/pictures --out=out/data/cats --val=0.05"]
    sub = command("folder", prepare_folder, "makes shards of a folder of captioned images", examples)
    sub.add_argument("folder", metavar="DIR", help="images with .txt sidecars, metadata.jsonl or metadata.csv")
    sub.add_argument("--out", help="the folder of the shards; default out/data/NAME")
    sub.add_argument("--val", type=float, help="fraction of the images to hold out; default 0.01, or for small sets up "
                                               "to 0.1")
    examples = ["python data.py vocab --data_dir=out/data/cats --out=out/cats.tiktoken",
                "python data.py vocab --data_dir=out/data/cats --size=1024 --out=out/cats.tiktoken"]
    sub = command("vocab", prepare_vocabulary, "makes a vocabulary of the captions in shards", examples)
    sub.add_argument("--data_dir", required=True, help="the shards: a folder, a glob or NAME-{00000..00099}.tar")
    sub.add_argument("--size", type=int, default=4096, help="tokens of the vocabulary; default 4096")
    sub.add_argument("--out", required=True, help="the file of the vocabulary, NAME.tiktoken")
