"""The settings of a script: what counts as one, how it is overridden, and what each mistake is told."""
import ast
import importlib
import inspect
import os
import pathlib
import re
import runpy
import shlex
import subprocess
import sys

import pytest

import configurator
import data
from plumbing import console

SCRIPT = '''\
"""
Trains a thing,
slowly.

The second paragraph is not part of the help.
"""
import os
from math import pi
from configurator import configure

# ---- shape of the model ----
batch_size = 64              # images a step
steps: int | tuple = 4       # reverse steps # or several
shift: float | None = None   # None takes the formula

# an ordinary remark
# ---- optimizer
lr = 1e-3                    # peak learning rate
compile = False
prompt = "a red circle"
sizes = (
    8, 16,
)                            # one a stage
note: str | None = "#no"     # the hash in the text is no comment
tag: int | str = 1
odd: tuple[int, ...] = (1,); even = 2
flag: bool | None = None
empty: tuple = ()
decay: int | float = 0

_private = 1
first, second = 1, 2
alias = other = 3
KINDS = "a", "b"
weights = [1, 2]
for loop in range(2):
    nested = loop


def helper():
    inside = 5


config = configure(globals())
late = 6
'''
DEFAULTS = {
    "batch_size": 64, "steps": 4, "shift": None, "lr": 1e-3, "compile": False, "prompt": "a red circle",
    "sizes": (8, 16), "note": "#no", "tag": 1, "odd": (1,), "even": 2, "flag": None, "empty": (), "decay": 0,
}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """run(*arguments, script=SCRIPT) -> the script's globals after it ran; config files lie beside it."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, script=SCRIPT):
        (tmp_path / "script.py").write_text(script, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["script.py", *arguments])
        return runpy.run_path("script.py", run_name="__main__")

    return run


@pytest.fixture
def fails(run):
    """fails(*arguments) -> the one line the user reads."""
    def fails(*arguments):
        with pytest.raises(SystemExit) as stop:
            run(*arguments)
        assert isinstance(stop.value.code, str) and "\n" not in stop.value.code
        return stop.value.code

    return fails


@pytest.fixture
def write(tmp_path):
    """write(text, name="x.py") puts a config file where the script runs."""
    def write(text, name="x.py"):
        (tmp_path / name).write_text(text, encoding="utf-8")

    return write


# ---- what is a setting


def test_defaults_come_back_whole_and_in_the_order_of_the_script(run):
    config = run()["config"]
    assert isinstance(config, dict) and config.given == set()
    assert list(config.items()) == list(DEFAULTS.items())


@pytest.mark.parametrize("name", ["_private", "first", "second", "alias", "other", "KINDS", "weights", "loop", "nested",
                                  "inside", "late", "pi", "os", "helper", "configure"])
def test_other_names_are_no_settings(fails, name):
    assert fails(f"--{name}=1").startswith(f"config key {name!r} is unknown; ")


def test_overrides_reach_the_globals_the_config_and_nothing_else(run):
    names = run("--batch_size=8", "--prompt=x")
    assert (names["batch_size"], names["prompt"]) == (8, "x")
    assert list(names["config"].items()) == list((DEFAULTS | {"batch_size": 8, "prompt": "x"}).items())


def test_names_that_the_command_line_gives_are_told(run, tmp_path):
    (tmp_path / "small.py").write_text("batch_size = 64\n")  # the default, but given
    assert run(str(tmp_path / "small.py"), "--steps=8")["config"].given == {"batch_size", "steps"}


def test_a_wrong_argument_leaves_the_settings_alone(tmp_path, monkeypatch):
    from configurator import configure
    (tmp_path / "script.py").write_text("a = 1\nb = 2\n")
    settings = {"__file__": str(tmp_path / "script.py"), "a": 1, "b": 2}
    monkeypatch.setattr(sys, "argv", ["script.py", "--a=5", "--b=x"])
    with pytest.raises(SystemExit):
        configure(settings)
    assert (settings["a"], settings["b"]) == (1, 2)


def test_a_script_may_configure_itself_under_its_main_guard(run):
    script = ("from configurator import configure\na = 1\n"
              "if __name__ == '__main__':\n    config = configure(globals())\n")
    assert run("--a=2", script=script)["config"] == {"a": 2}


def test_a_name_assigned_again_keeps_its_first_annotation(run):
    script = "from configurator import configure\na: int | None = None\nconfig = configure(globals())\na = a or 7\n"
    assert run("--a=2", script=script)["a"] == 2


@pytest.mark.parametrize("hint", ["list", "Optional[int]", "list | None", "'int | None'"])
def test_an_annotation_no_text_can_satisfy_is_the_scripts_mistake(run, hint):
    script = f"from typing import *\nfrom configurator import configure\na: {hint} = None\nconfigure(globals())\n"
    with pytest.raises(TypeError, match="a setting is annotated"):
        run(script=script)


# ---- types on the command line


@pytest.mark.parametrize("argument, value", [
    ("--batch_size=8", 8),
    ("--even=-8", -8),
    ("--lr=1e-4", 1e-4),
    ("--lr=2", 2.0),
    ("--compile=true", True),
    ("--compile=True", True),
    ("--note=false", "false"),
    ("--prompt=123", "123"),
    ("--prompt=None", "None"),
    ("--prompt=True", "True"),
    ("--prompt='x'", "'x'"),
    ("--prompt=", ""),
    ("--prompt=a=b c", "a=b c"),
    ("--prompt=--lr=3", "--lr=3"),
    ("--steps=8", 8),
    ("--steps=4,8,16", (4, 8, 16)),
    ("--steps=(4,8,16)", (4, 8, 16)),
    ("--steps=(4, 8, 16)", (4, 8, 16)),
    ("--sizes=32,", (32,)),
    ("--sizes=()", ()),
    ("--odd=3,5", (3, 5)),
    ("--empty=1,2", (1, 2)),
    ("--shift=2", 2.0),
    ("--shift=0.5", 0.5),
    ("--note=123", "123"),
    ("--note=None", None),
    ("--tag=12", 12),
    ("--tag=v12", "v12"),
    ("--flag=false", False),
    ("--decay=2", 2),
    ("--decay=0.5", 0.5),
])
def test_a_text_becomes_the_type_of_its_setting(run, argument, value):
    names = run(argument)
    key = argument[2:].split("=")[0]
    for found in (names[key], names["config"][key]):
        assert found == value and type(found) is type(value)


def test_false_and_none_undo_an_earlier_override(run):
    assert run("--compile=true", "--compile=false")["compile"] is False
    assert run("--compile=true", "--compile=False")["compile"] is False
    assert run("--shift=2", "--shift=None")["shift"] is None


@pytest.mark.parametrize("argument, expected", [
    ("--batch_size=many", "an int"),
    ("--batch_size=", "an int"),
    ("--batch_size=1.5", "an int"),
    ("--batch_size=1e3", "an int"),
    ("--batch_size=True", "an int"),
    ("--batch_size=true", "an int"),
    ("--batch_size=None", "an int"),
    ("--batch_size=4,8", "an int"),
    ("--lr=fast", "a finite float"),
    ("--lr=inf", "a finite float"),
    ("--lr=-inf", "a finite float"),
    ("--lr=nan", "a finite float"),
    ("--lr=1e999", "a finite float"),
    ("--lr=True", "a finite float"),
    ("--lr=None", "a finite float"),
    ("--compile=1", "a bool"),
    ("--compile=yes", "a bool"),
    ("--sizes=8", "a tuple"),
    ("--sizes=[8, 16]", "a tuple"),
    ("--sizes=8,,", "a tuple"),
    ("--sizes=8,x", "a tuple"),
    ("--sizes={[]: 1}", "a tuple"),
    ("--steps=few", "an int or a tuple of ints"),
    ("--steps=None", "an int or a tuple of ints"),
    ("--steps=(4.5,)", "an int or a tuple of ints"),
    ("--steps=('a',)", "an int or a tuple of ints"),
    ("--steps=4,True", "an int or a tuple of ints"),
    ("--steps=()", "an int or a tuple of ints"),
    ("--shift=some", "a finite float or None"),
    ("--shift=none", "a finite float or None"),
    ("--flag=0", "a bool or None"),
])
def test_a_text_of_the_wrong_type_is_refused(fails, argument, expected):
    key, text = argument[2:].split("=")
    assert fails(argument) == f"config key {key!r} is {text!r}, but {expected} is expected"


def test_a_tuple_of_floats_takes_ints(run):
    script = "from configurator import configure\nguidance: float | tuple = 1.0\nconfig = configure(globals())\n"
    assert [type(w) for w in run("--guidance=0,0.5,2", script=script)["guidance"]] == [float, float, float]


# ---- ranges


@pytest.mark.parametrize("argument, value, extent", [
    ("--batch_size=0", "0", "at least 1"),
    ("--lr=-5e-3", "-0.005", "at least 0"),
    ("--shift=0", "0.0", "above 0 and at most 1000"),
    ("--shift=1e300", "1e+300", "above 0 and at most 1000"),
    ("--steps=4,0", "(4, 0)", "at least 1"),
])
def test_a_number_out_of_its_range_is_refused(fails, write, argument, value, extent):
    key, text = argument[2:].split("=")
    assert fails(argument) == f"config key {key} is {value}, but must be {extent}"
    write(f"{key} = {text}\n")
    assert fails("x.py") == f"x.py: config key {key} is {value}, but must be {extent}"


def test_every_number_of_every_script_has_a_range():
    """One table for all: a setting that trains or samples wrongly and ends as if nothing were is the worst error."""
    for script in ("train", "distill", "sample", "evaluate", "bench", "toy2d"):
        module = importlib.import_module(script)
        for node in ast.parse(inspect.getsource(module)).body:
            name = ast.unparse(node.target if isinstance(node, ast.AnnAssign) else getattr(node, "targets", [node])[0])
            value = getattr(module, name, None) if name.islower() else None
            if type(value) in (int, float):
                assert name in configurator.RANGE_OF, f"{script}.{name}"


@pytest.mark.parametrize("script, argument", [
    ("train.py", "--grad_clip=-1"), ("train.py", "--grad_clip=0"), ("train.py", "--ema=2"), ("train.py", "--ema=-1"),
    ("train.py", "--caption_dropout=5"), ("train.py", "--shift=-5"), ("distill.py", "--lr=-1"),
    ("train.py", "--max_iters=0"), ("train.py", "--image_size=0"), ("evaluate.py", "--guidance=-1"),
    ("evaluate.py", "--guidance=1,-1"), ("sample.py", "--guidance=-1"), ("sample.py", f"--seed={2**31}"),
    ("train.py", "--seed=-1"), ("bench.py", "--repeats=0"), ("toy2d.py", "--seconds=-1")])
def test_scripts_refuse_what_would_train_or_sample_wrongly(script, argument, monkeypatch):
    module = importlib.import_module(script.removesuffix(".py"))
    monkeypatch.setattr(sys, "argv", [script, argument])
    with pytest.raises(SystemExit, match=rf"config key {argument[2:].split('=')[0]} is .*, but must be "):
        configurator.configure({**vars(module)})


def test_the_default_is_in_range(run):
    """0 may stand for "as trained"."""
    script = "from configurator import configure\nsteps = 0\nconfig = configure(globals())\n"
    assert [run(argument, script=script)["steps"] for argument in ("--steps=8", "--steps=0")] == [8, 0]


# ---- config files


def test_a_config_file_overrides(run, write):
    write("lr = 1\nsteps = (4, 8)\nshift = 2\nnote = None\nprompt = '7'\ndecay = 2\n")
    config = run("x.py")["config"]
    changes = {"lr": 1.0, "steps": (4, 8), "shift": 2.0, "note": None, "prompt": "7", "decay": 2}
    assert list(config.items()) == list((DEFAULTS | changes).items())
    assert [type(config[name]) for name in ("lr", "shift", "decay")] == [float, float, int]


def test_a_config_file_keeps_what_it_needs_for_itself(run, write):
    write("import math\nfrom pathlib import Path\n_half = 16\ndef twice(n): return 2 * n\n"
          "class Unused: pass\nbatch_size = twice(_half) + int(math.sqrt(4))\n")
    assert run("x.py")["config"] == DEFAULTS | {"batch_size": 34}


def test_a_config_file_starts_from_nothing(fails, write):
    write("lr = 0.5\nbatch_size = 2 * steps\n")
    assert fails("x.py") == "x.py, line 2: NameError: name 'steps' is not defined"


def test_later_arguments_win(run, write):
    write("lr = 0.1\nbatch_size = 1\n", "x.py")
    write("lr = 0.2\n", "y.py")
    assert run("x.py", "y.py")["lr"] == 0.2
    assert run("y.py", "x.py")["lr"] == 0.1
    assert run("x.py", "--lr=0.3")["lr"] == 0.3
    assert run("--lr=0.3", "x.py")["lr"] == 0.1
    assert run("--lr=0.3", "--lr=0.4")["lr"] == 0.4
    assert run("--batch_size=9", "y.py", "--steps=5", "--lr=0.3")["config"] == DEFAULTS | {
        "batch_size": 9, "steps": 5, "lr": 0.3}
    assert run("--batch_size=9", "x.py", "y.py")["config"] == DEFAULTS | {"batch_size": 1, "lr": 0.2}


@pytest.mark.parametrize("line, shown, expected", [
    ("batch_size = 'many'", "'many'", "an int"),
    ("batch_size = 1.0", "1.0", "an int"),
    ("batch_size = True", "True", "an int"),
    ("batch_size = None", "None", "an int"),
    ("lr = '1e-3'", "'1e-3'", "a finite float"),
    ("lr = True", "True", "a finite float"),
    ("lr = float('inf')", "inf", "a finite float"),
    ("lr = float('nan')", "nan", "a finite float"),
    ("lr = 10 ** 400", str(10 ** 400), "a finite float"),
    ("compile = 1", "1", "a bool"),
    ("compile = 'true'", "'true'", "a bool"),
    ("prompt = 7", "7", "a str"),
    ("sizes = [8, 16]", "[8, 16]", "a tuple"),
    ("steps = 1.5", "1.5", "an int or a tuple of ints"),
    ("shift = 'None'", "'None'", "a finite float or None"),
])
def test_a_value_of_the_wrong_type_is_refused(fails, write, line, shown, expected):
    write(line + "\n")
    key = line.split(" ")[0]
    assert fails("x.py") == f"x.py: config key {key!r} is {shown}, but {expected} is expected"


# ---- mistakes


def test_an_unknown_key_names_its_neighbour(fails, write):
    assert fails("--bacth_size=8") == "config key 'bacth_size' is unknown; did you mean 'batch_size'?"
    assert fails("--batch-size=8") == "config key 'batch-size' is unknown; did you mean 'batch_size'?"
    assert fails("--learning_rate=8") == "config key 'learning_rate' is unknown; did you mean 'lr'?"  # nanoGPT's name
    write("bacth_size = 8\n")
    assert fails("x.py") == "x.py: config key 'bacth_size' is unknown; did you mean 'batch_size'?"


def test_an_unknown_key_without_a_neighbour_points_to_the_help(fails, write):
    assert fails("--zzz=8") == "config key 'zzz' is unknown; --help lists the known ones"
    assert fails("--=8") == "config key '' is unknown; --help lists the known ones"
    write("zzz = 8\n")
    assert fails("x.py") == "x.py: config key 'zzz' is unknown; --help lists the known ones"


@pytest.mark.parametrize("arguments", [["-x"], ["-lr=3"], ["--"], ["-"], ["--compile"], ["--batch_size", "8"]])
def test_an_argument_of_another_form_is_refused(fails, arguments):
    assert fails(*arguments) == f"argument {arguments[0]!r} is not understood; write --key=value, with '=' and no space"


@pytest.mark.parametrize("argument", ["config/nowhere.py", "batch_size=8", ""])
def test_a_missing_config_file_is_named(fails, argument):
    assert fails(argument) == (f"config file {argument!r} cannot be read: No such file or directory; "
                               "settings are written --key=value")


def test_a_folder_is_no_config_file(fails, tmp_path):
    (tmp_path / "config").mkdir()
    assert fails("config").startswith("config file 'config' cannot be read: ")


def test_a_config_file_that_does_not_compile_is_one_line(fails, write):
    write("lr = 1\nsteps = = 2\n")
    assert fails("x.py") == "x.py, line 2: SyntaxError: invalid syntax"


@pytest.mark.parametrize("text, line, reason", [
    ("lr = 1\n\nlr = 1 / 0\n", 3, "ZeroDivisionError: division by zero"),
    ("def half(n):\n    return n / 0\nlr = half(1)\n", 2, "ZeroDivisionError: division by zero"),
    ("import json\nlr = json.loads('{')\n", 2, "json.decoder.JSONDecodeError: "),
    ("raise ValueError('two\\nlines')\n", 1, "ValueError: two lines"),
    ("lr = 1\nassert lr > 1\n", 2, "AssertionError"),
    ("raise SystemExit(0)\n", 1, "SystemExit: 0"),
])
def test_a_config_file_that_raises_is_one_line(fails, write, text, line, reason):
    write(text)
    assert fails("x.py").startswith(f"x.py, line {line}: {reason}")


# ---- help


HELP = """\
usage: python script.py [CONFIG.py ...] [--NAME=VALUE ...]

Trains a thing,
slowly.

examples:
  python script.py --lr=1e-2      # faster
  python script.py small.py

settings and their defaults; if several arguments set one, the last counts:

shape of the model:
  --batch_size=64             images a step
  --steps=4                   reverse steps # or several
  --shift=None                None takes the formula

optimizer:
  --lr=0.001                  peak learning rate
  --compile=False
  --prompt="a red circle"
  --sizes=8,16                one a stage
  --note="#no"                the hash in the text is no comment
  --tag=1
  --odd=1,
  --even=2
  --flag=None
  --empty=()
  --decay=0
"""
EXAMPLES = """slowly.

    python script.py --lr=1e-2      # faster
    python script.py small.py
"""


@pytest.mark.parametrize("arguments", [["--help"], ["-h"], ["--batch_size=many", "--help"], ["nowhere.py", "-h"]])
def test_help_shows_usage_examples_and_every_setting_with_its_comment(run, capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        run(*arguments, script=SCRIPT.replace("slowly.\n", EXAMPLES))
    assert stop.value.code == 0
    assert capsys.readouterr().out == HELP


def test_help_of_a_script_without_docstring_or_settings(run, capsys):
    with pytest.raises(SystemExit) as stop:
        run("--help", script="from configurator import configure\n# ---- nothing\nconfigure(globals())\n")
    assert stop.value.code == 0
    assert capsys.readouterr().out.strip() == "usage: python script.py [CONFIG.py ...] [--NAME=VALUE ...]"


@pytest.mark.parametrize("columns", ["80", "100", "200"])
def test_help_wraps_sentences_beside_their_settings(run, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    words = " ".join(["word"] * 60)
    script = f"from configurator import configure\na_setting_with_a_long_name = 1  # {words}\nb = 2  # {words}\n"
    with pytest.raises(SystemExit):
        run("--help", script=script + "configure(globals())\n")
    lines = capsys.readouterr().out.split("settings")[1].splitlines()[1:]
    assert all(len(line) <= min(110, int(columns)) for line in lines)
    assert lines[0] == "  --a_setting_with_a_long_name=1" and lines[1].startswith(" " * 30 + "word")
    assert " ".join(lines).count("word") == 120


SCRIPTS = ["train", "distill", "sample", "evaluate", "bench", "toy2d"]


def settings_with_comments(script):
    """{name: (default, its comment)} of a script of the repository, and its text."""
    module = importlib.import_module(script)
    source = inspect.getsource(module)
    behind, _ = console.comments_of(source)
    found = {}
    for name, (default, node) in configurator.settings_of(source, vars(module)).items():
        found[name] = default, behind.get(node.lineno, "")
    return found, source


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_setting_of_every_script_has_a_sentence(script):
    found, source = settings_with_comments(script)
    assert [name for name, (_, sentence) in found.items() if len(sentence) < 8] == []
    text = console.help_text(f"{script}.py", source, configurator.settings_of(source, vars(sys.modules[script])))
    assert text.startswith(f"usage: python {script}.py")
    examples = re.findall(r"^  (?:python|torchrun) .*", text.partition("settings")[0], re.MULTILINE)
    assert len(examples) >= 2
    for name in re.findall(rf"{script}\.py.*? --(\w+)=", "\n".join(examples)):
        assert name in found


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_the_paper_does_not_have_is_tagged(script):
    """docs/beyond.md begins with a table of the settings that are ours."""
    page = (pathlib.Path(configurator.__file__).parent / "docs" / "beyond.md").read_text("utf-8")
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \|", page, re.MULTILINE)
    ours = set(re.findall(r"\w+", " ".join(rows)))
    assert {"rank", "first_noise", "restarts", "best_of", "closed_form"} <= ours
    found, _ = settings_with_comments(script)
    tagged = {name for name, (_, sentence) in found.items() if sentence.startswith("(ours)")}
    assert tagged == ours & found.keys()


@pytest.mark.parametrize("script", SCRIPTS)
def test_defaults_that_help_shows_are_what_one_may_type(script):
    for name, (default, _) in settings_with_comments(script)[0].items():
        typed, = shlex.split(console.as_argument(default)) or [""]
        kinds = [configurator.kind(default)]
        assert configurator.from_text(typed, kinds) == default, name


def parsers():
    from evidence import judge, notebook, truth
    from plumbing import checkpoint
    commands = data.make_parser()
    found = {"data.py": commands}
    for action in commands._actions:
        if isinstance(action.choices, dict):
            found |= {f"data.py {name}": parser for name, parser in action.choices.items()}
    makers = judge, truth, notebook, checkpoint
    return found | {maker.__name__: maker.make_parser() for maker in makers}


@pytest.mark.parametrize("name, parser", parsers().items(), ids=parsers())
def test_every_argument_of_every_command_has_a_sentence(name, parser):
    assert [action.dest for action in parser._actions if len(action.help or "") < 8] == []
    text = parser.format_help()
    examples = re.findall(r"^  (?:python|torchrun) .*", text.partition("examples:")[2], re.MULTILINE)
    assert text.startswith("usage: ") and len(examples) >= 2 and parser.description.endswith(".")
    if name.startswith("data.py "):
        for example in examples:
            command, *arguments = shlex.split(example.partition("data.py ")[2])
            assert command == name.split()[1] and parser.parse_args(arguments)


# ---- as the user meets it


@pytest.mark.slow
@pytest.mark.parametrize("argument, status, out, err", [
    ("--batch_size=8", 0, "8\n", ""),
    ("--bacth_size=8", 1, "", "config key 'bacth_size' is unknown; did you mean 'batch_size'?\n"),
    ("x.py", 1, "", "x.py, line 1: ZeroDivisionError: division by zero\n"),
])
def test_a_process_says_one_line_and_ends(tmp_path, pytestconfig, argument, status, out, err):
    script = "from configurator import configure\nbatch_size = 4\nconfigure(globals())\nprint(batch_size)\n"
    (tmp_path / "script.py").write_text(script)
    (tmp_path / "x.py").write_text("batch_size = 1 / 0\n")
    done = subprocess.run([sys.executable, "script.py", argument], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(pytestconfig.rootpath)})
    assert (done.returncode, done.stdout, done.stderr) == (status, out, err)


def test_the_home_folder_is_meant_by_a_tilde_in_a_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/users/ada")
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "script.py"
    script.write_text('from configurator import configure\nout_dir = ""\ninit_from = ""\nprompt = ""\n'
                      'figure: str | None = None\ndata_dir = ""\nconfig = configure(globals())\n')
    (tmp_path / "mine.py").write_text('data_dir = "~/data/{00..01}.tar"\n')
    (tmp_path / "~").mkdir()
    monkeypatch.setattr(sys, "argv", ["script.py", "--out_dir=~/out", "--init_from=sit:~/sit.pt", "--prompt=~/cat",
                                      "mine.py", "--figure=None"])
    names = runpy.run_path(str(script))
    assert names["config"] == {"out_dir": "/users/ada/out", "init_from": "sit:/users/ada/sit.pt", "prompt": "~/cat",
                               "figure": None, "data_dir": "/users/ada/data/{00..01}.tar"}
    assert names["out_dir"] == "/users/ada/out"
    (tmp_path / "~" / "out").mkdir()  # what exists under a name is meant
    assert runpy.run_path(str(script))["out_dir"] == "~/out"
