"""What a run of train.py starts from: nothing, a trained network, or its own checkpoint."""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from model import NTM
from networks import NETWORKS, NTMS, kind_of
from plumbing import checkpoint
from plumbing.runtime import note
from plumbing.settings import check_init_from, check_objective, check_settings
from plumbing.shards import find_shards, first_example
from sit import load_sit

# the settings that a trained network fixes for a run that starts from it
NETWORK_SETTINGS = ("image_size", "channels", "patch_size", "text_len", "width", "depth", "heads", "tokenizer")
TRANSPORTER_SETTINGS = ("transporter_width", "transporter_blocks", "transporter_layers", "transporter_heads")


class Start(NamedTuple):
    """What a run starts from: the kind of its network, as in networks.py; the other fields are None if not needed.

    base: a trained network whose weights the run takes. resumed: contents of the checkpoint that the run continues.
    vocabulary: the tokenizer's, from the trained network or the checkpoint.
    """

    kind: str
    base: nn.Module | None = None
    resumed: dict | None = None
    vocabulary: dict | None = None


def find_start(config, device):
    """The Start that the settings ask for; writes the settings that the start fixes into config. Raises ValueError."""
    init_from = config["init_from"]
    check_objective(config["objective"])
    check_init_from(init_from)
    path = Path(config["out_dir"]) / "ckpt.pt"
    resumed = checkpoint.find_resumable(config["resume"], path, *NETWORKS)
    if resumed:
        return continue_run(config, resumed, path)
    if init_from == "scratch":
        check_size_of_shards(config)
        return Start(kind_of(config, is_sit=False))
    if config["objective"] != "ntm":
        raise ValueError("only an NTM starts from another model: leave objective or init_from out")
    if init_from.startswith("sit:"):
        start, decided = start_from_sit(config)
    else:
        start, decided = start_from_checkpoint(config, device)
    decided["rank"] = max(decided.get("rank", 0), config["rank"])  # a run may add directions, but not remove them
    for name in ("filters", "logistics"):  # a run may add them to a start without any
        decided[name] = decided.get(name) or config[name]
    for key in config.given & decided.keys():
        if in_full(config[key]) != in_full(decided[key]):
            raise ValueError(f"{key} is {config[key]!r}, but {init_from} fixes it at {decided[key]!r}: leave it out")
    config |= decided
    is_sit = start.kind.endswith("sit")
    return start._replace(kind=kind_of(config, is_sit))


def in_full(value):
    """image_size as (height, width); other values as they are."""
    return (value, value) if type(value) is int else value


def continue_run(config, resumed, path):
    """The Start of a resumed run: its settings are the checkpoint's, except for those that the command line gives."""
    init_from = config["init_from"]
    checkpoint.keep_settings(config, resumed)
    origin = resumed["settings"].get("init_from", "scratch")
    if "init_from" in config.given and origin != init_from:
        note(f"init_from {init_from} is ignored: {path} is resumed, and it started from {origin}")
    config["init_from"] = origin
    parametrization = resumed["model_config"]["parametrization"]
    differs = "parametrization" in config.given and config["parametrization"] != parametrization
    if differs and resumed["kind"] != "fm":
        raise ValueError(f"parametrization is {config['parametrization']!r}, but the run of {path} has "
                         f"{parametrization!r}: leave it out to resume it")
    config["parametrization"] = parametrization
    return Start(resumed["kind"], resumed=resumed, vocabulary=resumed.get("vocabulary"))


def check_size_of_shards(config):
    """Raise ValueError unless a run from scratch says which size of images it wants: shards may hold any."""
    if config["dataset"] != "shards" or {"image_size", "channels"} <= config.given:
        return
    paths, _ = find_shards(config["data_dir"], "train")
    _, shape = first_example(paths)
    size = "x".join(map(str, shape))
    raise ValueError(
        f"shards need image_size and channels: their first example is {size} (channels, height, "
        "width); give that size for latents, any size for images"
    )


def start_from_sit(config):
    """The Start from published SiT weights, and the settings that they fix."""
    path = config["init_from"].removeprefix("sit:")
    heads = config["heads"] if "heads" in config.given else None
    network = load_sit(path, heads)
    decided = {key: getattr(network, key) for key in NETWORK_SETTINGS if hasattr(network, key)}
    decided |= {"tokenizer": f"classes:{network.classes}", "text_len": 1, "parametrization": "posterior"}
    return Start("sit", network), decided


def start_from_checkpoint(config, device):
    """The Start from a trained flow-matching model or NTM, and the settings that it fixes."""
    path = config["init_from"]
    if not Path(path).exists():
        raise ValueError(
            f"init_from {path!r} is neither 'scratch', sit:PATH nor a file: train that model first, "
            "or continue a run with --resume=yes"
        )
    network, trained = checkpoint.load_network(path, NETWORKS, device)
    kind = trained["kind"]
    if kind == "tarflow":
        raise ValueError(f"init_from {path!r} is a TarFlow, which has no predictor to start an NTM from: continue it "
                         "with --resume=yes")
    start = Start(kind, network, vocabulary=trained.get("vocabulary"))
    decided = {key: trained["settings"][key] for key in NETWORK_SETTINGS}
    if kind not in NTMS:
        return start, decided | {"parametrization": "posterior"}
    for key in ("parametrization", "rank", "filters", "logistics"):
        decided[key] = getattr(network.config, key, 0)
    if decided["filters"]:
        decided["filter_window"] = network.config.filter_window
        if "filter_leak" not in config.given:
            decided["filter_leak"] = network.config.filter_leak
    if network.config.transporter_blocks:  # a run may add a transporter to a start without one
        decided |= {key: getattr(network.config, key) for key in TRANSPORTER_SETTINGS}
    if kind.startswith("coupled"):
        decided["first_noise"] = network.config.first_noise
    return start, decided | {"aux_weight": 0.0}  # no flow-matching model to stay close to


def build_model(config, start, vocab_size, device):
    """The model to train, and the frozen flow-matching model whose means it stays near by Eq. (26), or None.

    Both have the weights of start.base, if there is one; a checkpoint's weights are restored later.
    """
    network = NETWORKS[start.kind]
    names = network.config_class.__dataclass_fields__.keys() & config.keys()
    fields = {name: config[name] for name in names}
    model_config = network.config_class(vocab_size=vocab_size, **fields)
    check_settings(config, model_config)
    torch.manual_seed(config["seed"])  # the same initial weights on every rank
    model = network(model_config).to(device)
    if isinstance(start.base, NTM):
        take_weights(model, start.base)
    elif start.base is not None:
        start.base.hand_over(model.predictor)
    near_its_start = config["init_from"] != "scratch" and config["aux_weight"]
    if model_config.parametrization == "direct" or not near_its_start:
        return model, None
    frozen = network(replace(model_config, transporter_blocks=0)).to(device)
    frozen.predictor.load_state_dict(model.predictor.state_dict())
    return model, frozen.requires_grad_(False).eval()


def take_weights(model, trained):
    """Copy the weights of `trained`, another NTM, into a model.

    A transporter, directions or a flow over pixels that `trained` lacks keep their initial values.
    """
    ours = model.state_dict()
    theirs = trained.state_dict()
    for name, own in ours.items():
        if name not in theirs:
            theirs[name] = own
        elif name.startswith("predictor.head."):
            known = theirs[name]
            theirs[name] = torch.cat([known, own[len(known) :]])
    model.load_state_dict(theirs)
