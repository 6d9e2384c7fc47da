"""The networks that train.py trains, by the kind that a checkpoint names."""

from beyond import CoupledNTM, TarFlow
from fm import FlowMatching
from model import NTM
from pixels import PixelNTM
from sit import CoupledSiTNTM, SiTNTM

NTMS = {
    "ntm": NTM,
    "sit": SiTNTM,
    "pixels": PixelNTM,  # (ours)
    "coupled": CoupledNTM,  # (ours)
    "coupled_sit": CoupledSiTNTM,  # (ours)
    "tarflow": TarFlow,  # (ours)
}
NETWORKS = {"fm": FlowMatching, **NTMS}


def kind_of(config, is_sit):
    """The kind of network that a run of these settings trains. is_sit: whether the predictor is a SiT."""
    if config["objective"] != "ntm":
        return config["objective"]
    if config["first_noise"] < 1:
        return "coupled_sit" if is_sit else "coupled"
    if is_sit:
        return "sit"
    return "pixels" if config["filters"] or config["logistics"] else "ntm"
