"""Writes the pages that are made from the sources: nothing in them is kept a second time.

A page for each method, controller and part of a config comes from what `lora-lab describe` knows;
the reference from what the packages export; start and experiments from the READMEs.
"""

import inspect
import re
import shutil
from pathlib import Path
from textwrap import dedent

import lora_lab
import lora_lab.adapters
import lora_lab.callbacks
import lora_lab.data
import lora_lab.errors
from lora_lab.adapters import METHODS, protocols
from lora_lab.callbacks import CONTROLLERS
from lora_lab.report.descriptions import REQUIRED, Description, known
from lora_lab.report.readme import section

ROOT = Path(__file__).parent.parent
ARXIV = "https://arxiv.org/abs/"


def write_pages(folder: Path) -> None:
    """Writes everything again into a folder."""
    shutil.rmtree(folder, ignore_errors=True)
    found = known().values()
    pages = {f"{group(description)}/{description.name}": page(description) for description in found}
    for name, title, lead in (
        ("methods", "Methods", "`adapter.method` names one; each page is made from the method's source."),
        ("controllers", "Controllers", "`controllers:` in a config holds those of a run."),
        ("config", "Config", "What each part of an experiment's YAML file may say."),
    ):
        pages[f"{name}/index"] = index(title, lead, [d for d in found if group(d) == name])
    pages |= reference()
    readme = (ROOT / "README.md").read_text().replace("](docs/", "](../")
    pages["start"] = (
        f"# Start\n\n{section(readme, 'Start')}\n## What a run is\n\n{section(readme, 'What a run is')}"
    )
    pages["add_a_method"] = f"# Add a method\n\n{section(readme, 'Add a method')}"
    for name, text in pages.items():
        path = folder / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    copied = shutil.ignore_patterns("*.py")
    shutil.copytree(ROOT / "experiments", folder / "experiments", ignore=copied)
    overview = folder / "experiments" / "README.md"
    names = sorted(path.parent.name for path in (folder / "experiments").glob("*/README.md"))
    overview.write_text(f"{overview.read_text()}\n{toctree(f'{name}/README' for name in names)}")


def group(description: Description) -> str:
    """Returns the folder of a description's page."""
    return {"method": "methods", "controller": "controllers"}.get(description.kind, "config")


def page(description: Description) -> str:
    """Returns one description as Markdown."""
    named = description.kind in ("method", "controller")
    parts = [f"# {prose(description.title) if named else description.name}"]
    parts += [] if named else [f"{prose(description.title)}."]
    labels = {"method": "Method", "controller": "Controller", "task": "Task", "data source": "Data source"}
    facts = {labels.get(description.kind, "Part of a config"): f"`{description.name}`"}
    facts |= {label: linked(fact) for label, fact in description.facts.items()}
    parts.append("\n".join(f"- {label}: {fact}" for label, fact in facts.items()))
    if description.text:
        parts.append(prose(description.text))
    if description.example:
        parts.append(f"## Example\n\n```yaml\n{description.example}\n```")
    if description.fields:
        parts.append(f"## Fields of `{description.node or 'the file'}`")
    for field in description.fields:
        default = REQUIRED if field.default == REQUIRED else f"default `{field.default}`"
        peft = f" In PEFT: `{field.peft}`." if field.peft else ""
        meaning = prose(field.meaning) or linked(field.type)
        parts.append(f"**{field.name}**: {kind_of(field.type)}, {default}\n: {meaning}{peft}")
    return "\n\n".join(parts) + "\n"


def index(title: str, lead: str, descriptions: list[Description]) -> str:
    """Returns the page that lists some descriptions."""
    lines = ["| name | what it is | paper |", "|---|---|---|"]
    for found in descriptions:
        papers = ", ".join(f"[{paper}]({ARXIV}{paper})" for paper in found.papers)
        lines.append(f"| [`{found.name}`]({found.name}.md) | {prose(found.title)} | {papers} |")
    if not any(found.papers for found in descriptions):
        lines = [line.rpartition("|")[0].rpartition("|")[0] + "|" for line in lines]
    hidden = toctree((f"{found.name} <{found.name}>" for found in descriptions), hidden=True)
    return f"# {title}\n\n{lead}\n\n" + "\n".join(lines) + f"\n\n{hidden}"


def reference() -> dict[str, str]:
    """Returns the pages of the public names, one for each place to import from."""
    public = {
        "lora_lab": dir(lora_lab),
        "lora_lab.adapters": ["AdapterSpec", "RankedSpec", "LowRankSpec"],
        "lora_lab.adapters.protocols": [kind.__name__ for kind in protocols.PROTOCOLS],
        "lora_lab.callbacks": lora_lab.callbacks.__all__,
        "lora_lab.data": lora_lab.data.__all__,
        "lora_lab.errors": [name for name, x in vars(lora_lab.errors).items() if inspect.isclass(x)],
    }
    specs = {part for kind in (*METHODS.values(), *CONTROLLERS.values()) for part in (kind, kind.Spec)}
    pages, seen = {}, set(specs)
    for place, names in public.items():
        module = __import__(place, fromlist=["_"])
        parts = [f"# {place}", prose(inspect.getdoc(module) or "")]
        for name in names:
            thing = getattr(module, name)
            if not (inspect.isclass(thing) or inspect.isfunction(thing)):
                parts.append(f"```{{eval-rst}}\n.. autodata:: {place}.{name}\n   :no-value:\n```")
            elif thing not in seen:
                seen.add(thing)
                kind = "class" if inspect.isclass(thing) else "function"
                members = "\n   :members:" if kind == "class" else ""
                parts.append(f"```{{eval-rst}}\n.. auto{kind}:: {place}.{name}{members}\n```")
        pages[f"reference/{place}"] = "\n\n".join(parts) + "\n"
    lead = "The names to import, by the place to import them from. Names that are not listed here may change."
    pages["reference/index"] = f"# Reference\n\n{lead}\n\n{toctree(public)}"
    return pages


def toctree(names, hidden: bool = False) -> str:
    """Returns a table of contents of documents next to the page."""
    option = ":hidden:\n" if hidden else ":maxdepth: 1\n"
    return f"```{{toctree}}\n{option}\n" + "\n".join(names) + "\n```\n"


def kind_of(text: str) -> str:
    """Returns a type as a reader of YAML says it: the values to choose from, or the Python type."""
    return " or ".join(f"`{part.strip(' ')}`" for part in text.replace('"', "").split("|")).replace(
        "`None`", "`null`"
    )


def linked(text: str) -> str:
    """Escapes a line, or makes a list of methods or controllers, and arXiv ids, links."""
    pages = {name: f"../{group(found)}/{name}.md" for name, found in known().items()}
    names = text.split(", ")
    if set(names) <= pages.keys():
        return ", ".join(f"[`{name}`]({pages[name]})" for name in names)
    return re.sub(r"arXiv:(\d+\.\d+)", rf"[arXiv:\1]({ARXIV}\1)", prose(text))


def prose(text: str) -> str:
    """Escapes what Markdown would take for markup outside code, and fences what is indented."""
    blocks: list[str] = []
    for paragraph in text.split("\n\n"):
        if paragraph.startswith("    ") and blocks and blocks[-1].endswith("\n```"):
            blocks[-1] = f"{blocks[-1].removesuffix('```')}\n{dedent(paragraph)}\n```"
        elif paragraph.startswith("    "):
            blocks.append(f"```text\n{dedent(paragraph)}\n```")
        else:
            parts = paragraph.split("`")
            parts[::2] = [re.sub(r"([*_<\[\]|])", r"\\\1", part) for part in parts[::2]]
            blocks.append("`".join(parts))
    return "\n\n".join(blocks)
