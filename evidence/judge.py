"""Scores of samples by other means than the model: Frechet distances, nearest neighbours, and a classifier, the judge.

The judge (ours) is a small convolutional network. It learns, from the real images of shards such as emoji, the labels
that their KEY.json holds.

    python -m evidence.judge --data_dir=out/data/emoji --out=out/emoji_judge.pt
    python evaluate.py --out_dir=out/emoji --data_dir=out/data/emoji/combinations --judge=out/emoji_judge.pt
"""

import json
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from plumbing import checkpoint
from plumbing.console import parser_with_examples, print_all_text
from plumbing.loader import collate
from plumbing.paths import at_home
from plumbing.runtime import find_device, one_line_errors
from plumbing.shards import Shards

LABELS = "style", "group", "concept"
SHIFT = 2  # pixels by which training images are shifted, at most


def frechet_distance(a, b):
    """The Frechet distance between Gaussians fitted to two sets of images or features, (n, ...) and (m, ...).

    It is |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)), for n and m of at least 2. Blur raises the distance, as
    missing variance, and so does a small number of images: compare equal numbers.
    """
    mean_a, A = mean_and_root(a)
    mean_b, B = mean_and_root(b)
    cross = torch.linalg.svdvals(A @ B.T).sum()  # the trace of the root of S_a S_b
    squares = (mean_a - mean_b).square().sum() + A.square().sum() + B.square().sum()
    return (squares - 2 * cross).item()


def mean_and_root(x):
    """The mean of x (n, ...), flattened, and a matrix A with A^T A = S, the covariance."""
    x = x.flatten(1).double()
    mean = x.mean(0)
    A = torch.linalg.qr((x - mean) / math.sqrt(len(x) - 1), mode="r").R
    return mean, A


def nearest_labels(images, examples, labels):
    """The label (n,) of the nearest example (m, C, H, W) to each image (n, C, H, W), by squared distance."""
    return labels[torch.cdist(images.flatten(1), examples.flatten(1)).argmin(dim=1)]


class Judge(nn.Module):
    """A classifier of images (B, 3, size, size) by several labels at once. classes: {label: list of names}."""

    def __init__(self, size, classes, width=48):
        super().__init__()
        self.size = size
        self.classes = classes
        self.width = width
        layers = []
        channels = 3
        for stage in range(3):  # at 1/2, 1/4 and 1/8 of the size
            wider = width << stage
            for stride in (2, 1):
                conv = nn.Conv2d(channels, wider, 3, stride, 1, bias=False)
                layers += [conv, nn.BatchNorm2d(wider), nn.ReLU()]
                channels = wider
        self.trunk = nn.Sequential(*layers)
        self.heads = nn.ModuleDict({label: nn.Linear(channels, len(names)) for label, names in classes.items()})

    def features(self, images):
        """Features (B, 4 width), in which Frechet distances are measured."""
        return self.trunk(images).mean(dim=(-2, -1))

    @torch.no_grad()
    def judge(self, images, batch_size=500):
        """The features (n, 4 width) of images (n, 3, H, W), and for each label the names that they get."""
        images = F.interpolate(images, [self.size] * 2, mode="area")
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        names = {}
        for label, head in self.heads.items():
            classes = self.classes[label]
            names[label] = [classes[k] for k in head(features).argmax(dim=1)]
        return features, names


def labels_of(dataset, count):
    """The KEY.json of the first `count` examples of shards, a list of dicts. Raises ValueError for missing labels."""
    records = []
    for i in range(min(count, len(dataset))):
        record = json.loads(dataset.members(i).get("json", b"{}"))
        for label in (*LABELS, "captions"):
            if label not in record:
                raise ValueError(f"example {i} has no {label} in its .json: name shards of `python data.py emoji`")
        records.append(record)
    return records


def images_of(dataset, count):
    """The first images of shards, (count, C, H, W)."""
    return numbered(dataset, range(min(count, len(dataset))))


def numbered(dataset, numbers):
    """The images of shards with these numbers, (n, C, H, W)."""
    images, *_ = collate(dataset.__getitems__(list(numbers)))
    return images


def judged(judge, images, records):
    """The features of images (n, 3, H, W), and whether they show what their records say, {label: list of booleans}.

    Images whose class the judge does not know are left out, and labels without a known class too.
    """
    features, given = judge.judge(images)
    hits = {}
    for label, names in given.items():
        truth = [record[label] for record in records]
        known = set(judge.classes[label])
        found = [name == true for name, true in zip(names, truth) if true in known]
        if found:
            hits[label] = found
    return features, hits


def load(path):
    """Load a judge that main() has trained. Raises ValueError for any other file."""
    contents = checkpoint.load(path, "judge")
    judge = Judge(contents["size"], contents["classes"], contents["width"])
    checkpoint.restore(judge, contents["judge"], path)
    return judge.eval()


def compare(path, images, dataset, train_set):
    """The judge's findings on samples (n, 3, H, W) for the first captions of `dataset`, shards, and on real images.

    Returns a dict. LABEL and "LABEL, of real images": a list of booleans, whether the judge finds the caption's label
    in each sample, or in each image of the shards. "frechet_distance": between the judge's features of the samples and
    of these images; "frechet_distance, of real images": with train_set's images for the samples, unless it is None.
    """
    judge = load(path)
    records = labels_of(dataset, len(images))
    reference, real_hits = judged(judge, images_of(dataset, len(images)), records)
    features, found = judged(judge, images, records)
    for label, hits in real_hits.items():
        found[f"{label}, of real images"] = hits
    found["frechet_distance"] = frechet_distance(features, reference)
    if train_set:
        labels = labels_of(train_set, 5 * len(images))
        originals = [i for i, record in enumerate(labels) if not record.get("copy")]
        features, _ = judge.judge(numbered(train_set, originals[:len(images)]))
        found["frechet_distance, of real images"] = frechet_distance(features, reference)
    return found


def train(judge, images, targets, iterations, batch_size=128, lr=3e-3):
    """Train the judge by the cross-entropy of all labels, on its device.

    images (n, 3, size, size) are shifted by up to SHIFT pixels and get some noise, since samples are not clean either.
    targets: {label: class numbers (n,)}.
    """
    device = next(judge.parameters()).device
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, iterations)
    images = F.pad(images, [SHIFT] * 4, value=1.0).to(device)
    targets = {label: classes.to(device) for label, classes in targets.items()}
    generator = torch.Generator().manual_seed(0)  # on the CPU: every device trains the same judge, up to rounding
    bar = trange(iterations, desc="judge", leave=False)
    for _ in bar:
        chosen = torch.randint(len(images), (batch_size,), generator=generator)
        down, across = torch.randint(2 * SHIFT + 1, (2,), generator=generator).tolist()
        batch = images[chosen, :, down:down + judge.size, across:across + judge.size]
        noise = torch.randn(batch.shape, generator=generator)
        noise = noise * torch.rand(batch_size, 1, 1, 1, generator=generator)
        features = judge.features(batch + 0.1 * noise.to(device))
        loss = 0.0
        for label, classes in targets.items():
            logits = judge.heads[label](features)
            loss = loss + F.cross_entropy(logits, classes[chosen], label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}")


def report(judge, folder):
    """Print how often a judge is right on the shards held out in a folder, if there are any."""
    try:
        held_out = Shards(folder, "val", 3, judge.size, judge.size)
    except FileNotFoundError:
        return
    count = len(held_out)
    _, hits = judged(judge, images_of(held_out, count), labels_of(held_out, count))
    accuracies = ", ".join(f"{label} {np.mean(hit):.3f}" for label, hit in hits.items())
    print(f"{folder}/val, {count} images: {accuracies}")


def make_parser():
    program = "python -m evidence.judge"
    parser = parser_with_examples(
        prog=program,
        description="Trains a judge of labelled shards on their training images.",
        examples=[f"{program} --data_dir=out/data/emoji --out=out/emoji_judge.pt", f"{program} --image_size=64"],
    )
    parser.add_argument("--data_dir", type=at_home, default="out/data/emoji", help="the shards; default %(default)s")
    parser.add_argument("--out", type=at_home, default="out/emoji_judge.pt",
                        help="the judge's checkpoint; default %(default)s")
    parser.add_argument("--image_size", type=int, default=32,
                        help="pixels a side of the images that it judges; default %(default)s")
    parser.add_argument("--iterations", type=int, default=3000, help="updates in training; default %(default)s")
    parser.add_argument("--device", default="", help="cuda, mps or cpu; default: the best available")
    return parser


@one_line_errors()
def main(arguments=None):
    print_all_text()
    args = make_parser().parse_args(arguments)
    torch.manual_seed(0)
    dataset = Shards(args.data_dir, "train", 3, args.image_size, args.image_size)
    records = labels_of(dataset, len(dataset))
    classes = {}
    targets = {}
    for label in LABELS:
        names, numbers = np.unique([record[label] for record in records], return_inverse=True)
        classes[label] = names.tolist()
        targets[label] = torch.from_numpy(numbers)
    judge = Judge(args.image_size, classes).to(find_device(args.device))
    train(judge, images_of(dataset, len(dataset)), targets, args.iterations)
    judge.cpu().eval()
    for folder in args.data_dir, f"{args.data_dir}/combinations":
        report(judge, folder)
    checkpoint.save(args.out, kind="judge", judge=judge, size=judge.size, classes=classes, width=judge.width)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
