"""The house rules: which way imports run, how long files may be, and that what the README says to type works."""
import ast
import io
import re
import subprocess
import sys
import tokenize

import pytest
from helpers import ENVIRONMENT, ROOT

README = (ROOT / "README.md").read_text()
ROOMS = "plumbing", "evidence"
FILES = [path for folder in ("", *ROOMS) for path in sorted((ROOT / folder).glob("*.py"))]
OURS = {path.stem for path in ROOT.glob("*.py")}
# from the bottom up: a file imports those before it, and plumbing
ORDER = ["configurator", "flow", "predictor", "correlated", "model", "pixels", "beyond", "fm", "sit", "networks", "data",
         "pipeline", "sample", "losses", "start", "train", "distill", "evaluate", "bench", "toy2d"]


def imports(path, everywhere=False):
    """The modules of ours that a file imports when it is loaded, or everywhere in it: "flow", "plumbing.images", ..."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names} if node.module in ROOMS else {node.module}
    return {name for name in found if name.split(".")[0] in OURS.union(ROOMS)}


def test_the_root_is_the_method():
    assert OURS == set(ORDER)


@pytest.mark.parametrize("name", ORDER)
def test_imports_run_one_way(name):
    found = {module for module in imports(ROOT / f"{name}.py", everywhere=True) if not module.startswith(ROOMS)}
    assert found <= set(ORDER[:ORDER.index(name)])


def test_the_method_imports_nothing_of_ours_and_plumbing_nothing_of_the_root():
    assert imports(ROOT / "flow.py", everywhere=True) == set()
    assert imports(ROOT / "model.py") == {"flow", "predictor", "correlated"} and imports(ROOT / "predictor.py") == {"flow"}
    for path in (ROOT / "plumbing").glob("*.py"):
        assert all(module.startswith("plumbing") for module in imports(path, everywhere=True)), path


def test_evidence_is_imported_where_it_is_asked_for():
    """By evaluate.py, and by the command that makes emoji inside of a function; itself it imports no script."""
    for path in [*ROOT.glob("*.py"), *(ROOT / "plumbing").glob("*.py")]:
        at_once = any(module.startswith("evidence") for module in imports(path))
        assert not at_once or path.name == "evaluate.py", path
        if any(module.startswith("evidence") for module in imports(path, everywhere=True)):
            assert path.name in ("evaluate.py", "data.py")
    for path in (ROOT / "evidence").glob("*.py"):
        found = {module for module in imports(path, everywhere=True) if not module.startswith(ROOMS)}
        assert found <= {*ORDER[:ORDER.index("data") + 1], "losses"}, path


@pytest.mark.slow
def test_importing_a_script_runs_nothing_and_loads_no_more_than_it_needs():
    others = [name for name in ORDER if name != "evaluate"]
    program = f"import sys, {', '.join(others)}; print('\\n'.join(sys.modules))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, check=True, text=True,
                         capture_output=True)
    assert ran.stderr == "" and not {"plumbing.prepare", "plumbing.shapes"} & set(ran.stdout.split())
    assert not any(module.startswith("evidence") for module in ran.stdout.split())
    program = "import sys, sample; print('\\n'.join(sys.modules))"
    loaded = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=ENVIRONMENT, check=True, text=True,
                            capture_output=True).stdout.split()
    assert not {"train", "plumbing.loader", "plumbing.log", "plumbing.optim", "plumbing.prepare"} & set(loaded)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_are_one_sitting(path):
    lines = path.read_text().splitlines()
    assert len(lines) <= 400 and max(map(len, lines), default=0) <= 120


def measure(path):
    """How dense a file is: its tokens, its lines of code, and the lines of code of its longest function; without
    comments and docstrings."""
    text = path.read_text()
    tree = ast.parse(text)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    prose = set()
    for node in ast.walk(tree):
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            prose |= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    tokens, lines = 0, set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        counted = token.type in (tokenize.NAME, tokenize.OP, tokenize.NUMBER, tokenize.STRING)
        if counted and token.start[0] not in prose:
            tokens += 1
            lines |= set(range(token.start[0], token.end[0] + 1))
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    longest = max((len(lines & set(range(f.lineno, f.end_lineno + 1))) for f in functions), default=0)
    return tokens, len(lines), longest


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_code_is_no_denser_than_other_models(path):
    """nanoGPT has 7 to 11 tokens a line of code, nanochat and EDM2 11 to 12."""
    tokens, lines, longest = measure(path)
    assert tokens <= (11.55 if path.parent == ROOT else 12.55) * max(1, lines)  # 11.5 and 12.5, rounded
    assert longest <= 45


def test_the_papers_method_is_one_evening():
    assert sum(measure(ROOT / name)[0] for name in ("flow.py", "predictor.py", "model.py")) <= 6500


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 120


def test_equations_that_the_code_cites_are_there():
    paper, ours = ((ROOT / "docs" / page).read_text() for page in ("method.md", "beyond.md"))
    numbers = [int(number) for number in re.findall(r"\\tag\{(\d+)\}", paper + ours)]
    assert numbers == list(range(1, len(numbers) + 1))
    numbered = set(numbers)
    for path in FILES:
        cited = {int(number) for number in re.findall(r"Eq\. \((\d+)\)", path.read_text())}
        assert cited <= numbered, path
    for name in ("flow", "predictor", "model", "fm"):
        assert "Eq. (" in (ROOT / f"{name}.py").read_text()


@pytest.mark.slow
def test_the_readmes_python_runs_as_it_stands(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    code, = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    saved, names = [], {}
    monkeypatch.setattr("PIL.Image.Image.save", lambda image, path: saved.append(path))
    exec(compile(code, "README.md", "exec"), names)
    assert saved == ["samples.png"] and names["images"].shape == (3, 3, 16, 16) and names["images"].abs().max() <= 1
    assert all(values.shape == (3,) for values in names["scores"])
    assert capsys.readouterr().out.strip() == names["caption"]


def anchors(text):
    """What the headings of a page are called in links, as GitHub calls them."""
    headings = re.findall(r"^#+ +(.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_links_lead_somewhere_and_commands_name_settings_that_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert ((ROOT / page).parent / link).exists(), link
    for link, heading in re.findall(r"\]\((?!https?:)([^)#]*)#([^)]+)\)", text):
        target = (ROOT / page).parent / link if link else ROOT / page
        assert heading in anchors(target.read_text()), f"{link}#{heading}"
    if page == "docs/log.md":  # whose commands are those of their day
        return
    for name in re.findall(r"config/\w+\.py", text):
        assert (ROOT / name).exists() or f"`{name}` of commit" in text, name
    for script, arguments in re.findall(r"(\w+\.py)((?: +(?:--[\w=./{},*'\"-]+|config/\w+\.py|\w+))*)", text):
        if (ROOT / script).exists() and script != "data.py":
            source = (ROOT / script).read_text()
            for key in re.findall(r"--(\w+)=", arguments):
                assert re.search(rf"^{key}\b.* = ", source, re.MULTILINE), (script, key)


@pytest.mark.parametrize("path", sorted((ROOT / "tests").glob("*.py")), ids=lambda path: path.stem)
def test_no_test_imports_another(path):
    """What several need is in conftest.py, helpers.py and tiny.py."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not any(name.startswith("test_") for name in names), names
