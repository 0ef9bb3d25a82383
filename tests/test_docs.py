"""The documentation: what it says to type runs, what it points at is there, and what is public is in it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import composable_ebm as ceb

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
BLOCK = re.compile(r"(<!-- not run: .*? -->\n)?```python\n(.*?)```", re.DOTALL)
WITH_CODE = [page for page in PAGES if any(not skipped for skipped, _ in BLOCK.findall(page.read_text()))]
TRAINED = {"train_your_own.md"}
"""Pages whose examples need what was trained on them."""
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def run(source, folder):
    """Runs source in a process of its own, as a reader would."""
    script = folder / "page.py"
    script.write_text(f"import torch\ntorch.set_num_threads(1)\n{source}")
    done = subprocess.run([sys.executable, script], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def code(page):
    return "\n".join(block for skipped, block in BLOCK.findall(page.read_text()) if not skipped)


# In one process: a dozen imports of PyTorch would take longer than the pages.
def test_the_examples_of_the_pages_run(tmp_path):
    pages = [ROOT / "README.md", *(page for page in WITH_CODE if page.name not in TRAINED)]
    assert len(pages) >= 6
    run("\n".join(f"exec(compile({code(page)!r}, {page.name!r}, 'exec'), {{}})" for page in pages), tmp_path)
    assert {path.name for path in tmp_path.glob("*.png")} >= {"three_slanted.png", "faces.png"}


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_from_top_to_bottom(notebook, tmp_path):
    cells = json.loads(notebook.read_text())["cells"]
    run("\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"), tmp_path)


def test_there_are_three_notebooks_with_what_they_draw():
    assert {path.stem for path in NOTEBOOKS} == {"compose", "train", "own_energy"}
    for path in NOTEBOOKS:
        cells = [c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code"]
        assert any("image/png" in output.get("data", {}) for cell in cells for output in cell["outputs"])
        assert not any(output["output_type"] == "error" for cell in cells for output in cell["outputs"])


def test_twenty_questions_are_answered_on_pages_that_exist():
    text = (DOCS / "questions.md").read_text()
    questions = re.split(r"^### ", text, flags=re.MULTILINE)[1:]
    assert [question.split(".")[0] for question in questions] == [str(i) for i in range(1, 21)]
    for question in questions:
        assert re.search(r"→ \[.*?\]\([a-z_]+\.md", question), question


def test_links_between_pages_and_pictures_exist():
    for page in [*DOCS.rglob("*.md"), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} points at {target}"


def test_everything_public_is_in_the_reference():
    told = re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in DOCS.rglob("*.md")), re.MULTILINE)
    modules = {"analytic", "diagnostics", "schedules"}
    for name in set(ceb.__all__) - modules:
        public = getattr(ceb, name)
        place = f"{public.__module__}.{public.__qualname__}"
        assert place in told or public.__module__ in told, f"{name} is not in docs/reference"


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in DOCS.rglob("*.md"):
        assert f" {page.relative_to(DOCS)}\n" in navigation, f"{page.name} is on no menu"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "reference" / "algebra" / "index.html").exists()
