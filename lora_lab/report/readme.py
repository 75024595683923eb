"""The parts of the README that are generated from the sources, and its sections.

    python -m lora_lab.report.readme README.md

writes the tables of methods and controllers again.
"""

from __future__ import annotations

import sys
from pathlib import Path

from lora_lab.adapters import METHODS
from lora_lab.callbacks import CONTROLLERS
from lora_lab.report.descriptions import describe


def section(text: str, title: str) -> str:
    """Returns what is under a heading of a Markdown text, up to the next heading.

    Raises:
        KeyError: if there is no such heading.
    """
    inside, code, kept = False, False, list[str]()
    for line in text.splitlines():
        code ^= line.startswith("```")
        if line.startswith("#") and not code:
            inside = line.lstrip("#") == f" {title}"
        elif inside:
            kept.append(line)
    if not kept:
        raise KeyError(title)
    return "\n".join(kept).strip() + "\n"


def methods_rows() -> str:
    """Returns the README's table of methods."""
    lines = ["| method | what it is | paper | opens in PEFT |", "|---|---|---|---|"]
    for name, method in METHODS.items():
        opens = f"as {method.peft.peft_type}" if method.peft.peft_type else "no"
        lines.append(f"| `{name}` | {describe(name).title} | {_papers(name)} | {opens} |")
    return "\n".join(lines)


def controllers_rows() -> str:
    """Returns the README's table of controllers."""
    lines = ["| controller | what it does | paper |", "|---|---|---|"]
    lines += [f"| `{name}` | {describe(name).title} | {_papers(name)} |" for name in CONTROLLERS]
    return "\n".join(lines)


def with_tables(text: str) -> str:
    """Returns the README with both tables from the sources."""
    for first, rows in (("| method |", methods_rows()), ("| controller |", controllers_rows())):
        start = text.index(first)
        text = text[:start] + rows + text[text.index("\n\n", start) :]
    return text


def _papers(name: str) -> str:
    return ", ".join(f"[{paper}](https://arxiv.org/abs/{paper})" for paper in describe(name).papers)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_tables(path.read_text()))
