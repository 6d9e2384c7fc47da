"""Checkpoints: written whole or not at all, read without running anything they contain.

A checkpoint is a dict of tensors and plain values: `kind` (as in networks.py, or "denoiser"), `model_config` (the
fields of the network's config), `settings` (of the script that wrote the file), `vocabulary`, `words` (of the training
captions), `model`, `ema`, `optimizers` (a list), `iter`. A denoiser has no `words`, but `teacher` and `teacher_sha256`:
iteration and hash of the model that it learned from. evidence/judge.py writes fields of its own.

    python -m plumbing.checkpoint out/shapes assets/shapes     copies what sampling needs, in float16
"""

import contextlib
import copy
import hashlib
import os
import re
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from plumbing.console import module_parser
from plumbing.records import last_validation
from plumbing.runtime import gathered, job, one_line_errors, restarts

# the kinds of networks that sample, and of their denoiser
KINDS = "ntm", "sit", "pixels", "coupled", "coupled_sit", "tarflow", "fm", "denoiser"
WORDS = {"fm": "flow matching", "denoiser": "a denoiser", "judge": "a judge"}  # the other kinds are NTMs
RESUME = "no", "yes", "auto"
OF_A_SITTING = {"out_dir", "resume", "device"}  # a resumed run does not take these from its checkpoint


def save(path, **contents):
    """Write `contents` to a checkpoint, by way of a temporary file: at any time there is one whole checkpoint.

    Modules and optimisers (in a list) are written as their state, and the config of `model` as `model_config`. Raises
    SystemExit if the file cannot be written, for instance on a full disk; the old one is then still in place.
    """
    path = Path(path)
    part = path.with_name(path.name + ".part")
    if isinstance(contents.get("model"), torch.nn.Module):
        contents["model_config"] = asdict(contents["model"].config)
    contents = {name: state_of(value) for name, value in contents.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(part, "wb") as file:
            torch.save(contents, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # torch reports a failed write as RuntimeError
        with contextlib.suppress(OSError):
            part.unlink()
        kept = "; the one before it is kept" if path.exists() else ""
        raise SystemExit(f"cannot write checkpoint {path}, is the disk full? {error}{kept}") from error


def kept(path):
    """The checkpoints beside `path` that have their iteration in the name, {iteration: path}, oldest first."""
    pattern = re.compile(rf"{re.escape(path.stem)}_(\d{{6,}}){re.escape(path.suffix)}")
    names = [pattern.fullmatch(name) for name in os.listdir(path.parent)] if path.parent.is_dir() else []
    found = {int(match[1]): path.with_name(match[0]) for match in names if match}
    return dict(sorted(found.items()))


def keep(path, i, count):
    """Keep a copy of the checkpoint `path` of iteration i, such as ckpt_000500.pt, and `count` copies in all.

    The function deletes older copies, but none of a later iteration. If the file system has hard links, the copy and
    ckpt.pt are one file. Raises SystemExit if the copy cannot be made.
    """
    own = path.with_name(f"{path.stem}_{i:06d}{path.suffix}")
    part = own.with_name(own.name + ".part")
    try:
        part.unlink(missing_ok=True)
        try:
            os.link(path, part)
        except OSError:
            shutil.copyfile(path, part)
        os.replace(part, own)
        # a run that went back to an old checkpoint also has copies of later iterations, which stay
        earlier = [older for iteration, older in kept(path).items() if iteration <= i]
        for older in earlier[:-count]:
            older.unlink()
    except OSError as error:
        raise SystemExit(f"cannot keep {own}, is the disk full? {error}; {path} holds iteration {i}") from error


def state_of(value):
    """Replace modules and optimisers by their state, and settings by a plain dict: load() then runs no code."""
    if isinstance(value, list):
        return [state_of(item) for item in value]
    return value.state_dict() if hasattr(value, "state_dict") else dict(value) if isinstance(value, dict) else value


def load(path, *kinds):
    """The contents of a checkpoint. Tensors are mapped from the file and take no memory until they are read.

    Raises ValueError for a checkpoint that is missing, damaged, or of none of the `kinds`.
    """
    try:
        contents = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (FileNotFoundError, NotADirectoryError):
        script = {"denoiser": "distill.py", "judge": "python -m evidence.judge"}.get(kinds[0], "train.py")
        raise ValueError(f"there is no checkpoint {path}: make it with {script}, or name another") from None
    except Exception as error:  # a damaged file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"cannot read checkpoint {path}: it is truncated or not a checkpoint ({reason})") from error
    if not isinstance(contents, dict) or contents.get("kind") not in kinds:
        found = contents.get("kind") if isinstance(contents, dict) else type(contents).__name__
        expected = " or ".join(dict.fromkeys(WORDS.get(kind, "an NTM") for kind in kinds))
        raise ValueError(f"{path} is no checkpoint of {expected} of this repository (its kind is {found!r})")
    return contents


def restore(module, state, path):
    """Load a state dict into a module. Raises ValueError that names every tensor that does not fit."""
    own = module.state_dict()
    wrong = [f"{name} is {'unknown' if name in state else 'missing'}" for name in own.keys() ^ state.keys()]
    wrong += [f"{name} is {tuple(state[name].shape)}, expected {tuple(own[name].shape)}"
              for name in own.keys() & state.keys() if state[name].shape != own[name].shape]
    if wrong:
        raise ValueError(f"{path} is of another architecture: {'; '.join(sorted(wrong))}")
    module.load_state_dict(state)


def load_network(path, networks, device="cpu"):
    """The network of a checkpoint, with its averaged weights, in evaluation mode; and the checkpoint's other contents.

    networks: {kind: class with a config_class}, the kinds that are allowed. Raises ValueError.
    """
    contents = load(path, *networks)
    network_class = networks[contents["kind"]]
    fields = contents["model_config"]
    unknown = fields.keys() - network_class.config_class.__dataclass_fields__
    if unknown:
        raise ValueError(f"{path} was made by another version, with {', '.join(sorted(unknown))} in its model_config: "
                         "use that one, or train anew")
    network = network_class(network_class.config_class(**fields)).to(device)
    restore(network, contents["ema"], path)
    for weights in "model", "ema", "optimizers", "frozen":
        contents.pop(weights, None)
    return network.eval().requires_grad_(False), contents


def fingerprint(network):
    """The SHA-256 of a network's weights, in hexadecimal.

    The weights are rounded to float16 first, so that slim() does not change the hash.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(name.encode())
        tensor = tensor.cpu().flatten()
        digest.update((tensor.half() if tensor.is_floating_point() else tensor).numpy())
    return digest.hexdigest()


def find_resumable(resume, path, *kinds):
    """The contents of the checkpoint that a run continues, or None for a run that starts anew.

    resume: "yes" continues. "auto" continues if there is a checkpoint. "no" starts anew; only after a restart by
    torchrun it continues the checkpoint that the same job wrote. Raises ValueError where a new run would overwrite a
    checkpoint, or where there is none to continue.
    """
    if resume not in RESUME:
        raise ValueError(f"resume {resume!r} is unknown: choose {', '.join(map(repr, RESUME))}")
    seen, restarted = zip(*gathered((path.exists(), restarts())))
    if len(set(seen)) > 1:
        raise ValueError(f"{path} is seen by some ranks only: choose an --out_dir that all of them can reach")
    if not seen[0] and (others := list(kept(path).values())):
        raise ValueError(f"there is no {path}, but {others[-1].name} beside it: copy that to {path.name} and continue "
                         "with --resume=yes, or choose another --out_dir")
    if resume == "yes" or (seen[0] and (resume == "auto" or max(restarted))):
        contents = load(path, *kinds)
        if resume == "no" and contents.get("job") != job():
            raise ValueError(f"{path} is of another job: continue it with --resume=yes, or choose another --out_dir")
        if "optimizers" not in contents:
            raise ValueError(f"{path} holds only what sampling needs: continue the run's own checkpoint instead")
        return contents
    if seen[0]:
        instead = "remove it to distil anew" if path.name == "denoiser.pt" else "choose another --out_dir"
        raise ValueError(f"{path} is there already: continue it with --resume=yes, or {instead}")
    return None


def keep_settings(config, contents):
    """Take the settings of a resumed run from its checkpoint, except for those that the command line gives."""
    for name in config.keys() - config.given - OF_A_SITTING:
        config[name] = contents["settings"].get(name, config[name])


def resume(contents, path, model, ema, optimizers, config, *fixed):
    """Restore weights and optimisers of a run that is resumed.

    Raises ValueError that names every setting that does not fit: those that shape the model, and those in `fixed`.
    """
    theirs = {**contents["model_config"], **{name: contents["settings"].get(name) for name in fixed}}
    ours = {**asdict(model.config), **{name: config[name] for name in fixed}}
    ours.pop("filter_leak", None)  # changes only sampling
    if wrong := [f"{name} is {theirs.get(name)}, the settings say {value}"
                 for name, value in ours.items() if theirs.get(name, value) != value]:  # old files lack new settings
        raise ValueError(f"{path} is of another model: {', '.join(wrong)}; leave them out to resume it")
    restore(model, contents["model"], path)
    restore(ema, contents["ema"], path)
    for optimizer, state in zip(optimizers, contents["optimizers"]):
        groups = optimizer.state_dict()["param_groups"]  # this run's: weight_decay and words_lr may be new
        if [group["params"] for group in groups] != [group["params"] for group in state["param_groups"]]:
            raise ValueError(f"{path} groups its weights as another version did: resume it with that one")
        # a copy, because these tensors are mapped from the file, which the run will replace
        state = {"state": copy.deepcopy(state["state"]), "param_groups": groups}
        optimizer.load_state_dict(state)


def restore_frozen(contents, path, predictor):
    """Restore the weights of the flow-matching model that a run started from. Raises ValueError if there are none."""
    if "frozen" not in contents:
        raise ValueError(f"{path} was trained with aux_weight 0: resume it with --aux_weight=0")
    restore(predictor, contents["frozen"], path)


def check_teacher(path, contents, iteration, sha256, choice=""):
    """Raise ValueError for a denoiser that learned from another model than the one of this iteration and hash.

    choice: text for the error message, what the user may do instead of distilling anew.
    """
    remedy = f"remove it and distil anew{choice}"
    taught = contents.get("teacher", iteration)
    if taught != iteration:
        raise ValueError(f"{path} learned from iteration {taught}, but the model is at {iteration}: {remedy}")
    if contents.get("teacher_sha256", sha256) != sha256:  # older checkpoints have no hash
        raise ValueError(f"{path} learned from another model than {path.with_name('ckpt.pt')}, which has the same "
                         f"iteration and other weights: {remedy}")


def slim(path, out):
    """Write what sampling needs of the checkpoint `path`, with averaged weights in float16, to `out`."""
    contents = load(path, *KINDS)
    names = "kind", "model_config", "iter", "vocabulary", "words", "teacher", "teacher_sha256"
    kept = {name: contents[name] for name in names if name in contents}
    paths = dict.fromkeys(("out_dir", "init_from", "data_dir", "decoder"), "")  # useless on another machine
    settings = contents["settings"] | paths
    log = path.with_name("log.jsonl" if path.name == "ckpt.pt" else "denoiser_log.jsonl")
    kept["validation"] = contents.get("validation") or last_validation(log)
    ema = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in contents["ema"].items()}
    save(out, **kept, settings=settings, ema=ema)


def make_parser():
    parser = module_parser(
        "plumbing.checkpoint",
        "Copies what sampling needs of a model and its denoiser, in float16.",
        examples=["out/shapes assets/shapes", "out/digits out/digits_small"],
    )
    parser.add_argument("out_dir", type=Path, help="the folder of ckpt.pt and, if there is one, denoiser.pt")
    parser.add_argument("new_dir", type=Path, help="the folder that gets the copies")
    return parser


@one_line_errors()
def main():
    args = make_parser().parse_args()
    if args.out_dir.resolve() == args.new_dir.resolve():
        raise ValueError(f"{args.new_dir} would lose what resuming needs: name another folder to write to")
    for name in ("ckpt.pt", "denoiser.pt"):
        if name == "ckpt.pt" or (args.out_dir / name).exists():  # not every model has a denoiser
            slim(args.out_dir / name, args.new_dir / name)


if __name__ == "__main__":
    main()
