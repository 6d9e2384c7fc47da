"""Checks of settings that contradict one another, which no range of a single setting can find."""

from plumbing.runtime import note

OBJECTIVES = "ntm", "fm", "tarflow"
RENAMED = {"resume": "--resume=yes", "auto": "--resume=auto"}
# settings of an NTM's loss and steps, and the values at which they have no effect
OF_NTM = {
    "rank": 0,
    "filters": 0,
    "logistics": 0,
    "level_weight": 0,
    "first_noise": 1,
    "closed_form": False,
    "mirrored": False,
    "velocity_weight": 0,
    "aux_weight": 0,
}
OF_FILTERS = "filter_window", "filter_leak"
SIZES_OF_NTM = (
    "parametrization",
    "transporter_width",
    "transporter_blocks",
    "transporter_layers",
    "transporter_heads",
    "steps",
    "shift",
    "max_t_min",
    "pairs",
    "t_min",
    "chunk",
    *OF_FILTERS,
)


def check_settings(config, model_config):
    """Raise ValueError for settings of a run that contradict one another; model_config: the NTMConfig made of them."""
    objective = config["objective"]
    if objective == "fm":
        check_flow_matching(config)
        return
    unused = [name for name in OF_FILTERS if name in config.given and not config["filters"]]
    if unused:
        note(f"{' and '.join(unused)} {'is' if len(unused) == 1 else 'are'} not used: filters is 0")
    for T in model_config.steps:
        try:
            model_config.time_grid(config["max_t_min"], T)
        except ValueError as error:
            raise ValueError(f"max_t_min: {error}") from error
    blocks = model_config.transporter_blocks
    for name in ("closed_form", "velocity_weight"):
        if config[name] and blocks:
            raise ValueError(f"{name} is {config[name]}, which needs transporter_blocks 0, not {blocks}")
    for name in ("filters", "logistics"):
        if config[name] and not hasattr(model_config, name):
            raise ValueError(f"{name} is {config[name]}, but neither a TarFlow nor a resumed run without it can have "
                             "any: leave it out")
    if config["closed_form"] and model_config.flow_outputs:
        raise ValueError("closed_form is True, which steps with filters or logistics do not have: use mirrored")
    if config["closed_form"] and config["mirrored"]:
        raise ValueError("closed_form and mirrored are both True, but each replaces the loss: choose one")
    if config["first_noise"] < 1 and objective == "tarflow":
        raise ValueError(f"first_noise is {config['first_noise']}, but a TarFlow has no step to couple: leave it out")
    if config["first_noise"] < 1 and not config["pairs"]:
        raise ValueError(f"first_noise is {config['first_noise']}, which needs pairs True, not {config['pairs']}")


def check_init_from(init_from):
    """Raise ValueError for values of init_from that were allowed in older versions."""
    if init_from in RENAMED:
        raise ValueError(f"init_from {init_from!r} is now a setting of its own: write {RENAMED[init_from]}")


def check_objective(objective):
    """Raise ValueError for an unknown objective."""
    if objective not in OBJECTIVES:
        raise ValueError(f"objective {objective!r} is unknown: choose 'ntm', 'fm' or 'tarflow'")


def check_flow_matching(config):
    """Raise ValueError for settings of an NTM's loss, and print a note about those of its size.

    A config file that serves both an NTM and flow matching may set the sizes.
    """
    given = [name for name in OF_NTM if name in config.given and config[name] != OF_NTM[name]]
    if given:
        wrong = ", ".join(f"{name} {config[name]}" for name in given)
        raise ValueError(f"objective is 'fm', and {wrong} is for an NTM: leave it out")
    unused = [name for name in SIZES_OF_NTM if name in config.given]
    if unused:
        note(f"flow matching does not use {', '.join(unused)}: only an NTM does")
