"""Make a Jupyter notebook, with its outputs, from a plain Python file in which each cell begins with "# %%".

    python -m evidence.notebook docs/tour.py tour.ipynb
    python -m evidence.notebook docs/tour.py out/tour.ipynb

A cell "# %% [markdown]" is text, each line a comment. The cells run here, without Jupyter. The notebook stores what a
cell prints and the value of its last line: an image as PNG, any other value as text.
"""

import ast
import base64
import contextlib
import io
import json
import time
from pathlib import Path

from PIL import Image

from plumbing.console import module_parser, print_all_text
from plumbing.runtime import one_line_errors

START = "# %%"
TEXT = "# %% [markdown]"


def read_cells(source):
    """The cells of a file's text: [("markdown" or "code", text)]."""
    cells = []
    for part in ("\n" + source).split("\n" + START)[1:]:
        first, *lines = (START + part).splitlines()
        if first == TEXT:
            lines = [line.removeprefix("#").removeprefix(" ") for line in lines]
        cells.append(("markdown" if first == TEXT else "code", "\n".join(lines).strip("\n")))
    return cells


def run_cell(source, names):
    """Run a code cell in the namespace `names`; return what it printed and the value of its last line, or None."""
    tree = ast.parse(source)
    printed, value = io.StringIO(), None
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    with contextlib.redirect_stdout(printed):
        exec(compile(tree, "cell", "exec"), names)
        if last:
            value = eval(compile(ast.Expression(last.value), "cell", "eval"), names)
    return printed.getvalue(), value


def as_lines(text):
    """A text as a list of lines with their ends, the form in which notebooks store texts."""
    return text.splitlines(keepends=True)


def png(image):
    file = io.BytesIO()
    image.save(file, "png", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def outputs_of(printed, value, count):
    """The outputs of the count-th code cell, in the form in which notebooks store them."""
    outputs = []
    if printed:
        outputs.append({"output_type": "stream", "name": "stdout", "text": as_lines(printed)})
    if value is not None:
        data = {"text/plain": as_lines(repr(value))}
        if isinstance(value, Image.Image):
            size = "{} x {}".format(*value.size)
            data = {"image/png": png(value), "text/plain": [f"an image of {size} pixels"]}
        outputs.append({"output_type": "execute_result", "execution_count": count, "data": data, "metadata": {}})
    return outputs


def make_notebook(source):
    """Run a file's text from the top; return its notebook, a dict of format 4.5."""
    cells, names, count = [], {"__name__": "__main__"}, 0
    for number, (kind, text) in enumerate(read_cells(source)):
        cell = {"cell_type": kind, "id": f"cell-{number:02d}", "metadata": {}, "source": as_lines(text)}
        if kind == "code":
            count += 1
            start = time.perf_counter()
            printed, value = run_cell(text, names)
            print(f"cell {number}: {time.perf_counter() - start:.1f} s")
            cell |= {"execution_count": count, "outputs": outputs_of(printed, value, count)}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    return {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def make_parser():
    parser = module_parser(
        "evidence.notebook",
        "Runs a file of cells and makes a notebook of it.",
        examples=["docs/tour.py tour.ipynb", "docs/tour.py out/tour.ipynb"],
    )
    parser.add_argument("source", type=Path, help="a Python file in which each cell begins with '# %%%%'")
    parser.add_argument("notebook", type=Path, help="the notebook to write, NAME.ipynb")
    return parser


@one_line_errors()
def main():
    print_all_text()
    args = make_parser().parse_args()
    notebook = make_notebook(args.source.read_text("utf-8"))
    args.notebook.parent.mkdir(parents=True, exist_ok=True)
    args.notebook.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", "utf-8")
    print(f"wrote {args.notebook}, {args.notebook.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
