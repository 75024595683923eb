"""Which of the methods' own options a YAML in configs/ or experiments/ sets: `python -m tests.options`.

Each of the others has another reason: PEFT's file format holds it, or its docstring names the paper or the
code that it is of.
"""

import re
from dataclasses import fields
from pathlib import Path

import yaml

from lora_lab.adapters import METHODS
from lora_lab.adapters.spec import AdapterSpec
from lora_lab.config.documentation import field_documentation

ROOT = Path(__file__).parent.parent


def adapter_sections():
    """Yields the `adapter` section of every shipped file."""
    for folder in ("configs", "experiments"):
        for path in (ROOT / folder).rglob("*.yaml"):
            section = (yaml.safe_load(path.read_text()) or {}).get("adapter")
            if isinstance(section, dict) and "method" in section:
                yield section


def own_options():
    """Returns the names of each method's own options, and of those among them that no file sets."""
    used = {name: set() for name in METHODS}
    for section in adapter_sections():
        used[section["method"]] |= set(section)
    shared = {field.name for field in fields(AdapterSpec)}
    own = {name: [f.name for f in fields(m.Spec) if f.name not in shared] for name, m in METHODS.items()}
    return own, {name: [option for option in own[name] if option not in used[name]] for name in own}


def without_reason():
    """Returns every own option, as `method.option`, that has no reason to be there."""
    _, unset = own_options()
    found = []
    for name, options in unset.items():
        documented = field_documentation(METHODS[name].Spec)
        stored = METHODS[name].peft.fields.values()
        found += [
            f"{name}.{option}"
            for option in options
            if option not in stored and not re.search(r"paper|authors|PEFT|arXiv", documented.get(option, ""))
        ]
    return found


if __name__ == "__main__":
    own, unset = own_options()
    for name in own:
        print(f"{name}: {len(own[name])}, unset: {', '.join(unset[name]) or '-'}")
    print(f"{sum(map(len, own.values()))} options, of which no file sets {sum(map(len, unset.values()))}")
    print(f"without a reason: {', '.join(without_reason()) or 'none'}")
