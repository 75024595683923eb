"""One tracked run, from config to record: the whole data flow on one screen."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import transformers
import yaml
from lightning.pytorch.callbacks import RichProgressBar
from lightning.pytorch.loggers import Logger
from torch import nn

from lora_lab.adapters import AdapterSet, inject
from lora_lab.adapters.storage import TENSORS, load_adapter, save_adapter
from lora_lab.callbacks import Controller, build_controllers
from lora_lab.callbacks.adapter_checkpoint import AdapterCheckpoint
from lora_lab.callbacks.adapter_statistics import AdapterStatistics, final_statistics
from lora_lab.callbacks.memory_statistics import MemoryStatistics
from lora_lab.callbacks.resume_checkpoint import ResumeCheckpoint
from lora_lab.callbacks.speed_statistics import SpeedStatistics
from lora_lab.config.compose import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import TaskData, build_data
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.files import write_text
from lora_lab.models.build import build_model, build_tokenizer
from lora_lab.models.quantization import forget_weights
from lora_lab.runs import SCHEMA_VERSION, RunFolder, environment, process_rank
from lora_lab.tracking import build_loggers, close_loggers, read_metrics, replay, wandb_mode
from lora_lab.training.module import FineTuner
from lora_lab.training.trainer import planned_steps, trainer_arguments

PEFT_TASKS = {"sequence_classification": "SEQ_CLS", "regression": "SEQ_CLS", "causal_lm": "CAUSAL_LM"}


@dataclass(frozen=True)
class RunResult:
    """What a run left behind."""

    folder: RunFolder
    record: dict[str, Any]
    fresh: bool
    """Whether this call trained; False where a finished run of this config was found."""


def run(config: ExperimentConfig, resume: bool = False, overwrite: bool = False) -> RunResult:
    """Trains, evaluates and records one run; a finished run of the same config is returned as it is.

    Args:
        config: what to run.
        resume: continue an unfinished run from its last checkpoint, or from the start if it has none.
        overwrite: delete an earlier run in the same folder first.

    Raises:
        LabError: if anything in config, data, model or run folder is at fault; nothing is written then.
    """
    quiet_libraries()
    folder = RunFolder(Path(config.output) / config.name / config.run_name())
    before = _check_folder(folder, config, resume, overwrite)
    if before and before["status"] == "finished":
        return RunResult(folder, before, fresh=False)

    L.seed_everything(config.seed, workers=True, verbose=False)
    model, data = build_parts(config, keep_weights=config.adapter.reads_full_weights)
    adapters = inject(model, config.adapter, config.seed)
    forget_weights(model)
    module = FineTuner(model.train(), adapters, config.model.task, data.num_labels, config.optimization)
    _prepare_model(model, config)

    rows = read_metrics(folder.path) if before else []
    checkpoint = folder.checkpoint if before and folder.checkpoint.is_file() else None
    done_steps = _step_of(checkpoint) if checkpoint else 0
    record = _start_record(config, adapters, data, before)
    statistics = _Callbacks.build(config, adapters, folder)
    total_steps = planned_steps(config.trainer, data.batches_per_epoch(config.trainer.devices))
    for controller in statistics.controllers:
        controller.plan(total_steps)
    wandb_mode(config.tracking)  # raises while nothing is written yet
    if process_rank() == 0:
        _write_start(folder, config, record, afresh=overwrite)
    loggers: list[Logger] = []
    try:
        loggers = build_loggers(config.tracking, folder.path, config.name, config.run_name(), asdict(config))
        trainer = L.Trainer(
            **trainer_arguments(config.trainer, config.optimization.gradient_clip),
            callbacks=statistics.everything(_progress_bars(config)),
            logger=loggers,
            default_root_dir=folder.path,
        )
        if before:
            replay(rows, loggers, done_steps)
        # Heads must start alike in every process; what is drawn from here on (dropout) must not be alike.
        L.seed_everything(config.seed + process_rank(), workers=True, verbose=False)
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
        metrics: dict[str, Any] = dict(trainer.callback_metrics)
        if statistics.best.metrics_are_old(trainer):
            metrics |= trainer.validate(module, data, verbose=False)[0]
        if data.test_dataloader() is not None:
            metrics |= trainer.test(module, data, verbose=False)[0]
        record |= _end_record(trainer, statistics, metrics)
        if trainer.is_global_zero:
            save_adapter(
                adapters, folder.adapter, config.model.source().public_name, PEFT_TASKS[config.model.task]
            )
            record["adapter_file_bytes"] = (folder.adapter / TENSORS).stat().st_size
            folder.write(record)
        close_loggers(loggers)
    except BaseException as error:
        close_loggers(loggers, failed=True)
        reason = (
            "interrupted"
            if isinstance(error, KeyboardInterrupt | SystemExit)
            else f"{type(error).__name__}: {error}"
        )
        if process_rank() == 0:
            folder.write({**record, "status": "failed", "error": reason})
        raise
    return RunResult(folder, record, fresh=True)


def build_parts(config: ExperimentConfig, keep_weights: bool = False) -> tuple[nn.Module, TaskData]:
    """Builds the model, not yet adapted, and its data; `keep_weights` as in `build_model`."""
    tokenizer = build_tokenizer(config.model)
    data = build_data(config.data, tokenizer, config.model.task, config.seed)
    return build_model(config.model, data.num_labels, keep_weights), data


def evaluate(path: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """Loads a finished run's adapter into its base model and evaluates it.

    Args:
        path: the run's folder.
        overrides: `key=value` settings over the run's own config, such as another data set.

    Returns:
        The metrics, `validation/…` and `test/…`.

    Raises:
        LabError: if the folder holds no finished run, or a setting is at fault.
    """
    quiet_libraries()
    folder = RunFolder(path)
    record = folder.read()
    if record is None or record["status"] != "finished":
        state = "no run" if record is None else f"a run whose status is '{record['status']}'"
        raise CheckpointError(f"{path}: holds {state}; name the folder of a finished run.")
    config = compose(folder.config, overrides, stored=True)
    L.seed_everything(config.seed, workers=True, verbose=False)
    model, data = build_parts(config)
    adapters = load_adapter(model, folder.adapter)
    module = FineTuner(model.eval(), adapters, config.model.task, data.num_labels, config.optimization)
    arguments = trainer_arguments(config.trainer, None)
    trainer = L.Trainer(**arguments, logger=False, callbacks=_progress_bars(config))
    metrics: dict[str, float] = {}
    for split, loader in {"validate": data.val_dataloader(), "test": data.test_dataloader()}.items():
        if loader is not None:
            metrics |= getattr(trainer, split)(module, data, verbose=False)[0]
    return {name: float(value) for name, value in metrics.items()}


@dataclass
class _Callbacks:
    """The callbacks of a run."""

    controllers: list[Controller]
    adapters: AdapterStatistics
    memory: MemoryStatistics
    speed: SpeedStatistics
    best: AdapterCheckpoint
    resume: ResumeCheckpoint

    @classmethod
    def build(cls, config: ExperimentConfig, adapters: AdapterSet, folder: RunFolder) -> _Callbacks:
        controllers = build_controllers(config.controllers, adapters, config.seed)
        return cls(
            controllers,
            AdapterStatistics(adapters, controllers),
            MemoryStatistics(adapters),
            SpeedStatistics(),
            AdapterCheckpoint(adapters, config.trainer.keep, controllers),
            ResumeCheckpoint(folder.checkpoint, config.trainer.checkpoint_every),
        )

    def everything(self, bars: list[L.Callback]) -> list[L.Callback]:
        # The statistics stand behind all that changes adapters, at a step's end or at the run's, and the
        # clock stands last.
        return [*self.controllers, self.best, self.adapters, self.memory, *bars, self.resume, self.speed]


def _check_folder(
    folder: RunFolder, config: ExperimentConfig, resume: bool, overwrite: bool
) -> dict[str, Any] | None:
    """Decides what an earlier run in the folder means; returns its record if it goes on or is done."""
    folder.check_writable()
    if process_rank() != 0:
        # The first process has decided and prepared the folder before it started this one.
        return folder.read() if resume else None
    before = None if overwrite else folder.read()
    if before is None:
        if resume:
            raise CheckpointError(f"{folder.path}: holds no run to resume. Leave --resume out to start it.")
        return None
    if before["config_hash"] != config.hash():
        raise ConfigError(
            f"{folder.path}: holds a run of another config. Choose another name with run=…, or --overwrite "
            "it."
        )
    if before["status"] != "finished" and not resume:
        raise CheckpointError(
            f"{folder.path}: holds a run that is {before['status']}. Continue it with --resume, or "
            "--overwrite it."
        )
    return before


def _progress_bars(config: ExperimentConfig) -> list[L.Callback]:
    return [RichProgressBar()] if config.trainer.progress_bar else []


def _prepare_model(model: Any, config: ExperimentConfig) -> None:
    if config.trainer.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise IncompatibleError(f"trainer.gradient_checkpointing: {config.model.name} does not offer it.")
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.trainer.compile:
        model.compile()


def _write_start(folder: RunFolder, config: ExperimentConfig, record: dict[str, Any], afresh: bool) -> None:
    if afresh:
        folder.clear()
    write_text(folder.config, yaml.safe_dump(asdict(config), sort_keys=False))
    folder.checkpoint.parent.mkdir(exist_ok=True)
    folder.write(record)


def _start_record(
    config: ExperimentConfig, adapters: AdapterSet, data: TaskData, before: dict[str, Any] | None
) -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": config.name,
        "run": config.run_name(),
        "status": "running",
        "error": None,
        "method": config.adapter.method,
        "controllers": list(config.controllers),
        "seed": config.seed,
        "config_hash": config.hash(),
        "started": before["started"] if before else datetime.now(UTC).isoformat(timespec="seconds"),
        "resumptions": before["resumptions"] + 1 if before else 0,
        "method_parameters": adapters.trainable_count(saved=False),
        "trainable_parameters": adapters.trainable_count(),
        "total_parameters": adapters.base_count(),
        "data_fingerprint": data.fingerprint,
        **environment(),
    }


def _end_record(trainer: L.Trainer, statistics: _Callbacks, metrics: dict[str, Any]) -> dict[str, Any]:
    return {
        "status": "finished",
        "steps": trainer.global_step,
        "epochs": trainer.current_epoch,
        "wall_seconds": round(statistics.resume.elapsed(), 3),
        "median_step_milliseconds": statistics.speed.median_step_milliseconds,
        "tokens_per_second": statistics.speed.tokens_per_second,
        "peak_memory_megabytes": statistics.memory.peak_megabytes,
        "peak_memory_kind": statistics.memory.peak_kind,
        "final_method_parameters": statistics.adapters.adapters.trainable_count(saved=False),
        **final_statistics(statistics.adapters.rows),
        "best_value": statistics.best.best_value,
        "best_step": statistics.best.best_step,
        "metrics": {
            name: float(value)
            for name, value in metrics.items()
            if name.startswith(("train/", "validation/", "test/"))
        },
    }


def _step_of(checkpoint: Path) -> int:
    try:
        return torch.load(checkpoint, weights_only=True, map_location="cpu")["global_step"]
    except Exception as error:
        raise CheckpointError(
            f"{checkpoint}: cannot be read ({error}). Delete it to train from the start with --resume."
        ) from error


def quiet_libraries() -> None:
    """Silences the libraries' advice that our own settings make moot."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",
        ".*gradient_checkpointing.* is deprecated.*",  # its successor is missing in transformers 5.0
    ):
        warnings.filterwarnings("ignore", message=message)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
