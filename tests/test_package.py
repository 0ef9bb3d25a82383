"""What is given away: the wheel, its version, and the README's first example where it is installed afresh."""

import re
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

import composable_ebm as ceb

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
LIMIT = 40_000_000


def test_the_version_is_the_same_everywhere():
    assert "version" in PROJECT["dynamic"]  # read from the package
    cited = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited is not None
    assert cited[1] == ceb.__version__
    assert (
        f"[{ceb.__version__}]" in (ROOT / "CHANGELOG.md").read_text()
        or "[Unreleased]" in (ROOT / "CHANGELOG.md").read_text()
    )


def test_every_extra_says_what_it_adds():
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    for extra in PROJECT["optional-dependencies"]:
        place = next(i for i, line in enumerate(lines) if line.startswith(f"{extra} = ["))
        assert lines[place - 1].startswith("# "), f"say what the extra {extra} is for"


def test_contributing_names_every_room_of_the_house():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rooms = [path for path in (ROOT / "composable_ebm").iterdir() if path.suffix == ".py" or path.is_dir()]
    names = {path.name for path in rooms if path.name not in ("__init__.py", "__pycache__")}
    for name in sorted(names):
        assert f"`{name}`" in text or f"`{name}/`" in text, f"CONTRIBUTING.md does not name {name}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("build")
    pytest.importorskip("hatchling")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_is_small_typed_and_well_formed(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("METADATA"))).decode())
    assert metadata["Version"] == ceb.__version__
    assert "composable_ebm/py.typed" in names
    assert any(name.startswith("composable_ebm/models/") for name in names)
    assert any(name.startswith("composable_ebm/demos/mixer/") for name in names)
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/"))]
    twine = [sys.executable, "-m", "twine", "check", "--strict", str(wheel)]
    subprocess.run(twine, check=True, capture_output=True)


@pytest.mark.slow
def test_the_wheel_is_under_40_mb(wheel):
    assert wheel.stat().st_size < LIMIT, f"{wheel.stat().st_size / 1e6:.1f} MB"


@pytest.mark.slow
def test_the_first_example_of_the_readme_runs_where_the_wheel_is_installed(wheel, tmp_path):
    """In an environment of its own, with the other packages of this one: PyTorch alone is gigabytes."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-deps", wheel], check=True)
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(
        subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    )
    (site / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    example = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert example is not None
    code = f"import composable_ebm; print(composable_ebm.__file__)\n{example[1]}"
    done = subprocess.run(
        [python, "-I", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert str(site) in done.stdout  # this one, and not the folder of the tests
    assert list(tmp_path.glob("*.png"))
