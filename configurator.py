"""A script's own module-level names are its settings; this file overrides them from the command line.

    steps = 4                    # reverse steps
    shift: float | None = None   # time-grid shift; None: by the formula
    config = configure(globals())

`python script.py config/small.py --steps=8` then runs config/small.py, an ordinary Python file, overrides the
settings that the file assigns, and sets steps to 8. Arguments apply from left to right, so the last one wins.
`--help` prints usage, examples, and each setting with its default and its comment.

A setting keeps the type of its default. Where the default says too little (None, or an int that may also be a
tuple of ints), an annotation decides. RANGES holds the range of each setting, the same in every script.
A wrong key or value ends the program with one line that names it.
"""

import ast
import contextlib
import difflib
import math
import operator
import sys
import traceback
from pathlib import Path
from types import ModuleType

from plumbing.console import help_text, print_all_text
from plumbing.paths import at_home

KINDS = "None", "bool", "int", "float", "tuple", "str"  # the types a setting may have
PHRASES = {"None": "None", "int": "an int", "float": "a finite float"}  # how errors name types; the others are "a TYPE"

# A number outside its range would train or sample wrongly without any error. A script's own default is always allowed:
# 0 may stand for "as trained". Every number of a tuple has to be in the range.
RANGES = {
    "at least 1": "batch_size grad_accum max_iters log_interval val_interval val_examples num_samples "
                  "trajectories repeats panel image_size channels text_len patch_size width heads "
                  "transporter_width transporter_layers transporter_heads steps best_of squares scale keep "
                  "filter_window",
    "at least 0 and at most 256": "workers",
    "at least 0": "depth restarts rank filters logistics level_weight transporter_blocks warmup_iters "
                  "lr words_lr min_lr weight_decay velocity_weight aux_weight guidance chunk minutes "
                  "save_minutes",
    "above 0": "grad_clip latent_scale seconds",
    "above 0 and at most 1": "first_noise",
    "above 0 and at most 1000": "shift",  # above 1000, levels of a grid round to the same number
    "at least 0 and below 1": "t_min max_t_min ema",
    "at least 0 and at most 1": "caption_dropout bad_limit bad_captions temperature filter_leak",
    f"at least 0 and below {2**31}": "seed",
}
RANGE_OF = {name: extent for extent, names in RANGES.items() for name in names.split()}
COMPARISONS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}
PATHS = {"out_dir", "data_dir", "real_dir", "init_from", "prompts", "folder", "decoder", "tokenizer", "judge", "beside",
         "figure"}
OF_NANOGPT = {"n_embd": "width", "n_layer": "depth", "n_head": "heads", "learning_rate": "lr", "eval_interval":
              "val_interval", "gradient_accumulation_steps": "grad_accum", "block_size": "text_len", "init_from":
              "resume"}


def kind(value):
    """The name of a value's type, as in KINDS."""
    return "None" if value is None else type(value).__name__


def admitted(hint):
    """The types an annotation names, in its order: `float | None` gives ["float", "None"]."""
    if isinstance(hint, ast.BinOp):
        return admitted(hint.left) + admitted(hint.right)
    name = ast.unparse(hint.value if isinstance(hint, ast.Subscript) else hint)  # tuple[int, ...] is a tuple
    if name not in KINDS:
        raise TypeError(f"a setting is annotated {name!r}; write one of {', '.join(KINDS)}, joined by |")
    return [name]


def from_value(value, kinds):
    """Convert `value` to one of the types `kinds`, in which an int counts as a float.

    Raises ValueError for a value of any other type, a float that is not finite, and a tuple that stands for several
    numbers but is empty or holds anything else.
    """
    numbers = [name for name in kinds if name in ("int", "float")]
    if kind(value) == "int" and "int" not in kinds and "float" in kinds:
        value = float(value)
    if kind(value) not in kinds or (kind(value) == "float" and not math.isfinite(value)):
        raise ValueError
    if kind(value) == "tuple" and numbers:
        if not value:
            raise ValueError
        value = tuple(from_value(number, numbers) for number in value)
    return value


def in_range(name, value):
    """Whether a value is in its setting's range; True for a setting without one."""
    numbers = [v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, (int, float))]
    limits = [limit.rsplit(" ", 1) for limit in RANGE_OF[name].split(" and ")] if name in RANGE_OF else []
    return all(COMPARISONS[comparison](number, float(limit)) for comparison, limit in limits for number in numbers)


def phrase(kinds):
    """The types that a setting may have, in words, for an error message."""
    numbers = {"int": " of ints", "float": " of finite floats"}.get(kinds[0], "")
    return " or ".join(PHRASES.get(kind, f"a {kind}") + (numbers if kind == "tuple" else "") for kind in kinds)


def from_text(text, kinds):
    """Read a text as one of the types `kinds`: as a Python literal if that fits, else as a str.

    Raises ValueError where neither fits.
    """
    if kinds != ["str"]:
        with contextlib.suppress(Exception):  # a text that is no literal may raise anything
            return from_value(ast.literal_eval({"true": "True", "false": "False"}.get(text, text)), kinds)
    return from_value(text, kinds)


def run_config(path):
    """Run a config file; return its public names {name: value}, without modules, functions and classes.

    Raises SystemExit with one line if the file cannot be read or run.
    """
    try:
        with open(path, "rb") as file:
            source = file.read()
    except OSError as error:
        raise SystemExit(f"config file {path!r} cannot be read: {error.strerror}; settings are written --key=value")
    names = {}
    try:
        exec(compile(source, path, "exec"), names)
    except (Exception, SystemExit) as error:
        # the innermost line of the config file that was running, or the line at which it does not compile
        lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
        *_, line = getattr(error, "lineno", None), *lines
        reason = " ".join(traceback.format_exception_only(error)[-1].split())
        raise SystemExit(f"{path}, line {line}: {reason}")
    return {name: value for name, value in names.items()
            if not name.startswith("_") and not callable(value) and not isinstance(value, ModuleType)}


class Settings(dict):
    """A script's settings {name: value}. `given` holds the names that the command line or a config file set."""


def settings_of(source, values):
    """The settings that a script's text assigns, {name: (value, node)}; values: the script's globals()."""
    found = {}
    for node in ast.parse(source).body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)]) | ast.AnnAssign(target=ast.Name(id=name)):
                public = not name.startswith("_") and not name.isupper()
                if public and name not in found and kind(values.get(name, ...)) in KINDS:
                    found[name] = values[name], node
    return found


def configure(settings):
    """Override a script's settings, its globals(), in place by sys.argv; return them as Settings, in their order.

    A setting is a name assigned on its own at module level before this call (`name = ...` or `name: annotation = ...`)
    that is neither _private nor CONSTANT and holds an int, float, bool, str, tuple or None. Raises SystemExit with one
    line for a wrong key, value, argument or config file, SystemExit(0) after --help, and TypeError for an annotation
    that names any other type.
    """
    source = Path(settings["__file__"]).read_text(encoding="utf-8")
    found = settings_of(source, settings)
    print_all_text()
    if {"-h", "--help"} & set(sys.argv[1:]):
        print(help_text(Path(settings["__file__"]).name, source, found))
        raise SystemExit(0)

    kinds = {}  # the types that each setting may have
    for name, (value, node) in found.items():
        hint = getattr(node, "annotation", None)
        kinds[name] = admitted(hint) if hint else [kind(value)]
    config = Settings({name: value for name, (value, _) in found.items()})
    config.given = set()
    for argument in sys.argv[1:]:
        key, equals, text = argument[2:].partition("=")
        if not argument.startswith("-"):
            origin, overrides, convert = f"{argument}: ", run_config(argument), from_value
        elif argument.startswith("--") and equals:
            origin, overrides, convert = "", {key: text}, from_text
        else:
            raise SystemExit(f"argument {argument!r} is not understood; write --key=value, with '=' and no space")
        for key, value in overrides.items():
            if key not in config:
                near = difflib.get_close_matches(OF_NANOGPT.get(key, key), config, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "--help lists the known ones"
                raise SystemExit(f"{origin}config key {key!r} is unknown; {hint}")
            try:
                config[key] = convert(value, kinds[key])
            except (ValueError, OverflowError):
                raise SystemExit(f"{origin}config key {key!r} is {value!r}, but {phrase(kinds[key])} is expected")
            if key in PATHS and isinstance(config[key], str):
                config[key] = at_home(config[key])
            if config[key] != settings[key] and not in_range(key, config[key]):
                raise SystemExit(f"{origin}config key {key} is {config[key]!r}, but must be {RANGE_OF[key]}")
        config.given |= overrides.keys()
    settings.update(config)
    return config
