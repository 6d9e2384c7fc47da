"""The house rules: which way imports run, how long files may be, and that what the README says to type works."""
import ast
import re
import subprocess
import sys

import pytest
from helpers import ENVIRONMENT, ROOT

README = (ROOT / "README.md").read_text()
FILES = sorted(ROOT.glob("*.py")) + sorted((ROOT / "plumbing").glob("*.py"))
OURS = {path.stem for path in ROOT.glob("*.py")}
# from the bottom up: a file imports those before it, and plumbing
ORDER = ["configurator", "flow", "predictor", "model", "fm", "data", "pipeline", "sample", "train", "distill", "evaluate", "bench", "toy2d"]


def imports(path, everywhere=False):
    """The modules of ours that a file imports when it is loaded, or everywhere in it: "flow", "plumbing.images", ..."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"plumbing.{alias.name}" for alias in node.names} if node.module == "plumbing" else {node.module}
    return {name for name in found if name.split(".")[0] in OURS | {"plumbing"}}


def test_the_root_is_the_method():
    assert OURS == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    found = {module for module in imports(ROOT / f"{name}.py", everywhere=True) if not module.startswith("plumbing")}
    assert found <= set(ORDER[:ORDER.index(name)])


def test_the_method_imports_nothing_of_ours_and_plumbing_nothing_of_the_root():
    assert imports(ROOT / "flow.py", everywhere=True) == set()
    assert imports(ROOT / "model.py") == {"flow", "predictor"} and imports(ROOT / "predictor.py") == {"flow"}
    for path in (ROOT / "plumbing").glob("*.py"):
        assert all(module.startswith("plumbing") for module in imports(path, everywhere=True)), path


def test_importing_a_script_runs_nothing_and_loads_no_more_than_it_needs():
    program = f"import sys, {', '.join(ORDER)}; print('\\n'.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, check=True, text=True,
                         capture_output=True)
    assert ran.stderr == "" and not {"plumbing.prepare", "plumbing.sit"} & set(ran.stdout.split())
    program = "import sys, sample; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, check=True, text=True,
                            capture_output=True).stdout.split()
    assert not {"train", "plumbing.loader", "plumbing.log", "plumbing.optim", "plumbing.prepare"} & set(loaded)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400 and max(map(len, lines), default=0) <= 120


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 180


def test_equations_that_the_code_cites_are_there():
    method = (ROOT / "docs" / "method.md").read_text()
    numbered = {int(number) for number in re.findall(r"\\tag\{(\d+)\}", method)}
    for path in FILES:
        cited = {int(number) for number in re.findall(r"Eq\. \((\d+)\)", path.read_text())}
        assert cited <= numbered, path
    for name in ("flow", "predictor", "model", "fm"):
        assert "Eq. (" in (ROOT / f"{name}.py").read_text()


def test_the_readmes_python_runs_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    names = {}
    exec(compile(code, "README.md", "exec"), names)
    assert names["images"].shape == (2, 3, 32, 32) and names["images"].abs().max() <= 1
    assert all(values.shape == (2,) for values in names["log_p"])
    assert capsys.readouterr().out.strip() in names["choices"]


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere_and_commands_name_settings_that_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for name in re.findall(r"config/\w+\.py", text):
        assert (ROOT / name).exists(), name
    for script, arguments in re.findall(r"(\w+\.py)((?: +(?:--[\w=./{},*'\"-]+|config/\w+\.py|\w+))*)", text):
        if (ROOT / script).exists() and script != "data.py":
            source = (ROOT / script).read_text()
            for key in re.findall(r"--(\w+)=", arguments):
                assert re.search(rf"^{key}\b.* = ", source, re.MULTILINE), (script, key)
