"""Settings that contradict one another, where no single range tells."""

from plumbing.runtime import note

OF_NTM = {"rank": 0, "level_weight": 0, "first_noise": 1, "closed_form": False, "velocity_weight": 0, "aux_weight": 0}
SIZES_OF_NTM = ("transporter_width", "transporter_blocks", "transporter_layers", "transporter_heads",
                "steps", "shift", "max_t_min", "pairs", "t_min", "chunk")


def check_objective(config, known):
    """Raises ValueError for an objective that is none of the known, for an NTM without a weight, and for what only an
    NTM learns by, given to flow matching. What sizes an NTM alone is noted, so that one config file does for both."""
    objective = config["objective"]
    if objective not in known:
        raise ValueError(f"objective {objective!r} is unknown: choose 'ntm' or 'fm'")
    if objective == "ntm" and not config["depth"] and not config["transporter_blocks"]:
        raise ValueError("depth and transporter_blocks are both 0, which leaves nothing to train: set one of them")
    if objective == "fm":
        given = [name for name in OF_NTM if name in config.given and config[name] != OF_NTM[name]]
        if given:
            wrong = ", ".join(f"{name} {config[name]}" for name in given)
            raise ValueError(f"objective is 'fm', and {wrong} is for an NTM: leave it out")
        unused = [name for name in SIZES_OF_NTM if name in config.given]
        if unused:
            note(f"flow matching does not use {', '.join(unused)}, which an NTM does")
