"""Windows, as far as Linux can play it, and text in other encodings than UTF-8."""
import ast
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from helpers import ENVIRONMENT, ROOT, contents, pixels

from plumbing import latents, lock, runtime

ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "cp1252"}
FILES = [path for folder in ("", "plumbing", "evidence") for path in sorted((ROOT / folder).glob("*.py"))]


@pytest.mark.slow
def test_every_script_works_without_what_windows_lacks(tmp_path):
    ran = subprocess.run([sys.executable, "tests/windows.py", tmp_path], cwd=ROOT, env=ENVIRONMENT | ASCII,
                         capture_output=True)
    assert ran.returncode == 0, ran.stderr.decode("cp1252")
    assert contents(tmp_path / "digits" / "ckpt.pt")["iter"] == 4
    assert contents(tmp_path / "digits" / "denoiser.pt")["iter"] == 4
    assert pixels(tmp_path / "digits" / "images" / "0001.png").shape == (8, 8, 3)
    assert contents(tmp_path / "mine" / "ckpt.pt")["iter"] == 2
    notes = ran.stderr.decode("cp1252")
    assert "cannot be locked (this platform has no fcntl): make sure that no other run writes there" in notes
    assert "workers is 2, but this platform cannot fork processes: the training process loads the data" in notes
    assert r"ein Häuschen \U0001f3e0 und \u6f22\u5b57" in ran.stdout.decode("cp1252")  # what `data.py shards` prints


def test_latents_are_encoded_without_locks(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(lock, "fcntl", None)
    (tmp_path / "encoder.pt2").write_bytes(b"a program")
    args = SimpleNamespace(data_dir="somewhere", encoder=str(tmp_path / "encoder.pt2"), image_size=8)
    latents.take_folder(tmp_path / "latents", {}, args).close()
    assert "latents cannot be locked (this platform has no fcntl)" in capsys.readouterr().err
    assert (tmp_path / "latents" / "encoding.json").exists()


@pytest.mark.parametrize("triton", [None, "is there"])
def test_training_is_compiled_where_triton_is(monkeypatch, triton):
    """torch for Windows does not install it, and torch.compile fails there only once it runs."""
    monkeypatch.setattr(runtime.importlib.util, "find_spec", {"triton": triton}.get)
    monkeypatch.setattr(torch, "compile", lambda model: "compiled")
    expected = {None: "compiled" if triton else "a model", True: "compiled", False: "a model"}
    for setting, result in expected.items():
        assert runtime.for_training("a model", {"compile": setting}, torch.device("cuda")) == result


def texts_without_encoding(path):
    """The lines where a file opens, reads or writes text in whatever encoding the platform has."""
    found = []
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        keywords = {keyword.arg for keyword in node.keywords}
        # read_text(encoding), write_text(text, encoding), open(path, mode, buffering, encoding)
        named = "encoding" in keywords or len(node.args) > {"read_text": 0, "write_text": 1}.get(name, 3)
        modes = [argument.value for argument in node.args[1:2] if isinstance(argument, ast.Constant)]
        of_text = name in ("read_text", "write_text") or isinstance(node.func, ast.Name) and name == "open"
        binary = name == "open" and modes and "b" in modes[0]
        if of_text and not named and not binary:
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_of_text_are_in_utf_8_on_every_platform(path):
    assert texts_without_encoding(path) == []


def test_text_without_encoding_is_found(tmp_path):
    lines = ["open(a)", "open(a, 'w')", "p.read_text()", "p.write_text(t)", "open(a, 'rb')", "open(a, encoding=e)",
             "p.read_text('utf-8')", "p.write_text(t, 'utf-8')", "Image.open(a)", "tarfile.open(a, 'r:')"]
    (tmp_path / "some.py").write_text("\n".join(lines), "utf-8")
    assert texts_without_encoding(tmp_path / "some.py") == [1, 2, 3, 4]
