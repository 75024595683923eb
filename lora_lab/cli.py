"""The command line: `lora-lab train | evaluate | ablate | merge | export | …`; `_parser` has them all."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lora_lab.documents.console import plain_console
from lora_lab.errors import ConfigError, DivergenceError, LabError, suggest
from lora_lab.training.stopping import Interruption

if TYPE_CHECKING:
    from lora_lab.studies.executors import Executor

NO_CONFIG = """train: needs the YAML file of an experiment.

One comes with the repository; settings after it override those of the file:

  lora-lab train experiments/quickstart/experiment.yaml adapter.rank=4 seed=1

The smallest one names a model, data and a method:

  model: {name: random:mlp, task: regression}
  data: {source: toy}
  adapter: {method: lora, targets: all-linear}

lora-lab describe trainer (or model, data …) lists the settings of each part."""
"""What `lora-lab train` without arguments says."""


ANY_BASE = "allow a base of other weights than those that the adapter was trained on"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command.

    Returns:
        0; 2 after an error, of which one message is printed; 3 after a diverged training; 130 after Ctrl-C,
        129 if the terminal was closed, 143 after SIGTERM and the signals of schedulers.
    """
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse ends a list of positional arguments at the first flag; settings may also come after flags.
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # forked loader workers would warn about it
    # A process that tracks runs passes on its W&B service; a run killed there would leave its id in use.
    os.environ.pop("WANDB_SERVICE", None)
    # A process that the first process of a run has started must not exit with an error if all end in the same
    # way: the launcher would kill the first process.
    follows = os.environ.get("LOCAL_RANK", "0") != "0"
    try:
        options.command(options)
    except LabError as error:
        if follows and isinstance(error, DivergenceError):
            return 0
        plain_console(stderr=True).print("error: ", style="bold red", end="")
        print(error, file=sys.stderr)
        return error.exit_code
    except (KeyboardInterrupt, Interruption) as error:
        if follows:
            return 0
        again = "; the same command continues" if options.command in (_train, _ablate) else ""
        plain_console(stderr=True).print(f"interrupted{again}")
        return error.code if isinstance(error, Interruption) else 128 + signal.SIGINT
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-lab", description="Parameter-efficient fine-tuning as experiments."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    train = commands.add_parser("train", help="train, evaluate and record one run")
    train.add_argument("config", metavar="CONFIG", nargs="?", help="the experiment's YAML file")
    train.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over the file, adapter.rank=4"
    )
    train.add_argument("--print-config", action="store_true", help="print the composed config and stop")
    what = train.add_mutually_exclusive_group()
    what.add_argument(
        "--resume",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="continue an unfinished run from its last checkpoint (the default), or refuse to",
    )
    what.add_argument("--overwrite", action="store_true", help="delete an earlier run of the same name first")
    train.set_defaults(command=_train)

    evaluate = commands.add_parser("evaluate", help="evaluate a finished run's adapter again, or a mixture")
    evaluate.add_argument(
        "run", metavar="RUN[+RUN…]", help="the run's folder; or several: their mixture, on the data of each"
    )
    evaluate.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings over the run's own config"
    )
    evaluate.add_argument("--weights", type=float, nargs="+", help="of a mixture, one for each (a mean)")
    evaluate.add_argument("--any-base", action="store_true", help=ANY_BASE)
    evaluate.set_defaults(command=_evaluate)

    report = commands.add_parser("report", help="show what a study or any runs have found")
    report.add_argument(
        "paths",
        nargs="+",
        type=Path,
        metavar="STUDY|RUN",
        help="the folder of one study; or folders of runs, or folders that hold some",
    )
    report.add_argument("--html", type=Path, metavar="FILE", help="one page that needs no network")
    report.add_argument("--markdown", type=Path, metavar="FILE", help="the same, with figures next to it")
    report.add_argument("--csv", type=Path, metavar="FILE", help="a row for each cell")
    report.set_defaults(command=_report)

    source = "the folder of a finished run, or of an adapter"
    merge = commands.add_parser("merge", help="write base and adapter as one plain model")
    merge.add_argument("source", metavar="RUN|ADAPTER", type=Path, help=source)
    merge.add_argument("--out", type=Path, required=True, help="the new model's folder")
    _add_base(merge)
    merge.add_argument("--dtype", help="type of the weights: float32, bfloat16, float16 (the run's)")
    merge.add_argument("--rank", type=int, help="the most components of a module's update (all)")
    merge.add_argument("--shard-size", default="5GB", help="size of the largest file (%(default)s)")
    merge.set_defaults(command=_merge)

    export = commands.add_parser("export", help="write an adapter as plain LoRA, or as PEFT has it")
    export.add_argument("source", metavar="RUN|ADAPTER", type=Path, help=source)
    export.add_argument("--out", type=Path, required=True, help="the new adapter's folder")
    export.add_argument(
        "--as", dest="form", choices=("lora", "peft"), default="lora", help="the form (%(default)s)"
    )
    _add_size(export)
    export.add_argument("--active-rank", type=int, help="the rank of a method of nested ranks (dylora)")
    _add_base(export)
    export.set_defaults(command=_export)

    imported = commands.add_parser("import", help="write an adapter file of kohya-ss or LyCORIS as a folder")
    imported.add_argument("file", metavar="FILE", type=Path, help="the safetensors file")
    imported.add_argument("--base", metavar="MODEL", required=True, help="the base model, as model.name")
    imported.add_argument("--out", type=Path, required=True, help="the new adapter's folder")
    imported.add_argument("--prefix", metavar="NAME", help="of this base's keys, lora_te (the only one)")
    imported.set_defaults(command=_import)

    combine = commands.add_parser("combine", help="mix several adapters of one base into one LoRA")
    combine.add_argument("sources", metavar="RUN|ADAPTER", type=Path, nargs="+", help=source)
    combine.add_argument("--out", type=Path, required=True, help="the new adapter's folder")
    combine.add_argument(
        "--method",
        default="weighted",
        help="weighted, cat, svd, ties, dare, magnitude_prune, as in their papers; what PEFT computes under "
        "such names is peft_ties, peft_linear, peft_ties_svd, … (of plain LoRA)",
    )
    combine.add_argument("--weights", type=float, nargs="+", help="one for each (a mean without them)")
    _add_size(combine)
    combine.add_argument("--density", type=float, help="share of the numbers that ties, dare, … keep")
    combine.add_argument("--seed", type=int, default=0, help="of dare's draws (%(default)s)")
    combine.add_argument("--heads", type=_heads, help="whose task head: 1, 2, … or average")
    _add_base(combine)
    combine.set_defaults(command=_combine)

    ablate = commands.add_parser("ablate", help="make all runs of a study that are not finished")
    ablate.add_argument("study", metavar="STUDY", type=Path, help="the study's YAML file")
    ablate.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings of the study, seeds=[0,1], or of every run, trainer.max_epochs=1",
    )
    ablate.add_argument("--plan", action="store_true", help="show cells, runs and time, and stop")
    ablate.add_argument("--workers", type=int, default=1, metavar="N", help="runs that are made at once")
    ablate.add_argument(
        "--executor",
        choices=("local", "ray", "slurm"),
        default="local",
        help="where: processes of this machine (the default), a Ray cluster, or one job array of Slurm",
    )
    ablate.add_argument(
        "--address", metavar="HOST:PORT", help="a running Ray cluster, or auto; else one is started here"
    )
    ablate.add_argument(
        "--slurm",
        action="append",
        default=[],
        metavar="key=value",
        help="a parameter of submitit's, timeout_min=60 or slurm_partition=gpu; may be repeated",
    )
    ablate.add_argument(
        "--sweep", type=Path, metavar="FILE", help="write the study as a sweep for `wandb agent`, and stop"
    )
    ablate.add_argument(
        "--run", nargs="+", metavar="key=value", help="make one run alone, cell=NAME seed=N; agents do this"
    )
    ablate.set_defaults(command=_ablate)

    methods = commands.add_parser("methods", help="list methods and controllers")
    methods.set_defaults(command=_methods)

    describe = commands.add_parser(
        "describe", help="explain a method, a controller or a part of the config: formula, fields, example"
    )
    describe.add_argument("name", metavar="NAME", nargs="?", help="without one, list all names")
    describe.set_defaults(command=_describe)

    fetch = commands.add_parser("fetch", help="fetch embedded models and data into the cache")
    fetch.add_argument("assets", nargs="*", metavar="ASSET", help="names; without one, list what there is")
    fetch.set_defaults(command=_fetch)
    return parser


def _add_size(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rank", type=int, help="largest number of components of a module")
    parser.add_argument(
        "--energy", type=float, default=1.0, help="share of each update's squared norm to keep (%(default)s)"
    )


def _add_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", metavar="MODEL", help="the base model, as model.name")
    parser.add_argument("--any-base", action="store_true", help=ANY_BASE)


def _heads(text: str) -> int | str:
    return text if text == "average" else int(text)


# Imports are inside the commands: torch and transformers take seconds to import, and `--help` must be fast.


def _train(options: argparse.Namespace) -> None:
    from dataclasses import asdict

    from lora_lab.documents.reading import yaml_text
    from lora_lab.experiment.continuation import compose_run

    if options.config is None:
        raise ConfigError(NO_CONFIG)
    config = compose_run(options.config, options.overrides)
    if options.print_config:
        print(yaml_text(asdict(config)), end="")
        return
    from lora_lab.experiment import run
    from lora_lab.experiment.environment import process_rank
    from lora_lab.report.terminal import record_table

    result = run(config, resume=options.resume, overwrite=options.overwrite)
    if process_rank() == 0:
        console = plain_console()
        console.print(record_table(result.record))
        if not result.fresh:
            console.print("This run had finished before; --overwrite trains it again.")
        console.print(f"Run folder: {result.folder.path}", soft_wrap=True)


def _evaluate(options: argparse.Namespace) -> None:
    runs = options.run.split("+")
    if len(runs) > 1 and not Path(options.run).exists():
        from lora_lab.experiment.mixtures import evaluate_mixture
        from lora_lab.report.terminal import mixture_table

        settings = options.weights, options.overrides, options.any_base
        plain_console().print(mixture_table(evaluate_mixture(runs, *settings)))
        return
    if options.weights is not None:
        raise ConfigError("--weights: belong to a mixture, RUN+RUN; one run has none.")
    from lora_lab.experiment import evaluate
    from lora_lab.report.terminal import metrics_table

    found = evaluate(options.run, options.overrides, options.any_base)
    plain_console().print(metrics_table(found, options.run))


def _report(options: argparse.Namespace) -> None:
    from lora_lab.report.pages import report

    found = report(options.paths)
    files = {"html": options.html, "markdown": options.markdown, "csv": options.csv}
    found.write(**files)
    console = plain_console()
    console.print(found.terminal(), highlight=False)
    for path in files.values():
        if path:
            console.print(f"Written: {path}", soft_wrap=True, highlight=False)


def _merge(options: argparse.Namespace) -> None:
    from lora_lab.artifacts import merge
    from lora_lab.report.terminal import conversion_table

    size = options.dtype, options.shard_size, options.rank
    made = merge(options.source, options.out, options.base, *size, options.any_base)
    if made.ranks:
        plain_console().print(conversion_table(str(made.folder), made.ranks, made.errors))
    plain_console().print(f"Model folder: {made.folder}", soft_wrap=True)


def _export(options: argparse.Namespace) -> None:
    from lora_lab.artifacts import export
    from lora_lab.report.terminal import conversion_table

    form, limits = options.form, (options.rank, options.energy, options.active_rank)
    made = export(options.source, options.out, form, *limits, options.base, options.any_base)
    plain_console().print(conversion_table(str(made.folder), made.ranks, made.errors))


def _import(options: argparse.Namespace) -> None:
    from lora_lab.artifacts import import_file
    from lora_lab.report.terminal import conversion_table

    made = import_file(options.file, options.out, options.base, options.prefix)
    plain_console().print(conversion_table(str(made.folder), made.ranks, made.errors))


def _combine(options: argparse.Namespace) -> None:
    from lora_lab.artifacts import combine
    from lora_lab.report.terminal import conversion_table

    made = combine(
        options.sources,
        options.out,
        options.weights,
        options.method,
        options.rank,
        options.energy,
        options.density,
        options.seed,
        options.heads,
        options.base,
        options.any_base,
    )
    plain_console().print(conversion_table(str(made.folder), made.ranks, made.errors))


def _ablate(options: argparse.Namespace) -> None:
    if options.workers < 1:
        raise ConfigError(f"--workers: must be at least 1; got {options.workers}")
    for name, kind in (("address", "ray"), ("slurm", "slurm")):
        if getattr(options, name) and options.executor != kind:
            raise ConfigError(f"--{name}: goes with --executor {kind}; got {options.executor}")
    from lora_lab.studies import ablate, read_study
    from lora_lab.studies.ablation import Progress
    from lora_lab.studies.display import plan

    study = read_study(options.study, options.overrides)
    console = plain_console()
    if options.run:
        from lora_lab.studies.sweep import run_one

        console.print(f"Run folder: {run_one(study, options.run).folder.path}", soft_wrap=True)
        return
    if options.sweep:
        from lora_lab.studies.sweep import write_sweep

        write_sweep(study, options.sweep, options.overrides)
        console.print(f"Written: {options.sweep}. Start it: wandb sweep {options.sweep}", soft_wrap=True)
        return
    progress, probed = Progress(study, None), None
    if options.plan and not progress.records:
        from lora_lab.studies.probe import probe

        probed = probe(study)
    for part in plan(progress, options.workers, probed):
        console.print(part, soft_wrap=isinstance(part, str), highlight=False)
    if not options.plan:
        ablate(study, lambda logs: _executor(options, logs), console)


def _executor(options: argparse.Namespace, logs: Path) -> Executor:
    if options.executor == "local":
        from lora_lab.studies.executors import LocalExecutor

        return LocalExecutor(options.workers, logs)
    from lora_lab.studies.clusters import RayExecutor, SlurmExecutor, slurm_options

    if options.executor == "ray":
        return RayExecutor(options.workers, logs, options.address)
    return SlurmExecutor(options.workers, logs, slurm_options(options.slurm))


def _methods(options: argparse.Namespace) -> None:
    from lora_lab.report.terminal import controllers_table, methods_table

    console = plain_console()
    console.print(methods_table())
    console.print(controllers_table())


def _describe(options: argparse.Namespace) -> None:
    from lora_lab.report.descriptions import known
    from lora_lab.report.terminal import description, topics_table

    if options.name is None:
        plain_console().print(topics_table())
    elif options.name in known():
        plain_console().print(description(options.name))
    else:
        raise ConfigError(f"nothing is known about '{options.name}'{suggest(options.name, known())}")


def _fetch(options: argparse.Namespace) -> None:
    from lora_lab.assets import describe, fetch
    from lora_lab.report.terminal import assets_table

    console = plain_console()
    for name in options.assets:
        console.print(f"{name}: {fetch(name)}", soft_wrap=True)
    if not options.assets:
        console.print(assets_table(describe()))
