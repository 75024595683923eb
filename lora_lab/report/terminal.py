"""Tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE
from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.padding import Padding
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from lora_lab.adapters import METHODS
from lora_lab.callbacks import CONTROLLERS
from lora_lab.report.descriptions import REQUIRED, describe, known

if TYPE_CHECKING:  # importing it takes seconds
    from lora_lab.experiment.mixtures import Judged


def record_table(record: Mapping[str, Any]) -> Table:
    """Shows the results of a run."""
    table = _facts(f"{record['experiment']} / {record['run']}")
    trained, total = record["trainable_parameters"], record["total_parameters"]
    table.add_row("trained parameters", f"{trained:,} of {total:,} ({trained / total:.2%})")
    start, end = record["method_parameters"], record["final_method_parameters"]
    table.add_row("of these the method's", f"{start:,}" if end == start else f"{start:,} → {end:,}")
    table.add_row("adapter file", decimal(record["adapter_file_bytes"]))
    for label, name, form in (
        ("rank (mean)", "final_rank_mean", "{:.2f}"),
        ("effective rank (mean)", "effective_rank_mean", "{:.2f}"),
        ("sparsity (mean)", "sparsity_mean", "{:.1%}"),
        ("step (median)", "median_step_milliseconds", "{:.1f} ms"),
        ("tokens per second", "tokens_per_second", "{:,.0f}"),
    ):
        if record.get(name) is not None:
            table.add_row(label, form.format(record[name]))
    table.add_row(f"peak memory ({record['peak_memory_kind']})", f"{record['peak_memory_megabytes']:,.0f} MB")
    table.add_row("time", f"{record['wall_seconds']:.0f} s, {record['steps']} steps")
    table.add_section()
    _add_metrics(table, record["metrics"])
    return table


def metrics_table(metrics: Mapping[str, float], title: str) -> Table:
    """Shows metrics by name."""
    table = _facts(title)
    _add_metrics(table, metrics)
    return table


def mixture_table(judged: Sequence[Judged]) -> Table:
    """Shows, on the data of each run, its own adapter alone and the mixture of all."""
    table = Table(box=SIMPLE)
    table.add_column("data of", overflow="fold")
    table.add_column("metric")
    table.add_column("alone", justify="right")
    table.add_column("mixture", justify="right")
    for source in judged:
        for name, value in sorted(source.alone.items()):
            table.add_row(str(source.path), name, f"{value:.4g}", f"{source.mixture[name]:.4g}")
    return table


def conversion_table(title: str, ranks: Mapping[str, int], errors: Mapping[str, float]) -> Table:
    """Shows the rank of each module in a new adapter, and its error."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    table.add_column("module", overflow="fold")
    table.add_column("rank", justify="right")
    table.add_column("relative error", justify="right")
    for path, rank in ranks.items():
        table.add_row(path, str(rank), f"{errors[path]:.2g}")
    return table


def assets_table(rows: Sequence[Mapping[str, str]]) -> RenderableType:
    """Shows the assets that can be fetched, one block of lines for each."""
    parts: list[RenderableType] = [Text("Embedded models and data", style="italic")]
    for row in rows:
        head = Text.assemble(
            "\n", (row["name"], "bold"), f"  {row['kind']}, {row['download']}, {row['licence']}"
        )
        details = [row["description"], f"from: {row['sources']}", f"cached: {row['cached']}"]
        parts += [head, Padding(Text("\n".join(details)), (0, 0, 0, 4))]
    return Group(*parts)


def methods_table() -> Table:
    """Shows every method: what it does, PEFT's name for it, its paper."""
    table = _overview("Methods", "method", "in PEFT")
    for name, method in METHODS.items():
        found = describe(name)
        table.add_row(name, found.title, method.peft.peft_type or "-", "\n".join(found.papers) or "-")
    return table


def controllers_table() -> Table:
    """Shows every controller: what it does, the protocol it needs, its paper."""
    table = _overview("Controllers", "controller", "needs adapters")
    for name, controller in CONTROLLERS.items():
        found = describe(name)
        needs = controller.Spec().needs().__name__
        table.add_row(name, found.title, needs, "\n".join(found.papers) or "-")
    return table


def topics_table() -> Table:
    """Shows all names that can be described, by kind."""
    kinds: dict[str, list[str]] = {}
    for name, found in known().items():
        kinds.setdefault(found.kind, []).append(name)
    table = Table(
        title="Names for `lora-lab describe NAME`", title_justify="left", show_header=False, box=SIMPLE
    )
    for kind, names in kinds.items():
        table.add_row(kind, ", ".join(names))
    return table


def description(name: str) -> RenderableType:
    """Shows a method, a controller or a part of a config: head, facts, fields, example."""
    found = describe(name)
    parts: list[RenderableType] = [Text(found.title, style="bold")]
    if found.text:
        parts.append(Text(f"\n{found.text}"))
    if found.facts:
        facts = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for label, fact in found.facts.items():
            facts.add_row(Text(label), Text(fact))
        parts += [Text(), facts]
    if found.fields:
        parts.append(Text(f"\nFields of `{found.node}`" if found.node else "\nFields", style="italic"))
    for field in found.fields:
        head = Text.assemble("\n", (field.name, "bold"), f": {field.type}")
        head.append(f" = {field.default}" if field.default != REQUIRED else f" ({REQUIRED})")
        parts.append(head)
        parts.append(Padding(Text(field.meaning), (0, 0, 0, 4)))
    if found.example:
        parts += [
            Text("\nExample:"),
            Syntax(found.example, "yaml", theme="ansi_dark", background_color="default"),
        ]
    return Group(*parts)


def _overview(title: str, kind: str, third: str) -> Table:
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column(kind, no_wrap=True, style="bold")
    table.add_column("what it does", ratio=1)
    table.add_column(third, no_wrap=True)
    table.add_column("arXiv", no_wrap=True)
    return table


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


def _add_metrics(table: Table, metrics: Mapping[str, float]) -> None:
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
