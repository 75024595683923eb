"""What a Python user imports: few, obvious places, with types, and cheap to look at."""

import subprocess
import sys
from pathlib import Path

import pytest

import lora_lab
import lora_lab.adapters
from lora_lab.adapters import METHODS

PACKAGE = Path(lora_lab.__file__).parent


def test_dir_shows_names_that_exist():
    shown = dir(lora_lab)
    assert {"compose", "run", "evaluate", "inject", "FineTuner", "build_model", "build_data"} <= set(shown)
    for name in shown:
        assert getattr(lora_lab, name) is not None
    with pytest.raises(AttributeError):
        lora_lab.ijnect  # noqa: B018


def test_looking_at_the_package_imports_no_torch():
    code = "import sys, lora_lab; dir(lora_lab); print('torch' in sys.modules, 'omegaconf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_class_and_spec_come_from_lora_lab_adapters(name):
    method = METHODS[name]
    for part in (method, method.Spec):
        assert getattr(lora_lab.adapters, part.__name__) is part
        assert part.__name__ in lora_lab.adapters.__all__
    # The same for type checkers, which see only what is imported under its own name.
    line = f"{method.__name__} as {method.__name__}, {method.Spec.__name__} as {method.Spec.__name__}"
    assert line in (PACKAGE / "adapters" / "methods" / "__init__.py").read_text()


def test_the_package_says_that_it_has_types():
    assert (PACKAGE / "py.typed").is_file()
