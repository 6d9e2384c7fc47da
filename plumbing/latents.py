"""Encode shards of images into shards of latents, and decode latents, by an autoencoder saved by torch.export.

    python data.py encode --data_dir=out/data/mine --encoder=encoder.pt2 --image_size=256 --out=out/data/mine_latents
    torchrun --nproc_per_node=8 data.py encode ...     # with eight GPUs
"""

import hashlib
import io
import json
import zipfile
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.examples import IMAGES, TEXTS, Unusable, last, pick
from plumbing.loader import read_ahead
from plumbing.lock import lock_file
from plumbing.runtime import claim, gathered, leave_ranks, meet_ranks, note, start_ranks
from plumbing.shards import Shards, find_shards, first_example, write_shard

PATIENCE = timedelta(days=1)  # how long a rank that has finished waits for the others


def load_exported(path, device):
    """A program saved by torch.export, as a function of a batch. Raises ValueError or OSError for any other file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}: docs/data.md shows how to export an autoencoder")
    try:
        zipfile.ZipFile(path).close()  # fails in one line where torch would print many
        program = torch.export.load(path)
    except Exception as error:  # a damaged file may raise anything
        raise ValueError(f"{path} is not a program saved by torch.export ({type(error).__name__})") from error
    module = program.module().to(device)

    def call(batch):
        try:  # in pieces: memory is limited, and an exported AutoencoderKL takes at most 63 images at once
            return torch.cat([module(piece) for piece in batch.split(16)])
        except Exception as error:  # the error for another size depends on the program
            size = "x".join(map(str, batch.shape[1:]))
            raise ValueError(f"{path} cannot take {size}: {str(error).strip().splitlines()[-1]}; give it the size it "
                             "was exported for") from error
    return call


def load_decoder(settings, device):
    """A function from normalised latents (B, C, h, w) of a model with these settings to images in [-1, 1].

    The function runs the program that the setting "decoder" names. Raises ValueError or OSError for a program that is
    no decoder, and for a model that samples images.
    """
    path, statistics = settings["decoder"], settings.get("latents")
    if not statistics:
        raise ValueError(f"decoder is {path!r}, but this model makes images, not latents: leave it out")
    program = load_exported(path, device)
    size = settings["image_size"]
    shape = settings["channels"], *((size, size) if type(size) is int else size)
    mean, scale = (torch.tensor(statistics[name], device=device)[:, None, None] for name in ("mean", "scale"))

    @torch.no_grad()
    def decode(latents):
        return program(latents / scale + mean).clamp(-1, 1)

    made = decode(torch.zeros(1, *shape, device=device)).shape  # to report a wrong program at once
    if len(made) != 4 or made[1] not in (1, 3):
        sizes = ["x".join(map(str, size)) for size in (made[1:], shape)]
        raise ValueError(f"decoder {path} makes {sizes[0]} of a latent {sizes[1]}, which is no image: name the "
                         "decoder, not the encoder")
    return decode


class Examples:
    """The examples of shards, as encoding reads them; None in place of an unusable one.

    ds[i] -> (image (3, H, W), suffix of its latent, {suffix: bytes} of its captions and labels).
    """

    def __init__(self, source):
        self.source = source

    def __getitem__(self, number):
        try:
            members = self.source.members(number)
            image, _ = self.source.decode(members, number)
        except Unusable:
            return None
        name = pick(members, *IMAGES).rpartition(".")[0]  # the latent keeps this name, which links it to a text
        texts = {suffix: data for suffix, data in members.items() if last(suffix) in TEXTS}
        return image, f"{name}.npy".lstrip("."), texts


def encode_shard(source, shard, encoder, device, args):
    """The usable examples of shard number `shard`, a list of (key, members), with latents (float16) for images."""
    first, count = int(source.firsts[shard]), source.header["counts"][shard]
    numbers = range(first, first + count)
    batches = [numbers[i:i + args.batch_size] for i in range(0, count, args.batch_size)]
    examples = []
    for batch, loaded in zip(batches, read_ahead(Examples(source), batches, args.workers, collate_fn=list)):
        usable = [(number, *example) for number, example in zip(batch, loaded) if example]
        if not usable:
            continue
        kept, images, names, texts = zip(*usable)
        with torch.inference_mode():
            latents = encoder(torch.stack(images).to(device)).half().cpu().numpy()
        for number, latent, name, its_texts in zip(kept, latents, names, texts):
            np.save(file := io.BytesIO(), latent)
            examples.append((f"{number:09d}", {name: file.getvalue(), **its_texts}))
    return examples


def encode_shards(sources, folders, encoder, ranks, args):
    """Encode the shards of each split, divided among the ranks; return how many unusable images were left out in all.

    Each shard becomes one shard of the split's folder. Shards that are already there are skipped, so that an
    interrupted encoding continues.
    """
    device, rank, world = ranks
    missing = [(split, shard) for split, source in sources.items() for shard, path in enumerate(source.paths)
               if not (folders[split] / path.name).exists()]
    missing = gathered(missing)[0]  # all ranks use one list, made before any of them writes
    left_out = 0
    for split, shard in tqdm(missing[rank::world], desc="encoding", unit="shard", disable=rank > 0):
        source = sources[split]
        examples = encode_shard(source, shard, encoder, device, args)
        left_out += source.header["counts"][shard] - len(examples)
        write_shard(folders[split] / source.paths[shard].name, examples)
    return sum(gathered(left_out))


def measure_latents(data_dir, most=10_000):
    """The mean of each channel of the training latents, and the factor to standard deviation 1: two lists.

    They are measured on at most `most` latents, evenly spread. Raises ValueError if a channel is constant.
    """
    _, shape = first_example(find_shards(data_dir, "train")[0])
    latents = Shards(data_dir, "train", *shape, latent_scale=1.0)
    count = min(most, len(latents))
    some = torch.stack([latents[i * len(latents) // count][0] for i in range(count)]).double()
    deviation = some.std(dim=(0, 2, 3))
    if not (deviation > 1e-6).all():
        raise ValueError(f"a channel of the latents is constant, their standard deviations are {deviation.tolist()}")
    return some.mean(dim=(0, 2, 3)).tolist(), (1 / deviation).tolist()


def open_sources(args):
    """The shards to encode, {split: Shards}. Raises ValueError for shards that cannot be encoded."""
    splits = ("train", "val") if (Path(args.data_dir) / "train").is_dir() else ("all",)
    sources = {}
    for split in splits:
        paths, _ = find_shards(args.data_dir, split)
        if first_example(paths)[0]:
            raise ValueError(f"{paths[0]} holds latents already: name shards of images in --data_dir")
        if len({path.name for path in paths}) < len(paths):
            raise ValueError(f"several shards of data_dir {args.data_dir!r} have one name: encode folder by folder")
        sources[split] = Shards(args.data_dir, split, 3, args.image_size, args.image_size)
    return sources


def take_folder(out, sources, args):
    """Make the folder `out`, or continue in it, and remove unfinished files of a killed process.

    The folder is locked until the file that this returns is closed. Raises ValueError if another job has locked it, or
    if it holds other latents.
    """
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / "encoding.lock", "w", encoding="utf-8")
    try:
        lock_file(lock)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process encodes into {out}: wait until it ends, or stop it and start one job on all "
                         "GPUs, torchrun --nproc_per_node=8 data.py encode ...") from None
    except OSError as error:
        note(f"{out} cannot be locked ({error}): make sure that no other process encodes into it")
    shards = {split: source.header["shards"] for split, source in sources.items()}
    settings = {"data_dir": args.data_dir, "encoder": args.encoder, "image_size": args.image_size,
                "encoder_sha256": hashlib.sha256(Path(args.encoder).read_bytes()).hexdigest(),
                "shards_sha256": hashlib.sha256(json.dumps(shards).encode()).hexdigest()}
    claim(out / "encoding.json", settings,
          f"{out} holds latents made with other settings (its encoding.json): choose another --out, or remove it")
    for part in out.rglob("*.tar.*.part"):
        part.unlink()
    return lock


def prepare_latents(args):
    """Run the command `encode`: write the shards of latents and their statistics, latents.json."""
    ranks = device, rank, _ = start_ranks(args.device, PATIENCE)
    encoder, out = load_exported(args.encoder, device), Path(args.out)
    sources = open_sources(args)
    folders = {split: out if split == "all" else out / split for split in sources}
    lock, fault = None, ""
    if rank == 0:
        try:
            lock = take_folder(out, sources, args)
        except (ValueError, OSError) as error:
            fault = str(error)
    if fault := gathered(fault)[0]:  # all ranks end with the same error, so none waits for another
        raise ValueError(fault)
    if not all(gathered((out / "encoding.json").exists())):
        raise ValueError(f"{out} is seen by some ranks only: choose an --out that all of them can reach")
    left_out = encode_shards(sources, folders, encoder, ranks, args)
    if rank == 0:
        mean, scale = measure_latents(str(out))
        (out / "latents.json").write_text(json.dumps({"mean": mean, "scale": scale}) + "\n", "utf-8")
        print(f"means {', '.join(f'{m:.3f}' for m in mean)}; scales {', '.join(f'{s:.4f}' for s in scale)}")
        print(f"wrote {out}" + (f"; {left_out} unusable images were left out" if left_out else ""))
        lock.close()
    meet_ranks()
    leave_ranks()


def add_commands(command):
    """Add the command `encode` to data.py, by command(name, function, help, examples) -> parser."""
    start = "data.py encode --data_dir=out/data/cats --encoder=encoder.pt2 --out=out/latents"
    examples = [f"python {start}", f"torchrun --nproc_per_node=8 {start} --batch_size=64 --workers=8"]
    sub = command("encode", prepare_latents, "makes shards of latents from shards of images", examples)
    sub.add_argument("--data_dir", required=True, help="the shards: a folder, a glob or NAME-{00000..00099}.tar")
    sub.add_argument("--encoder", required=True, help="a program saved by torch.export: images (B, 3, H, W) in [-1, 1] "
                                                      "to latents (B, C, h, w)")
    sub.add_argument("--out", required=True, help="the folder of the latents' shards")
    sub.add_argument("--image_size", type=int, default=256, help="pixels a side of what is encoded; default 256")
    sub.add_argument("--batch_size", type=int, default=32, help="images that are encoded at once; default 32")
    sub.add_argument("--workers", type=int, default=0, help="processes that decode images; default 0: this one does")
    sub.add_argument("--device", default="", help="cuda, mps or cpu; default: the best available")
