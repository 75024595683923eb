"""Tables in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.filesize import decimal
from rich.markdown import Markdown
from rich.table import Table
from rich.text import Text

from lora_lab.adapters import METHODS
from lora_lab.adapters.protocols import PROTOCOLS
from lora_lab.callbacks import CONTROLLERS
from lora_lab.config.documentation import field_documentation


def record_table(record: Mapping[str, Any]) -> Table:
    """Shows what came of a run."""
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


def assets_table(rows: Sequence[Mapping[str, str]]) -> Table:
    """Shows what can be fetched, one row for each asset."""
    table = Table(title="Embedded models and data", title_justify="left", show_lines=True)
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*row.values())
    return table


def methods_table() -> Table:
    """Shows every method: family, the protocols that protocols, merging, PEFT's name, paper."""
    table = Table(title="Methods", title_justify="left")
    for heading in ("method", "family", "protocols", "merges", "in PEFT", "paper"):
        table.add_column(heading, no_wrap=heading == "method")
    for name, method in METHODS.items():
        offered = ", ".join(protocol.__name__ for protocol in PROTOCOLS if protocol in method.__mro__) or "-"
        merges = "yes" if method.mergeable else "no"
        table.add_row(name, method.family, offered, merges, method.peft.peft_type or "-", method.paper)
    return table


def controllers_table() -> Table:
    """Shows every controller: what adapters have to be for it, the methods that are, paper."""
    table = Table(title="Controllers", title_justify="left", show_lines=True)
    for heading in ("controller", "asks for adapters that are", "methods", "paper"):
        table.add_column(heading, no_wrap=heading == "controller")
    for name, controller in CONTROLLERS.items():
        needs = controller.Spec().needs()
        fitting = ", ".join(method for method, kind in METHODS.items() if issubclass(kind, needs))
        table.add_row(name, needs.__name__, fitting, controller.paper)
    return table


def description(name: str) -> RenderableType:
    """Shows a method, a controller, or both where they share a name: head of the file, fields, example."""
    parts: list[RenderableType] = []
    if name in METHODS:
        parts += _description(METHODS[name], "adapter", f"adapter:\n  method: {name}")
    if name in CONTROLLERS:
        parts += _description(CONTROLLERS[name], f"controllers.{name}", f"controllers:\n  {name}: {{}}")
    return Group(*parts)


def _description(kind: Any, node: str, example: str) -> list[RenderableType]:
    head = (sys.modules[kind.__module__].__doc__ or "").strip()
    table = Table(title=f"Fields of `{node}`", title_justify="left", show_lines=True)
    for heading in ("field", "default", "meaning"):
        table.add_column(heading, no_wrap=heading == "field")
    documentation = field_documentation(kind.Spec)
    for name_of_field, default in asdict(kind.Spec()).items():
        table.add_row(name_of_field, Text(str(default)), Text(documentation.get(name_of_field, "")))
    return [Text(head), Text(), table, Text("\nExample:"), Markdown(f"```yaml\n{example}\n```")]


def _facts(title: str) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="bold")
    table.add_column(justify="right")
    return table


def _add_metrics(table: Table, metrics: Mapping[str, float]) -> None:
    for name, value in sorted(metrics.items()):
        table.add_row(name, f"{value:.4g}")
