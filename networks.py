"""Every network that a checkpoint may hold, by its kind."""

from beyond import CoupledNTM, TarFlow
from fm import FlowMatching
from model import NTM
from sit import CoupledSiTNTM, SiTNTM

NTMS = {
    "ntm": NTM,
    "sit": SiTNTM,
    "coupled": CoupledNTM,  # (ours)
    "coupled_sit": CoupledSiTNTM,  # (ours)
    "tarflow": TarFlow,  # (ours)
}
NETWORKS = {"fm": FlowMatching, **NTMS}


def kind_of(objective, first_noise, is_sit):
    """The kind of the network that a run trains, by its settings, and whether it starts from a SiT."""
    if objective != "ntm":
        return objective
    if first_noise < 1:
        return "coupled_sit" if is_sit else "coupled"
    return "sit" if is_sit else "ntm"
