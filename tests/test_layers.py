"""The floors of the package: imports only point down, and heavy packages stay where they belong."""

import ast
from pathlib import Path

import pytest

import composable_ebm

ROOT = Path(composable_ebm.__file__).parent
FLOORS = {
    1: "conditionals data diagnostics energy native packed plotting schedules weights",
    2: "adapters analytic diffusion bits experts sampling",
    3: "annealed_importance boltzmann partition recipe train",
    4: "evaluation models_page",
    5: "cli generate",
}
FLOOR = {part: floor for floor, parts in FLOORS.items() for part in parts.split()}
BESIDE = {("energy", "weights"), ("annealed_importance", "partition")}
"""Who may import whom on one floor."""
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
}
MODULES = sorted(path for path in ROOT.rglob("*.py") if path.parent != ROOT or path.stem != "__init__")


def part_of(name):
    """composable_ebm.sampling.engine -> sampling."""
    return name.split(".")[1]


def imports(path):
    """(full name, whether at the top of the module) of all that a file imports, but for type checkers."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    typing = [n for n in tree.body if isinstance(n, ast.If) and ast.unparse(n.test) == "TYPE_CHECKING"]
    skipped = {id(inner) for node in typing for inner in ast.walk(node)}
    for node in (node for node in ast.walk(tree) if id(node) not in skipped):
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
        if there != here and (here, there) not in BESIDE:
            assert there in FLOOR, f"{name(path)} imports {module}: import modules, not names of the package"
            assert FLOOR[there] < FLOOR[here], f"{name(path)} imports {module}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=name)
def test_heavy_packages_are_imported_only_where_they_belong(path):
    for module, _ in imports(path):
        package = module.split(".")[0]
        assert part(path) in HEAVY.get(package, {part(path)}), f"{name(path)} imports {package}"


def test_every_module_has_a_floor():
    assert {part(path) for path in MODULES} <= FLOOR.keys()


def test_data_knows_nothing_of_energies():
    for path in MODULES:
        if part(path) == "data":
            inside = {part_of(m) for m, _ in imports(path) if m.startswith("composable_ebm.")}
            assert inside <= {"data"}


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
