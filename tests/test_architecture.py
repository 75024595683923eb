"""Rules of the package that no single module can check."""

import ast
import re
from pathlib import Path

import pytest

from lora_lab.adapters import METHODS
from lora_lab.callbacks import CONTROLLERS
from tests.options import without_reason

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "lora_lab"
ORDER = [
    "errors",
    "registry",
    "documents",
    "assets",
    "linalg",
    "tasks",
    "models",
    "adapters",
    "data",
    "training",
    "callbacks",
    "tracking",
    "config",
    "experiment",
    "statistics",
    "artifacts",
    "report",
    "studies",
    "bench",
    "testing",
    "cli",
]
"""A part may import from parts above it and from itself."""


def part_of(module: str) -> str:
    return module.split(".")[1]


def imports_of(path: Path) -> set[str]:
    """Returns every lora_lab module that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return {name for name in found if name.startswith("lora_lab.")}


def files() -> list[Path]:
    own = [path for path in PACKAGE.rglob("*.py") if path.name not in ("__main__.py",)]
    return [path for path in own if path != PACKAGE / "__init__.py"]


def test_imports_go_one_way():
    for path in files():
        own = path.relative_to(PACKAGE).with_suffix("").parts[0]
        for module in imports_of(path):
            assert ORDER.index(part_of(module)) <= ORDER.index(own), f"{path} imports {module}"


def test_every_part_has_its_place_in_the_order():
    parts = {path.relative_to(PACKAGE).with_suffix("").parts[0] for path in files()}
    assert parts == set(ORDER)


@pytest.mark.parametrize(
    ("table", "folder", "names_itself", "configs", "section"),
    [
        (METHODS, "adapters/methods", r'^    method: str = "(\w+)"', "adapters", "Methods"),
        (CONTROLLERS, "callbacks/controllers", r'^    name = "(\w+)"', "controllers", "Controllers"),
    ],
)
def test_table_files_configs_and_readme_rows_agree(table, folder, names_itself, configs, section):
    names = set(table)
    found = {
        path.stem: re.findall(names_itself, path.read_text(), flags=re.MULTILINE)
        for path in (PACKAGE / folder).rglob("*.py")
    }
    # Helpers may lie next to them: they name no method or controller.
    assert {stem: name for stem, name in found.items() if name} == {name: [name] for name in names}
    assert {path.stem for path in (ROOT / "configs" / configs).glob("*.yaml")} == names
    text = (ROOT / "README.md").read_text().partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    assert sorted(re.findall(r"^\| `(\w+)` \|", text, flags=re.MULTILINE)) == sorted(names)


@pytest.mark.parametrize("name", CONTROLLERS)
def test_a_controllers_file_class_and_config_name_it(name):
    assert CONTROLLERS[name].__module__ == f"lora_lab.callbacks.controllers.{name}"
    assert f"\n  {name}:" in (ROOT / "configs" / "controllers" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_file_spec_and_config_name_it(name):
    method = METHODS[name]
    assert method.__module__ == f"lora_lab.adapters.methods.{name}"
    assert method.Spec().method == name
    assert f"method: {name}\n" in (ROOT / "configs" / "adapters" / f"{name}.yaml").read_text()


def test_no_module_outside_the_table_names_a_method_class():
    """Controllers, storage and reports know methods by their protocols; METHODS is the one list."""
    for path in files():
        relative = path.relative_to(PACKAGE)
        if relative.parts[:2] == ("adapters", "methods"):
            continue
        named = {module for module in imports_of(path) if module.startswith("lora_lab.adapters.methods.")}
        assert not named or relative.parts[0] == "bench", f"{relative} imports {named}"


def test_every_option_of_a_method_earns_its_place():
    """A YAML sets it, PEFT's file format holds it, or its docstring names the paper or code that it is of."""
    assert without_reason() == []


def test_readme_commands_are_those_that_ci_runs():
    commands = re.findall(r"^python3 -m venv .*$", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text()


def test_the_project_speaks_of_itself_alone():
    words = ["/" + "work/", "file" + ":///", "ghp" + "_"]
    for path in [
        *PACKAGE.rglob("*.py"),
        *ROOT.glob("*.md"),
        *ROOT.glob("experiments/**/*.md"),
        *ROOT.glob("configs/**/*"),
    ]:
        if path.is_file():
            text = path.read_text()
            assert not [word for word in words if word in text], path
