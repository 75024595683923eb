"""Methods and controllers from outside the package: found by entry points, or registered in Python."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from torch import nn

from lora_lab import METHODS, inject, load_adapter, save_adapter
from lora_lab.adapters import Adapter, AdapterSpec, LoRA, LoRASpec
from lora_lab.callbacks import Controller
from lora_lab.errors import CheckpointError, ConfigError
from lora_lab.registry import Registry
from tests.forks import fork

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugin"


def check() -> int:
    sys.path.insert(0, str(PLUGIN))
    return int(pytest.main(["-q", "-p", "no:cacheprovider", str(PLUGIN / "volume_checks.py")]))


def test_a_package_with_entry_points_is_a_method_like_ours(tmp_path):
    """The package's own checks, in a process in which it is installed."""
    code, told = fork(check, folder=tmp_path).end()
    assert code == 0, told


@dataclass
class TwiceSpec(LoRASpec):
    method: str = "twice"


class Twice(LoRA):
    Spec = TwiceSpec


def test_registering_adds_a_method_for_this_process(register, tmp_path):
    assert register(Twice) is Twice
    assert list(METHODS)[-1] == "twice"
    register(Twice)  # as a notebook does
    model = nn.Sequential(nn.Linear(24, 16))
    save_adapter(inject(model, TwiceSpec(targets=["0"])), tmp_path / "adapter")
    again = copy.deepcopy(model[0].base)
    assert load_adapter(nn.Sequential(again), tmp_path / "adapter").spec == TwiceSpec(
        targets=["0"], modules_to_save=[]
    )


def test_a_folder_of_an_unknown_method_says_what_is_missing(register, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(METHODS._kinds, "twice", Twice)
        save_adapter(inject(nn.Sequential(nn.Linear(24, 16)), TwiceSpec(targets=["0"])), tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="method 'twice' is not known here. Install its package"):
        load_adapter(nn.Sequential(nn.Linear(24, 16)), tmp_path / "adapter")


@dataclass
class NeedySpec(AdapterSpec):
    size: int = 3

    def __init__(self, size: int):
        self.size = size


def made(base=Adapter, **attributes) -> type:
    return type("Made", (base,), attributes)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (
            made(LoRA),
            r"'lora' is taken by the method lora_lab\.adapters\.methods\.lora\.LoRA\. Choose",
        ),
        (made(LoRA, Spec=AdapterSpec), "the id of a method must be a plain name; got ''"),
        (made(Spec=TwiceSpec), "missing: family, paper, peft"),
        (made(LoRA, Spec=NeedySpec), "a dataclass with a default for every field"),
        (made(Controller, name="few"), "missing: Spec"),
        (dict, "is not a class that inherits"),
        (TwiceSpec(), "is not a class that inherits"),
    ],
)
def test_what_cannot_be_registered_is_refused(register, kind, message):
    before = dict(METHODS)
    with pytest.raises(ConfigError, match=message):
        register(kind)
    assert dict(METHODS) == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("lora = plug:Twice", r"plug\.Twice: the id 'lora' is taken by"),
        ("twice = plug:Missing", "twice = plug:Missing of plug-lab: cannot be loaded .*Update or uninstall"),
        (
            "other = plug:Twice",
            "other = plug:Twice of plug-lab: its id is 'twice'; give the entry point this name",
        ),
        ("twice = plug:number", "a method must be a class that inherits Adapter"),
    ],
)
def test_a_broken_entry_point_names_its_package(line, message, tmp_path, monkeypatch):
    name = line.partition(" ")[0]
    spec = "TwiceSpec" if name != "lora" else "LoRASpec"
    (tmp_path / "plug.py").write_text(
        "from tests.test_plugins import LoRA, LoRASpec, TwiceSpec\nnumber = 3\n"
        f"class Twice(LoRA):\n    Spec = {spec}\n"
    )
    info = tmp_path / "plug_lab-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plug-lab\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[lora_lab.methods]\n{line}\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "plug", raising=False)
    fresh = Registry(METHODS.what, METHODS.base, METHODS.needs, METHODS.id_of, METHODS.own.values())
    for _ in range(2):  # each time that it is asked
        with pytest.raises(ConfigError, match=message):
            len(fresh)
    monkeypatch.delitem(sys.modules, "plug", raising=False)
