"""How large the package is, of this working tree or of any commit: parts, imports, lines, options.

    python tests/measure.py             # this tree
    python tests/measure.py 5e82270     # a commit

Only the sources are read; nothing of them is imported. Test time is what `pytest --durations` says.
"""

import argparse
import ast
import io
import subprocess
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def measure(root: Path) -> dict[str, str]:
    """Returns the numbers by name."""
    package = {path.relative_to(root / "lora_lab"): path for path in (root / "lora_lab").rglob("*.py")}
    trees = {relative: ast.parse(path.read_text()) for relative, path in package.items()}
    lines = {relative: len(path.read_text().splitlines()) for relative, path in package.items()}
    parts = {part_of(relative) for relative in trees} - {"__init__", "__main__"}
    arrows, inside = imports(trees, parts)
    sizes = {part: sum(n for relative, n in lines.items() if part_of(relative) == part) for part in parts}
    largest = max(sizes, key=sizes.__getitem__)
    folders: dict[Path, int] = {}
    for relative in package:
        folders[relative.parent] = folders.get(relative.parent, 0) + 1
    fullest = max(folders, key=folders.__getitem__)
    tests = list((root / "tests").rglob("*.py"))
    cases = [node for path in tests for node in ast.walk(ast.parse(path.read_text())) if is_test(node)]
    own = options(trees, "adapters/methods")
    yamls = [
        path.read_text() for part in ("configs", "experiments") for path in (root / part).rglob("*.yaml")
    ]
    set_somewhere = {name for name in own if is_set(name, yamls)}
    return {
        "parts of the package": str(len(parts)),
        "imports between parts": str(len(arrows)),
        "pairs of parts that import each other": str(len(circles(arrows))),
        "floors (longest chain of imports)": str(floors(arrows)),
        "own imports inside functions, without cli.py": str(inside),
        "largest part": f"{largest}, {sizes[largest] / sum(sizes.values()):.0%} of the lines",
        "fullest folder": f"{fullest}, {folders[fullest]} files",
        "lines of the package": f"{sum(lines.values()):,}",
        "lines of tests": f"{sum(len(path.read_text().splitlines()) for path in tests):,}",
        "test functions": str(len(cases)),
        "methods' own options": str(len(own)),
        "of these set by no YAML": str(len(own) - len(set_somewhere)),
    }


def part_of(relative: Path) -> str:
    """Returns the name of the part that a file of the package belongs to."""
    return relative.with_suffix("").parts[0]


def imports(trees: dict[Path, ast.Module], parts: set[str]) -> tuple[set[tuple[str, str]], int]:
    """Returns the pairs (importing part, imported part), and the number of own imports inside functions."""
    arrows, inside = set(), 0
    for relative, tree in trees.items():
        functions = [
            node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        hidden = {id(node) for function in functions for node in ast.walk(function)}
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lora_lab"):
                names = [node.module or ""]
                if node.module == "lora_lab":
                    names = [f"lora_lab.{alias.name}" for alias in node.names]
                used = {name.split(".")[1] for name in names if "." in name}
                arrows |= {(part_of(relative), part) for part in used & parts if part != part_of(relative)}
                inside += id(node) in hidden and part_of(relative) != "cli"
    return {arrow for arrow in arrows if arrow[0] in parts}, inside


def circles(arrows: set[tuple[str, str]]) -> set[frozenset[str]]:
    """Returns the pairs of parts of which each imports the other."""
    return {frozenset(arrow) for arrow in arrows if arrow[::-1] in arrows}


def floors(arrows: set[tuple[str, str]]) -> int:
    """Returns the number of parts on the longest chain of imports that meets none twice."""
    below: dict[str, set[str]] = {}
    for importer, imported in arrows:
        below.setdefault(importer, set()).add(imported)

    def height(part: str, above: frozenset[str]) -> int:
        return 1 + max((height(p, above | {part}) for p in below.get(part, ()) if p not in above), default=0)

    return max(height(part, frozenset({part})) for part in below)


def options(trees: dict[Path, ast.Module], folder: str) -> list[tuple[str, str]]:
    """Returns (method, field) for every field that a method's spec adds, except `method` itself."""
    found = []
    for relative, tree in trees.items():
        for node in tree.body:
            spec = isinstance(node, ast.ClassDef) and node.name.endswith("Spec")
            if spec and str(relative).startswith(folder):
                fields = [s.target.id for s in node.body if isinstance(s, ast.AnnAssign)]
                found += [(relative.stem, name) for name in fields if name != "method"]
    return found


def is_set(option: tuple[str, str], yamls: list[str]) -> bool:
    """Whether a YAML of the method, or an experiment with it, sets the option."""
    method, field = option
    return any(f"{field}:" in text and method in text for text in yamls)


def is_test(node: ast.AST) -> bool:
    """Whether a node is a test function."""
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")


def main() -> None:
    """Prints the numbers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("commit", nargs="?")
    commit = parser.parse_args().commit
    with tempfile.TemporaryDirectory() as folder:
        root = ROOT
        if commit is not None:
            archive = subprocess.run(["git", "-C", ROOT, "archive", commit], capture_output=True, check=True)
            tarfile.open(fileobj=io.BytesIO(archive.stdout)).extractall(folder, filter="data")
            root = Path(folder)
        for name, value in measure(root).items():
            print(f"{name:46} {value}")


if __name__ == "__main__":
    main()
