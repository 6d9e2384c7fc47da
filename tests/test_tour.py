"""The notebook: what makes it, what is stored in it, and that its cells run without Jupyter."""
import base64
import io
import json
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, fails
from PIL import Image

from evidence import notebook
from pixels import PixelConfig, PixelNTM
from plumbing.images import contact_sheet

TOUR = json.loads((ROOT / "tour.ipynb").read_text("utf-8"))
SOURCE = '''\
# %% [markdown]
# # A title
#
# A text of **two** lines
# and `# %%` in it.

# %%
import math

print("printed", math.pi)
x = 2

# %%
x + 1  # a value

# %%
from PIL import Image

Image.new("RGB", (3, 2))
'''


def code(tour):
    return ["".join(cell["source"]) for cell in tour["cells"] if cell["cell_type"] == "code"]


def image_of(output):
    return Image.open(io.BytesIO(base64.b64decode(output["data"]["image/png"])))


def test_a_notebook_has_the_cells_of_its_file_and_what_they_print_and_show():
    made = notebook.make_notebook(SOURCE)
    text, printing, value, image = made["cells"]
    assert (made["nbformat"], made["nbformat_minor"]) == (4, 5)
    assert "".join(text["source"]) == "# A title\n\nA text of **two** lines\nand `# %%` in it."
    assert "outputs" not in text and text["cell_type"] == "markdown"
    assert "".join(printing["source"]) == 'import math\n\nprint("printed", math.pi)\nx = 2'
    stream, = printing["outputs"]
    assert stream == {"output_type": "stream", "name": "stdout", "text": ["printed 3.141592653589793\n"]}
    assert value["outputs"][0]["data"] == {"text/plain": ["3"]}
    assert [cell["execution_count"] for cell in (printing, value, image)] == [1, 2, 3]
    assert image_of(image["outputs"][0]).size == (3, 2)
    assert len({cell["id"] for cell in made["cells"]}) == 4


def test_a_file_that_is_not_there_is_one_line(tmp_path):
    line = fails("evidence/notebook.py", str(tmp_path / "none.py"), str(tmp_path / "none.ipynb"))
    assert "none.py" in line


def test_the_tour_is_short_and_has_its_outputs():
    assert len(TOUR["cells"]) <= 30
    assert (ROOT / "tour.ipynb").stat().st_size < 1_000_000
    shown = [cell["outputs"] for cell in TOUR["cells"] if cell["cell_type"] == "code"]
    assert all(shown)
    images = [image_of(output) for outputs in shown for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) >= 8


def test_the_tour_is_made_of_its_file():
    """`make tour` makes it anew."""
    cells = notebook.read_cells((ROOT / "docs" / "tour.py").read_text("utf-8"))
    assert [(cell["cell_type"], "".join(cell["source"])) for cell in TOUR["cells"]] == cells


def test_what_is_shown_of_a_step_is_its_own_filter_and_map():
    """The noise is drawn without correlation, as the filter leaves it; a map at its start is almost a Gaussian's."""
    config = PixelConfig(image_size=64, channels=3, patch_size=8, vocab_size=9, text_len=3, width=16, depth=1, heads=2,
                         transporter_blocks=0, parametrization="posterior", shift=1.0, filters=2, logistics=3)
    network = PixelNTM(config)
    head = network.predictor.flow_heads["filter"]
    head.bias.data.normal_(std=0.5)  # the same weights at all pixels of a patch
    network.filter_kernels.data *= 4
    ts = config.time_grid(0.05)
    text = torch.ones(1, 3, dtype=torch.long)
    trajectory = network.sample(text, ts)
    emoji = SimpleNamespace(
        network=network,
        ts=ts,
        encode=lambda captions: text,
        sample_trajectories=lambda *captions, **how: (None, trajectory, None),
    )
    names = {"emoji": emoji, "contact_sheet": contact_sheet}
    for part in "neighbours = torch", "width = 0.05":
        cell, = [cell for cell in code(TOUR) if part in cell]
        printed, value = notebook.run_cell(cell, names)
        assert printed and isinstance(value, Image.Image)
    assert abs(torch.corrcoef(names["neighbours"])[0, 1]) < 0.05  # of the last, after the filter
    total = names["density"].sum(dim=0) * names["width"]
    torch.testing.assert_close(total, torch.ones_like(total))
    assert 0 < names["distance"].max() < 0.05


@pytest.mark.slow
def test_the_tour_runs_without_jupyter(monkeypatch):
    """In one namespace, from the folder of the repository, with four seconds of training in place of two minutes."""
    monkeypatch.chdir(ROOT)
    names = {"__name__": "__main__"}
    for cell in code(TOUR):
        if "seconds = 120" in cell:
            cell = cell.replace("seconds = 120", "seconds = 4")
        printed, value = notebook.run_cell(cell, names)
        assert printed or isinstance(value, Image.Image)
    assert names["images"].shape == (8, 3, 16, 16) and names["drawn"].shape == (20, 1, 8, 8)
    assert len(names["losses"]) > 3 and names["progress"] == 1
    captions = names["scores"].nats
    assert captions.argmax() in (0, 7)  # its own, or one that is true as well
    assert names["distance"].max() > 0.1  # the step is no Gaussian
