"""Shards of images to shards of latents, by an autoencoder that torch.export has saved, and latents back to images.

    python data.py encode --data_dir=out/data/mine --encoder=encoder.pt2 --image_size=256 --out=out/data/mine_latents
"""

import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from plumbing.loader import read_ahead
from plumbing.runtime import claim, find_device
from plumbing.shards import Shards, find_shards, first_example, load_index, write_shard


def load_exported(path, device):
    """A program saved by torch.export, as a function of a batch. Raises ValueError or OSError for another file."""
    if not Path(path).exists():
        raise FileNotFoundError(f"there is no {path}: docs/data.md shows how to export an autoencoder")
    try:
        zipfile.ZipFile(path).close()  # torch would print much more about a file that is no archive
        program = torch.export.load(path)
    except Exception as error:  # what reading garbage raises depends on the garbage
        raise ValueError(f"{path} is not a program saved by torch.export ({type(error).__name__})") from error
    module = program.module().to(device)

    def call(batch):
        try:  # in pieces: torch.export allowed AutoencoderKL no more than 63 images at once, and memory is finite too
            return torch.cat([module(piece) for piece in batch.split(16)])
        except Exception as error:  # what a program says about other sizes depends on the program
            size = "x".join(map(str, batch.shape[1:]))
            raise ValueError(f"{path} cannot take {size}: {str(error).strip().splitlines()[-1]}; give it the size it "
                             "was exported for") from error
    return call


def encode_shards(args, split, out, encoder, device):
    """Encodes the shards of a split, each to a shard of `out`, except those that are there already, so that an
    interrupted encoding goes on. Returns how many unusable images were left out."""
    paths, _ = find_shards(args.data_dir, split)
    if first_example(paths)[0]:
        raise ValueError(f"{paths[0]} holds latents already")
    source = Shards(args.data_dir, split, 3, args.image_size, args.image_size)
    left_out, counts = 0, source.header["counts"]
    for path, first, count in zip(tqdm(source.paths, desc=split, unit="shard"), source.firsts, counts):
        if (out / path.name).exists():
            continue
        numbers = range(first, first + count)
        batches = [numbers[i:i + args.batch_size] for i in range(0, count, args.batch_size)]
        examples = []
        for batch, triples in zip(batches, read_ahead(source, batches, args.workers, collate_fn=list)):
            usable = [(number, image, caption) for number, (image, caption, fault) in zip(batch, triples) if not fault]
            if usable:
                kept, images, captions = zip(*usable)
                with torch.inference_mode():
                    latents = encoder(torch.stack(images).to(device)).half().cpu().numpy()
                for number, latent, caption in zip(kept, latents, captions):
                    np.save(file := io.BytesIO(), latent)
                    examples.append((f"{number:09d}", {"npy": file.getvalue(), "txt": caption.encode()}))
        left_out += count - len(examples)
        write_shard(out / path.name, examples)
    return left_out


def measure_latents(data_dir, most=10_000):
    """Means, and scales to standard deviation 1, of the channels of the training latents in data_dir, two lists."""
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
    print(f"wrote {out}" + (f"; {left_out} unusable images were left out" if left_out else ""))


def add_commands(command):
    """A command of data.py, by command(name, function, help) -> parser."""
    sub = command("encode", prepare_latents, "makes shards of latents from shards of images")
    sub.add_argument("--data_dir", required=True, help="which shards")
    sub.add_argument("--encoder", required=True, help="saved by torch.export: (B, 3, H, W) in [-1, 1] to latents")
    sub.add_argument("--out", required=True)
    sub.add_argument("--image_size", type=int, default=256)
    sub.add_argument("--batch_size", type=int, default=32)
    sub.add_argument("--workers", type=int, default=0, help="processes that decode images")
    sub.add_argument("--device", default="", help="cuda, mps or cpu; the best available by default")
