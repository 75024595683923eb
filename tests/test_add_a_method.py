"""The README's three steps to a new method, followed to the letter in a copy of the project."""

import re
import shutil
import sys
from pathlib import Path

import pytest

from tests.forks import fork

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
STEPS = README.partition("\n### Add a method\n")[2].partition("\n#")[0]


@pytest.fixture
def project(tmp_path):
    for name in ("lora_lab", "tests", "configs", "README.md", "pyproject.toml"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    return tmp_path


def put(path: Path, before: str, text: str) -> None:
    """Puts a line before another one of a file."""
    whole = path.read_text()
    assert whole.count(before) == 1, before
    path.write_text(whole.replace(before, f"{text}\n{before}"))


def check(project: Path) -> int:
    """Runs tests of the copy, whose modules take the place of the project's own."""
    for name in list(sys.modules):
        if name.partition(".")[0] in ("lora_lab", "tests"):
            del sys.modules[name]
    sys.path.insert(0, str(project))
    files = ["tests/test_architecture.py", "tests/adapters/test_every_method.py", "tests/test_cli.py"]
    return int(pytest.main(["-q", "-p", "no:cacheprovider", "-k", "volume or agree", *files]))


def test_three_steps_make_a_method(project):
    paths = re.findall(r"`((?:lora_lab|configs)/[^`]*)`", STEPS)
    assert re.findall(r"^(\d)\.", STEPS, flags=re.MULTILINE) == ["1", "2", "3"]
    method, table, config = (project / path.replace("<name>", "volume") for path in paths)

    # 1: the file, here that of the package in tests/plugin, without its controller.
    source = (
        (ROOT / "tests" / "plugin" / "volume_lab.py")
        .read_text()
        .partition("\n\n@dataclass\nclass LimitSpec")[0]
    )
    source = re.sub(r"^import lightning.*\n|^from lora_lab\.callbacks.*\n", "", source, flags=re.MULTILINE)
    method.write_text(
        re.sub(r"lora_lab\.adapters import.*", "lora_lab.adapters.spec import AdapterSpec", source)
    )

    # 2: the entry.
    entry = "from lora_lab.adapters.methods.volume import Volume as Volume, VolumeSpec as VolumeSpec"
    put(table, "from lora_lab.registry import Registry\n", entry)
    put(table, "        Full,\n", "        Volume,")

    # 3: its config, and its row.
    config.write_text("# Volume: one number for each map.\nadapter:\n  method: volume\n")
    (row,) = re.findall(r"^\| `full` \|.*\n", README, flags=re.MULTILINE)
    put(project / "README.md", row, row.replace("`full`", "`volume`").strip())

    code, told = fork(check, project, folder=project, COLUMNS="80").end()
    assert code == 0, told
    passed = re.search(r"(\d+) passed", told)
    assert int(passed.group(1)) > 40, told
