"""The folder that becomes a Hugging Face Space: whole, small, and able to build the page."""

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SPACE = ROOT / "demos" / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

assemble = runpy.run_path(str(SPACE / "assemble.py"))["assemble"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("space") / "new"
    assemble(made)
    return made


def test_a_space_holds_what_it_needs_and_nothing_else(folder):
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "app.py",
        "composable_ebm",
        "demos",
        "models",
        "requirements.txt",
    }
    assert [path.name for path in (folder / "demos").iterdir()] == ["mixer"]
    assert not list(folder.rglob("__pycache__"))
    shipped = sorted(path.relative_to(ROOT) for path in (ROOT / "models").glob("*/*/model.safetensors"))
    assert sorted(path.relative_to(folder) for path in folder.rglob("*.safetensors")) == shipped
    assemble(folder)  # again, over an earlier copy


def test_a_folder_with_something_else_in_it_is_refused(tmp_path):
    (tmp_path / "diary.txt").write_text("private")
    with pytest.raises(ValueError, match=r"holds diary\.txt, which is no part of a Space"):
        assemble(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["diary.txt"]


def test_requirements_of_the_space_are_the_projects():
    wanted = (SPACE / "requirements.txt").read_text().split()
    assert set(wanted) <= set(PROJECT["dependencies"])


def test_the_front_matter_names_the_app_and_a_gradio_that_fits():
    matter = (SPACE / "README.md").read_text().split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in matter.splitlines())
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).exists()
    assert len(fields["short_description"]) <= 60
    (minimum,) = (d for d in PROJECT["dependencies"] if d.startswith("gradio"))
    assert int(fields["sdk_version"].split(".")[0]) >= int(re.sub(r"\D", "", minimum))
    python = tuple(map(int, fields["python_version"].strip('"').split(".")))
    assert python >= tuple(map(int, PROJECT["requires-python"].removeprefix(">=").split(".")))


def test_the_app_of_a_space_builds_its_page(folder):
    code = (
        "import sys\n"
        "for absent in ('accelerate', 'tyro', 'torchvision', 'tensorboard', 'dicebear'):\n"
        "    sys.modules[absent] = None\n"
        "import app, demos.mixer.app as mixer\n"
        "asked = {}\n"
        "app.serve = asked.update\n"
        "app.main()\n"
        "server, runs = mixer.build(mixer.Limits(asked['max_chains']), 'cpu')\n"
        "paths = {route.path for route in server.routes}\n"
        "known = 'faces/smile' in runs.offer.known and (mixer.PAGE / 'index.html').is_file()\n"
        "print(mixer.__file__, asked['host'], known, {'/', '/ask/run'} <= paths)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [str(folder / "demos/mixer/app.py"), "0.0.0.0", "True", "True"], done.stderr
