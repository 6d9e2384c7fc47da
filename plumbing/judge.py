"""Judges of samples that are not the model: Frechet distances, nearest neighbours, and of shards whose examples have
labels in KEY.json, such as emoji, a small convolutional network that has learned them from the real images.

    python -m plumbing.judge --data_dir=out/data/emoji --out=out/emoji_judge.pt
    python evaluate.py --out_dir=out/emoji_tune --data_dir=out/data/emoji/combinations --judge=out/emoji_judge.pt
"""

import argparse
import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from plumbing import checkpoint
from plumbing.loader import collate
from plumbing.paths import at_home
from plumbing.runtime import one_line_errors
from plumbing.shards import Shards

LABELS = "style", "group", "concept"
SHIFT = 2  # pixels by which training images are moved at most


def frechet_distance(a, b):
    """Between Gaussians fitted to two sets of images or features, (n, ...) and (m, ...), n and m at least 2:
    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)). Blur shows in it as missing variance, and so do few images:
    compare equal numbers."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    # S_a = A^T A and S_b = B^T B, and so the root of S_a S_b has the singular values of A B^T as its eigenvalues
    A, B = (torch.linalg.qr((x - x.mean(0)) / math.sqrt(len(x) - 1), mode="r").R for x in (a, b))
    cross = torch.linalg.svdvals(A @ B.T).sum()
    return ((a.mean(0) - b.mean(0)).square().sum() + A.square().sum() + B.square().sum() - 2 * cross).item()


def nearest_labels(images, examples, labels):
    """The label (n,) of the example (m, C, H, W) nearest to each image (n, C, H, W), by squared distance."""
    return labels[torch.cdist(images.flatten(1), examples.flatten(1)).argmin(dim=1)]


class Judge(nn.Module):
    """Says which of its classes images (B, 3, size, size) show. classes: {label: list of names}."""

    def __init__(self, size, classes, width=48):
        super().__init__()
        self.size, self.classes, self.width = size, classes, width
        layers, channels = [], 3
        for stage in range(3):  # at 1/2, 1/4 and 1/8 of the size
            for stride in (2, 1):
                layers += [nn.Conv2d(channels, width << stage, 3, stride, 1, bias=False),
                           nn.BatchNorm2d(width << stage), nn.ReLU()]
                channels = width << stage
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({label: nn.Linear(channels, len(names)) for label, names in classes.items()})

    def features(self, images):
        """(B, 4 width): what a Frechet distance is measured in."""
        return self.trunk(images).mean(dim=(-2, -1))

    @torch.no_grad()
    def judge(self, images, batch_size=500):
        """The features (n, 4 width) of images (n, 3, H, W), and for each label the names that it gives them."""
        images = F.interpolate(images, [self.size] * 2, mode="area")
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        return features, {label: [self.classes[label][k] for k in head(features).argmax(dim=1)]
                          for label, head in self.heads.items()}


def labels_of(dataset, count):
    """KEY.json of the first examples of shards, a list. Raises ValueError where labels are missing."""
    records = []
    for i in range(min(count, len(dataset))):
        records.append(json.loads(dataset.members(i).get("json", b"{}")))
        if missing := [label for label in (*LABELS, "captions") if label not in records[-1]]:
            raise ValueError(f"example {i} has no {missing[0]} in its .json, as those of `python data.py emoji` have")
    return records


def images_of(dataset, count):
    """The first images of shards, (count, C, H, W)."""
    return collate(dataset.__getitems__(list(range(min(count, len(dataset))))))[0]


def judged(judge, images, records):
    """The features of images (n, 3, H, W) that are to show what their records say; and for each label of which the
    judge knows the class whether it finds it, {label: list of booleans}."""
    features, given = judge.judge(images)
    hits = {label: [name == record[label] for name, record in zip(names, records)
                    if record[label] in judge.classes[label]] for label, names in given.items()}
    return features, {label: hit for label, hit in hits.items() if hit}


def load(path):
    """A judge that main() has trained. Raises ValueError for a file that is none."""
    contents = checkpoint.load(path, "judge")
    judge = Judge(contents["size"], contents["classes"], contents["width"])
    checkpoint.restore(judge, contents["judge"], path)
    return judge.eval()


def compare(path, images, dataset, train_set):
    """What the judge in a file finds in samples (n, 3, H, W) for the first captions of shards: a list of booleans for
    each label, and the distance from the shards' own images in its features; and the same of real images, for the
    distance those of train_set, or None."""
    judge, records = load(path), labels_of(dataset, len(images))
    held_out = images_of(dataset, len(images))
    (reference, real), (features, drawn) = (judged(judge, of, records) for of in (held_out, images))
    found = drawn | {f"{label}, of real images": hit for label, hit in real.items()}
    found["frechet_distance"] = frechet_distance(features, reference)
    if train_set:
        originals = [i for i, record in enumerate(labels_of(train_set, 5 * len(images))) if not record.get("copy")]
        others = collate(train_set.__getitems__(originals[:len(images)]))[0]
        found["frechet_distance, of real images"] = frechet_distance(judge.judge(others)[0], reference)
    return found


def train(judge, images, targets, iterations, batch_size=128, lr=3e-3):
    """Trains by cross-entropy of all labels, on images (n, 3, size, size) that are moved by up to SHIFT pixels and have
    some noise, since samples are not clean either. targets: {label: class numbers (n,)}."""
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, iterations)
    images, generator = F.pad(images, [SHIFT] * 4, value=1.0), torch.Generator().manual_seed(0)
    for _ in (bar := trange(iterations, desc="judge", leave=False)):
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        down, across = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        batch = images[chosen, :, down:down + judge.size, across:across + judge.size]
        noise = torch.randn(batch.shape, generator=generator) * torch.rand(batch_size, 1, 1, 1, generator=generator)
        features = judge.features(batch + 0.1 * noise)
        loss = sum(F.cross_entropy(judge.heads[label](features), of_all[chosen], label_smoothing=0.1)
                   for label, of_all in targets.items())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


@one_line_errors()
def main(arguments=None):
    parser = argparse.ArgumentParser(prog="python -m plumbing.judge", allow_abbrev=False,
                                     description="Trains a judge of labelled shards on their training images.")
    parser.add_argument("--data_dir", type=at_home, default="out/data/emoji")
    parser.add_argument("--out", type=at_home, default="out/emoji_judge.pt")
    parser.add_argument("--image_size", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3000)
    args = parser.parse_args(arguments)
    torch.manual_seed(0)
    dataset = Shards(args.data_dir, "train", 3, args.image_size, args.image_size)
    records, images = labels_of(dataset, len(dataset)), images_of(dataset, len(dataset))
    classes = {label: sorted({record[label] for record in records}) for label in LABELS}
    numbers = {label: {name: k for k, name in enumerate(names)} for label, names in classes.items()}
    targets = {label: torch.tensor([numbers[label][record[label]] for record in records]) for label in LABELS}
    judge = Judge(args.image_size, classes)
    train(judge, images, targets, args.iterations)
    judge.eval()
    for folder in "", "/combinations":
        try:
            held_out = Shards(args.data_dir + folder, "val", 3, args.image_size, args.image_size)
        except FileNotFoundError:
            continue
        _, hits = judged(judge, images_of(held_out, len(held_out)), labels_of(held_out, len(held_out)))
        print(f"{args.data_dir}{folder}/val, {len(held_out)} images: "
              + ", ".join(f"{label} {np.mean(hit):.3f}" for label, hit in hits.items()))
    checkpoint.save(args.out, kind="judge", judge=judge, size=judge.size, classes=classes, width=judge.width)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
