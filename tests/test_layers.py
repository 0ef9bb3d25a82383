"""The floors of the package: imports only point down, and heavy packages stay where they belong."""

import ast
from pathlib import Path

import pytest

import composable_ebm

ROOT = Path(composable_ebm.__file__).parent
FLOORS = (
    "files processes proportions",
    "data",
    "energy",
    "potential plotting",
    "sampling experts",
    "boltzmann partition train pipelines",
    "evaluation testing",
    "cli generate",
)
"""From the ground up; a room imports only from floors below its own."""
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms.split()}
HEAVY = {
    "accelerate": {"train", "generate"},
    "gradio": set(),
    "torchvision": {"data"},
    "matplotlib": {"plotting"},
    "tensorboard": {"train"},
    "tyro": {"train", "cli", "generate"},
    "huggingface_hub": {"experts"},
    "dicebear": {"data"},
    "resvg_py": {"data"},
    "pickle": set(),
    "diffusers": {"pipelines"},
    "transformers": set(),
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__")


def part_of(name):
    """composable_ebm.sampling.chain -> sampling."""
    return name.split(".")[1]


def imports(path):
    """(full name, whether at the top of the module) of all that a file imports, for type checkers too."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, id(node) in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            if node.module == "composable_ebm":
                yield from ((f"composable_ebm.{alias.name}", id(node) in top) for alias in node.names)
            else:
                yield node.module, id(node) in top


def part(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def name(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_imports_only_point_down(path):
    here = part(path)
    for module, _ in imports(path):
        if module.split(".")[0] != "composable_ebm":
            continue
        there = part_of(module)
        if there != here:
            assert there in FLOOR, f"{name(path)} imports {module}: import modules, not names of the package"
            assert FLOOR[there] < FLOOR[here], f"{name(path)} imports {module}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_heavy_packages_are_imported_only_where_they_belong(path):
    for module, _ in imports(path):
        package = module.split(".")[0]
        assert part(path) in HEAVY.get(package, {part(path)}), f"{name(path)} imports {package}"


def test_gradients_by_states_are_taken_in_one_place():
    takers = {name(path) for path in MODULES if "autograd.grad(" in path.read_text()}
    assert takers == {"energy/gradient.py"}


def test_every_module_has_a_floor():
    assert {part(path) for path in MODULES} <= FLOOR.keys()


def test_data_knows_nothing_of_energies():
    for path in MODULES:
        if part(path) == "data":
            inside = {part_of(m) for m, _ in imports(path) if m.startswith("composable_ebm.")}
            assert inside <= {"data", "files"}


def test_the_modules_of_a_package_import_each_other_without_cycles():
    graph = {
        ".".join(("composable_ebm", *path.relative_to(ROOT).with_suffix("").parts)): {
            module for module, top in imports(path) if top
        }
        for path in MODULES
    }
    done, visiting = set(), []

    def visit(module):
        assert module not in visiting, " -> ".join([*visiting, module])
        if module in graph and module not in done:
            visiting.append(module)
            for needed in graph[module]:
                visit(needed)
            visiting.pop()
            done.add(module)

    for module in graph:
        visit(module)
