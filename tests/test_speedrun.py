"""speedrun.sh: how it spends its time, what it leaves when it is killed, and its report, by a tiny network on a CPU."""
import contextlib
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, contents, file_of, load, pixels, png, run
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from evidence import judge, speedrun, update
from evidence.report import report
from losses import TrainingLoss
from model import Denoiser, NTMConfig
from plumbing import checkpoint
from plumbing.shards import write_shards

COLOURS = {"red": (230, 40, 30), "green": (60, 200, 60), "blue": (30, 60, 230), "yellow": (240, 220, 30)}
THINGS = "heart", "apple", "circle", "square"
STAGES = list(speedrun.SHARES)


def labelled(i):
    """A picture of one colour with a border by its style, and the labels of an emoji."""
    (colour, rgb), thing = list(COLOURS.items())[i % 4], THINGS[i // 4 % 4]
    style = ("google", "fluent")[i // 16 % 2]
    picture = Image.new("RGB", (64, 64), "white")
    border = 4 if style == "google" else 16
    picture.paste(rgb, (border, border, 64 - border, 64 - border))
    record = {"captions": [f"a {colour} {thing}, {style} style"], "style": style, "group": colour, "concept": colour}
    return f"{i:04d}", {"webp": file_of(picture, "webp", lossless=True), "json": json.dumps(record).encode()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Shards as of emoji, and beside them a judge that knows nothing yet."""
    folder = tmp_path_factory.mktemp("emoji")
    write_shards(folder / "train", map(labelled, range(160)))
    write_shards(folder / "val", map(labelled, range(50)))
    write_shards(folder / "combinations" / "val", map(labelled, range(60)))
    judge.main([f"--data_dir={folder}", f"--out={folder / 'judge.pt'}", "--iterations=1", "--device=cpu"])
    return folder


def named_in(text):
    """The files that a report names."""
    return set(re.findall(r"`([\w.]+)`", text)) | set(re.findall(r"\]\((.+?)\)", text))


# ---------------------------------------------------------------------------------------------------------------
# Time


def test_stages_share_what_is_left():
    assert sum(speedrun.SHARES.values()) == pytest.approx(1)
    left = total = 600.0
    for stage, share in speedrun.SHARES.items():
        seconds = speedrun.share_of(stage, left)
        assert seconds == pytest.approx(share * total)
        left -= seconds
    assert speedrun.share_of("ntm", 100) == pytest.approx(100 * 0.24 / 0.46)  # what is saved goes to the others


# ---------------------------------------------------------------------------------------------------------------
# Results


def test_no_part_is_larger_than_15_mb_and_parts_join(tmp_path):
    data = os.urandom(1000)
    (tmp_path / "ckpt.pt.07").write_bytes(b"of an earlier run")
    names = speedrun.place(data, tmp_path, "ckpt.pt", size=300)
    assert names == [f"ckpt.pt.0{i}" for i in range(4)] == sorted(path.name for path in tmp_path.iterdir())
    joined = subprocess.run("cat ckpt.pt.??", shell=True, cwd=tmp_path, capture_output=True, check=True).stdout
    assert joined == data and max(path.stat().st_size for path in tmp_path.iterdir()) == 300
    assert speedrun.place(data, tmp_path, "ckpt.pt", size=1000) == ["ckpt.pt"] == os.listdir(tmp_path)
    assert speedrun.PART == 15e6


def test_a_result_is_whole_or_not_there(tmp_path, monkeypatch):
    speedrun.write_whole(tmp_path / "a" / "report.md", b"whole")
    monkeypatch.setattr(speedrun.os, "replace", lambda *paths: 1 / 0)  # killed while the next is written
    with pytest.raises(ZeroDivisionError):
        speedrun.write_whole(tmp_path / "a" / "report.md", b"half")
    assert (tmp_path / "a" / "report.md").read_bytes() == b"whole"


def test_a_report_says_what_share_of_the_chip_trains():
    found = {"images": 6400, "iterations": 100, "seconds": 60.0, "images_per_s": 2e3, "data_wait": 0.02, "loss": 0.5,
             "flop": 20e9, "weights": 18e6, "val_loss": 0.25, "files": ["fm.pt.00", "fm.pt.01"], "sheet": "fm.png"}
    state = {"card": "a card", "torch": "2.11", "minutes": 10, "rates": {"bfloat16": 800e12, "float32": 50e12},
             "precision": "bfloat16", "stages": {"fm": found}}
    text = report(state)
    row, = [line for line in text.splitlines() if line.startswith("| flow matching")]
    assert [cell.strip() for cell in row.split("|")[2:12]] == [
        "6,400", "100", "60", "2,000", "2%", "18", "20", "40", "5%", "0.5"]
    assert "not judged yet" in text and "`cat fm.pt.?? > fm.pt`" in text


# ---------------------------------------------------------------------------------------------------------------
# Counting


@pytest.mark.parametrize("kind, flow", [("fm", {}), ("coupled", {}), ("coupled", {"filters": 4, "logistics": 2})])
@pytest.mark.slow
def test_what_is_counted_is_what_training_multiplies(kind, flow):
    size = dict(image_size=64, channels=3, patch_size=16, width=32, depth=2, heads=2, text_len=4, vocab_size=9)
    config = size | update.OF_NTM | dict(rank=3) | flow
    cost = update.cost_of(kind, config)
    model = update.build(kind, config)
    images, text = update.inputs(model.config, 20, "cpu")
    settings = {"closed_form": False, "mirrored": True, "level_weight": 0.5, "velocity_weight": 1.0, "max_t_min": 0.05}
    loss = TrainingLoss(model, settings)
    with FlopCounterMode(display=False) as counter, torch.autocast("cpu", torch.bfloat16):
        if kind == "fm":
            model(images, text).backward()
        else:
            steps, ts = model.draw_pairs(20)
            x = model.noised_pairs(model.patchify(images), text, ts)
            loss(images, text, (steps, ts, x))["minimised"].backward()
    assert cost.flop == pytest.approx(counter.get_total_flops() / 20, rel=0.02)
    assert cost.weights == sum(weight.numel() for weight in model.parameters())


def test_the_loss_that_is_counted_is_that_of_the_config():
    kind, config = update.of_config(ROOT / "config" / "digits.py")
    assert update.cost_of(kind, config).flop < 0.95 * update.cost_of(kind, config | {"mirrored": True}).flop


@pytest.mark.parametrize("batch, memory, passes", [(300, 100, 1), (300, 9, 6), (256, 10, 8), (7, 0.1, 7)])
def test_a_batch_is_passed_in_equal_parts_that_fit(monkeypatch, batch, memory, passes):
    """An image keeps 0.1 of the memory, of which 0.6 may be filled."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=memory))
    run = SimpleNamespace(device=torch.device("cuda"), batch=batch, network={},
                          cost_of=lambda kind, config: SimpleNamespace(kept=0.1))
    assert speedrun.Speedrun.passes_of_an_update(run) == passes


@pytest.mark.parametrize("name, kind, found", [
    ("digits_fm", "fm", {"width": 96, "image_size": 8}), ("digits_tune", "ntm", {"width": 96, "rank": 24}),
    ("fashion", "pixels", {"width": 128, "image_size": 14, "parametrization": "posterior"}),
    ("emoji", "coupled", {"width": 192, "tokenizer": "emoji", "vocab_size": 4055}),
    ("t2i", "coupled", {"width": 1536, "channels": 4, "text_len": 77, "vocab_size": 50259})])
def test_a_config_has_the_network_of_what_it_starts_from(name, kind, found):
    of_file, settings = update.of_config(ROOT / "config" / f"{name}.py")
    assert of_file == kind and found.items() <= settings.items()


def test_networks_of_config_files_are_counted(capsys):
    update.main([str(ROOT / "config" / "digits_fm.py"), str(ROOT / "config" / "digits_tune.py"), "--batch_size=64"])
    fm, of_fm, ntm, _ = capsys.readouterr().out.splitlines()
    assert fm.startswith("fm: 0.7 million weights") and "an update of 64 images" in of_fm
    assert ntm.startswith("ntm: ")
    with pytest.raises(SystemExit, match="absent.py' cannot be read"):
        update.main(["absent.py"])


# ---------------------------------------------------------------------------------------------------------------
# The order of things, by scripts that only pretend, and a clock that they move

JUDGED = {f"{label}{of}": {"mean": 0.5} for label in ("style", "group", "concept") for of in ("", ", of real images")}
JUDGED |= {"frechet_distance": 7.5, "frechet_distance, of real images": 15.9, "images_per_s": 100.0}
PASSES_JUDGED = {"fm": (4, 8, 50), "ntm": (5,)}  # the NTM's with its denoiser's


class Pretended:
    """A card on which train.py takes `an_image` seconds for an image, and every script 8 s to start."""

    def __init__(self, an_image):
        self.an_image = an_image
        self.now = 0.0
        self.calls = []
        self.die_at = None

    def perf_counter(self):
        return self.now

    def call(self, run, script, *words, limit=None):
        if len(self.calls) == self.die_at:
            raise KeyboardInterrupt
        before = self.now
        settings = dict(str(word)[2:].split("=", 1) for word in words if str(word).startswith("--"))
        self.calls.append((script, settings))
        self.now += 8
        if script in ("train.py", "distill.py"):
            self.train(script, settings)
        elif script == "sample.py":
            (run.folder / "sheet").mkdir(exist_ok=True)
            (run.folder / "sheet" / "sheet.png").write_bytes(png())
        else:
            out = Path(settings["out_dir"])
            curves = [JUDGED | {"passes": passes} for passes in PASSES_JUDGED[out.name]]
            (out / "evaluate.json").write_text(json.dumps({"curves": curves}))
            self.now += 10
        return self.now - before

    def train(self, script, settings):
        """The checkpoint and the log of a run, which compiles for 20 s, and then trains until its time is up."""
        out, batch, seconds = Path(settings["out_dir"]), int(settings["batch_size"]), 60 * float(settings["minutes"])
        compilation = 20
        count = max(1, int((seconds - compilation) / (batch * self.an_image)))
        step = min(count, int(settings["log_interval"]))
        name = "denoiser" if script == "distill.py" else "ckpt"
        kind = {"fm": "fm", "ntm": "coupled"}[out.name] if name == "ckpt" else "denoiser"
        model = model_of(kind)
        checkpoint.save(out / f"{name}.pt", kind=kind, model=model, ema=model, iter=count,
                        settings={"batch_size": batch}, vocabulary={})
        lines = []
        for i in range(step, count + 1, step):
            seconds = step * batch * self.an_image + compilation * (i == step)
            self.now += seconds
            lines.append({"iter": i, "loss": 0.5, "images_per_s": step * batch / seconds, "data_wait": 0.01})
        lines.append({"iter": count, "val_loss": 0.25})
        log = out / ("denoiser_log.jsonl" if name == "denoiser" else "log.jsonl")
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
        (out / "samples").mkdir(exist_ok=True)
        (out / "samples" / f"{count:06d}.png").write_bytes(png())


@functools.cache
def model_of(kind):
    size = dict(image_size=8, channels=3, width=8, depth=1, heads=1, vocab_size=9, text_len=2)
    return Denoiser(NTMConfig(**size)) if kind == "denoiser" else update.build(kind, size | update.OF_NTM)


@pytest.fixture
def pretend(tmp_path, monkeypatch):
    """A function: a run of ten minutes on a card that takes so many seconds an image, by sizes as on CUDA."""
    (tmp_path / "data" / "train").mkdir(parents=True)
    (tmp_path / "judge.pt").touch()
    monkeypatch.setattr(speedrun, "SIZES", {"cpu": speedrun.SIZES["cuda"]})
    monkeypatch.setattr(speedrun, "cost_of", lambda kind, config: update.Cost(20e9, 1e9, 4e7, 1e11, 18_000_000))
    monkeypatch.setattr(speedrun, "place", functools.partial(speedrun.place, size=4000))  # so that there are parts

    def start(an_image, die_at=None):
        card = Pretended(an_image)
        card.die_at = die_at
        monkeypatch.setattr(speedrun, "time", card)
        monkeypatch.setattr(speedrun.Speedrun, "call", lambda run, *words, limit=None: card.call(run, *words))
        arguments = [f"--data_dir={tmp_path / 'data'}", f"--judge={tmp_path / 'judge.pt'}", "--device=cpu",
                     f"--out={tmp_path / 'out'}"]
        with contextlib.suppress(KeyboardInterrupt):
            speedrun.main(arguments)
        return card, tmp_path / "out"

    return start


@pytest.mark.parametrize("images_per_s", [14_000, 1_000])
def test_every_stage_ends_in_its_share_whatever_the_card(pretend, images_per_s):
    card, out = pretend(1 / images_per_s)
    state = json.loads((out / "speedrun.json").read_text())
    seconds = {name: stage["seconds"] for name, stage in state["stages"].items()}
    assert list(seconds) == STAGES
    for stage in "fm", "ntm":
        assert 0.85 < seconds[stage] / (600 * speedrun.SHARES[stage]) < 1.1
    assert card.now < 600
    state = json.loads((out / "speedrun.json").read_text())
    updates = state["stages"]["fm"]["iterations"]
    assert updates > 0.8 * 0.54 * 600 * images_per_s / 512


def test_stages_end_soon_when_the_time_is_over(pretend):
    """At one image in 20 s the first stage takes longer than there is for all."""
    card, _ = pretend(20.0)
    minutes = [float(settings["minutes"]) for _, settings in card.calls if "minutes" in settings]
    assert len(minutes) == 3 and card.now > 600
    assert minutes[1:] == pytest.approx([1 / 60, 1 / 60], rel=0.01)


@pytest.mark.parametrize("calls", range(6))
def test_killed_at_any_script_the_stage_before_is_whole_and_is_not_run_again(pretend, calls, tmp_path):
    card, out = pretend(1e-4, die_at=calls)
    results = out / "results"
    ended = json.loads((out / "speedrun.json").read_text())["stages"]
    if ended:
        text = (results / "report.md").read_text()
        names = named_in(text)
        for joined in re.findall(r"cat (\S+)\.\?\? >", text):
            parts = sorted(results.glob(f"{joined}.??"))
            (tmp_path / joined).write_bytes(b"".join(part.read_bytes() for part in parts))
            assert contents(tmp_path / joined)["ema"] and {part.name for part in parts} <= names
        assert all((results / name).exists() for name in names)
        assert ("| NTM |" in text) == ("ntm" in ended) and ("not judged yet" in text) == ("judged" not in ended)
    again, _ = pretend(1e-4)
    assert len(again.calls) == 6 - len(ended)
    text = (results / "report.md").read_text()
    assert set(os.listdir(results)) - named_in(text) == {"report.md"}
    for row in ("real images", "flow matching, 4 steps", "flow matching, 8 steps", "flow matching, 50 steps",
                "NTM, 4 steps, learned denoiser"):
        assert f"| {row} | 0.5 | 0.5 | 0.5 |" in text, row


# ---------------------------------------------------------------------------------------------------------------
# The run, killed in the NTM's stage and run again


def arguments(shards, out):
    return [f"--data_dir={shards}", f"--out={out}", f"--judge={shards / 'judge.pt'}", "--device=cpu", "--width=16",
            "--depth=1"]


def in_this_process(self, script, *settings, limit=None):
    """Speedrun.call without a process, whose start takes longer than what it does here."""
    before = time.perf_counter()
    print("$ python", script)
    run(script, *map(str, settings))
    return time.perf_counter() - before


@pytest.fixture(scope="module")
def ran(shards, tmp_path_factory):
    """The folder of a run that was killed in the NTM's stage and run again; its results then; what the second printed.

    The first is speedrun.sh as it stands, with all of its processes.
    """
    out = tmp_path_factory.mktemp("speedrun") / "out"
    environment = ENVIRONMENT | {"MINUTES": "0.2", "RESULTS": "", "PYTHON": sys.executable}
    with open(out.with_name("log.txt"), "w") as log:
        process = subprocess.Popen(["bash", "speedrun.sh", *arguments(shards, out)], cwd=ROOT, env=environment,
                                   stdout=log, stderr=log, start_new_session=True)
        while not (out / "ntm").exists():
            assert process.poll() is None, out.with_name("log.txt").read_text()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    killed = {path.name: path.read_bytes() for path in (out / "results").iterdir()}
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.chdir(ROOT)
        patch.setattr(speedrun.Speedrun, "call", in_this_process)
        speedrun.main([*arguments(shards, out), "--minutes=0.2"])
    return out, killed, printed.getvalue()


def test_a_run_that_is_killed_leaves_the_stage_before_whole(ran, tmp_path):
    _, killed, _ = ran
    text = killed["report.md"].decode()
    assert "| flow matching |" in text and "| NTM |" not in text and "not judged yet" in text
    assert named_in(text) == {"fm.pt", "fm.png"}
    for name in named_in(text):
        (tmp_path / name).write_bytes(killed[name])
    assert contents(tmp_path / "fm.pt")["kind"] == "fm" and pixels(tmp_path / "fm.png").size


def test_a_run_goes_on_after_the_last_stage_that_has_ended(ran):
    out, killed, printed = ran
    assert "fm has ended before" in printed and "ntm has ended before" not in printed
    assert printed.count("$ python train.py") == 1
    assert json.loads((out / "speedrun.json").read_text())["spent"] > 0
    assert killed["fm.png"] == (out / "results" / "fm.png").read_bytes()


def test_a_run_ends_in_a_report_and_a_model_to_sample(ran):
    out, _, _ = ran
    results = out / "results"
    text = (results / "report.md").read_text()
    named = named_in(text)
    assert named == {"ckpt.pt", "denoiser.pt", "fm.png", "sheet.png"} == set(os.listdir(results)) - {"report.md"}
    for row in ("flow matching", "NTM", "denoiser", "real images", "flow matching, 4 steps", "flow matching, 8 steps",
                "flow matching, 50 steps", "NTM, 4 steps, learned denoiser"):
        assert f"| {row} |" in text, row
    assert "None" not in text and "nan" not in text and "not judged yet" not in text
    assert load(results, "coupled").config.image_size == (64, 64) and load(results, "denoiser")
    state = json.loads((out / "speedrun.json").read_text())
    assert list(state["stages"]) == STAGES and state["stages"]["judged"]["count"] >= 24
    assert math.isfinite(state["stages"]["ntm"]["val_bound"]) and state["stages"]["fm"]["flop"] > 1e6


def test_without_pictures_a_line_says_how_to_get_them(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit, match="nor npm .*: where npm is, run `python data.py emoji --pictures="):
        speedrun.main([f"--data_dir={tmp_path}", f"--pictures={tmp_path / 'none.zip'}", f"--out={tmp_path / 'out'}"])
    with pytest.raises(SystemExit, match="minutes is 0.0, but must be above 0"):
        speedrun.main(["--minutes=0"])


