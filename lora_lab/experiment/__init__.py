"""One tracked run, from config to record: the whole data flow on one screen.

The other modules: the run's folder and its owner, its record, its callbacks.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from rich.progress import track
from torch import Tensor, nn

from lora_lab.adapters import AdapterSet, inject
from lora_lab.adapters.lineage import Lineage, base_lineage, same_base
from lora_lab.adapters.storage import load_adapter, read_label_names, save_adapter, stored_lineage
from lora_lab.config.compose import compose
from lora_lab.config.schema import ExperimentConfig
from lora_lab.data import TaskData
from lora_lab.errors import CheckpointError, ConfigError, IncompatibleError
from lora_lab.experiment.callbacks import RunCallbacks as _Callbacks, progress_bars
from lora_lab.experiment.environment import process_rank
from lora_lab.experiment.folder import RunFolder
from lora_lab.experiment.libraries import quiet_libraries
from lora_lab.experiment.life import RunResult, open_run
from lora_lab.experiment.loaded import LoadedData
from lora_lab.models.architectures import position_limit
from lora_lab.models.build import build_model
from lora_lab.models.quantization import forget_weights
from lora_lab.tasks import TASKS
from lora_lab.training.module import FineTuner
from lora_lab.training.trainer import trainer_arguments

__all__ = ["RunResult", "build_parts", "evaluate", "quiet_libraries", "run", "run_all"]

log = logging.getLogger(__name__)


def run(
    config: ExperimentConfig, resume: bool = True, overwrite: bool = False, loaded: LoadedData | None = None
) -> RunResult:
    """Trains, evaluates and records one run.

    A finished run of the same config and data is returned as it is; an unfinished one continues from its
    last checkpoint, or from the start if it has none. After Ctrl-C, SIGTERM, SIGHUP or SIGUSR1 a run writes a
    checkpoint before it ends.

    Args:
        config: what to run.
        resume: False refuses to continue an unfinished run.
        overwrite: delete an earlier run in the same folder first.
        loaded: data of earlier runs of this process.

    Raises:
        LabError: if anything in config, data, model or run folder is wrong; nothing is written then.
        Interruption, KeyboardInterrupt: if the process was asked to end; the run's status is `interrupted`.
    """
    quiet_libraries()
    with open_run(config, resume, overwrite) as this:
        L.seed_everything(config.seed, workers=True, verbose=False)
        data = (loaded or LoadedData()).of(config)
        this.check_data(data)
        if this.finished:
            check_base(this.folder, config, folder_base(config, data))
            return this.finished
        model = build_base(config, data, keep_weights=config.adapter.reads_full_weights)
        adapters = inject(model, config.adapter, config.seed)
        forget_weights(model)
        module = FineTuner(
            model.train(),
            adapters,
            config.model.task,
            data.num_labels,
            config.optimization,
            config.trainer.on_nonfinite,
            config.trainer.monitor,
            data.class_weights(),
            config.trainer.max_skipped_steps,
        )
        _prepare_model(model, config)
        batches = data.batches_per_epoch(config.trainer.devices)
        callbacks = _Callbacks.build(config, adapters, batches, this.folder, this.stop)
        trainer = L.Trainer(
            **trainer_arguments(config.trainer, config.optimization.gradient_clip),
            callbacks=callbacks.everything(progress_bars(config)),
            logger=this.start(adapters, data),
            default_root_dir=this.folder.path,
        )
        # Heads must start equally in every process; what is drawn from here on (dropout) must differ.
        L.seed_everything(config.seed + process_rank(), workers=True, verbose=False)
        trainer.fit(module, data, ckpt_path=this.checkpoint, weights_only=True)
        metrics = _final_metrics(trainer, module, data, callbacks)
        if trainer.is_global_zero:
            this.release_space()
            base, task = config.model.source().public_name, TASKS[config.model.task]
            lineage = this.lineage(data)
            save_adapter(adapters, this.folder.adapter, base, task.peft_type, data.label_names, lineage)
        return this.finish(trainer, callbacks, metrics)


def run_all(configs: Iterable[ExperimentConfig]) -> Iterator[tuple[ExperimentConfig, RunResult]]:
    """Yields each config with its run, under one progress bar.

    Finished runs are not trained again, interrupted ones continue. Set `trainer.progress_bar=false` in the
    configs, to have no other bars.
    """
    for config in track(list(configs), "runs"):
        yield config, run(config)


def evaluate(
    path: str | os.PathLike[str], overrides: Sequence[str] = (), any_base: bool = False
) -> dict[str, float]:
    """Loads a finished run's adapter into its base model and evaluates it.

    Args:
        path: the run's folder.
        overrides: `key=value` settings that override the run's config, such as another data set.
        any_base: whether the base may have other weights than that of the run.

    Returns:
        The metrics, `validation/…` and `test/…`.

    Raises:
        LabError: if the folder holds no finished run, or a setting is invalid.
    """
    quiet_libraries()
    folder, config = open_evaluation(path, overrides)
    L.seed_everything(config.seed, workers=True, verbose=False)
    data = evaluation_data(folder, config)
    model = build_base(config, data)
    adapters = load_adapter(model, folder.adapter, any_base)
    return measure(model, adapters, config, data)


def open_evaluation(
    path: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[RunFolder, ExperimentConfig]:
    """Returns a finished run's folder, and its config with settings for an evaluation.

    Raises:
        LabError: if the folder holds no finished run, or a setting is invalid or cannot act.
    """
    folder = RunFolder(Path(path))
    folder.finished()
    config = folder.stored_config(overrides)
    own = compose(folder.config, stored=True)
    for part in ("adapter", "controllers", "optimization", "tracking"):
        if getattr(config, part) != getattr(own, part):
            raise ConfigError(
                f"command line: {part}: an evaluation uses the stored adapter as it is and trains and logs "
                f"nothing, so no setting of {part} can act; remove it, or train another run with it."
            )
    return folder, config


def evaluation_data(folder: RunFolder, config: ExperimentConfig) -> TaskData:
    """Builds the data that a finished run is evaluated on. Warns if they have changed since its training.

    Raises:
        LabError: if the data or the tokenizer cannot be used.
    """
    data = LoadedData().of(config, read_label_names(folder.adapter))
    own = compose(folder.config, stored=True)
    if config.data == own.data and data.fingerprint != folder.finished().get("data_fingerprint"):
        log.warning(
            "%s: its data, or their splits, have changed since it was trained. Scores on rows that it was "
            "trained on mean little.",
            folder.path,
        )
    return data


def measure(
    model: nn.Module, adapters: AdapterSet, config: ExperimentConfig, data: TaskData
) -> dict[str, float]:
    """Returns an adapted model's metrics on the validation and test data."""
    module = FineTuner(
        model.eval(),
        adapters,
        config.model.task,
        data.num_labels,
        config.optimization,
        class_weights=data.class_weights(),
    )
    arguments = trainer_arguments(config.trainer, None)
    trainer = L.Trainer(**arguments, logger=False, callbacks=progress_bars(config))
    metrics: dict[str, float] = {}
    for split, loader in {"validate": data.val_dataloader(), "test": data.test_dataloader()}.items():
        if loader is not None:
            metrics |= getattr(trainer, split)(module, data, verbose=False)[0]
    return {name: float(value) for name, value in metrics.items()}


def build_parts(
    config: ExperimentConfig, keep_weights: bool = False, label_names: Sequence[str] = ()
) -> tuple[nn.Module, TaskData]:
    """Builds the model, not yet adapted, and its data.

    Args:
        config: what to build.
        keep_weights: as in `build_model`.
        label_names: as in `build_data`.
    """
    data = LoadedData().of(config, label_names)
    return build_base(config, data, keep_weights), data


def build_base(config: ExperimentConfig, data: TaskData, keep_weights: bool = False) -> nn.Module:
    """Builds the model of a run, not yet adapted.

    Args:
        config: of the run.
        data: of the run.
        keep_weights: as in `build_model`.

    Raises:
        ConfigError: if the model has no positions for the data's length.
    """
    model = build_model(config.model, data.num_labels, keep_weights, data.label_names)
    length, name = config.data.max_length, config.model.name
    limit, meant = position_limit(model), getattr(model.config, "max_position_embeddings", None)
    if limit is not None and length > limit:
        raise ConfigError(
            f"data.max_length: {name} has positions for {limit} tokens; got {length}; set it to {limit} or "
            "less."
        )
    if limit is None and isinstance(meant, int) and length > meant:
        log.warning("data.max_length: %s was made for %d tokens, not for %d.", name, meant, length)
    return model


def folder_base(config: ExperimentConfig, data: TaskData) -> Lineage:
    """Returns the lineage of a base that is a folder, as it is now; {} for others, which stay the same."""
    return base_lineage(build_base(config, data)) if Path(config.model.name).is_dir() else {}


def check_base(folder: RunFolder, config: ExperimentConfig, today: Lineage) -> None:
    """Checks that a finished run was trained on the weights that its base has now.

    Args:
        folder: of the run.
        config: of the run.
        today: what `folder_base` returns for it.

    Raises:
        CheckpointError: if it was trained on others.
    """
    if not same_base(stored_lineage(folder.adapter).get("base") or {}, today):
        raise CheckpointError(
            f"{folder.path}: its run was trained on other weights than those that are now in "
            f"{config.model.name}. Choose another name=… or run=…, or restore the former files."
        )


def _prepare_model(model: Any, config: ExperimentConfig) -> None:
    if config.trainer.gradient_checkpointing:
        if not getattr(model, "supports_gradient_checkpointing", False):
            raise IncompatibleError(
                f"trainer.gradient_checkpointing: {config.model.name} does not support it."
            )
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if config.trainer.compile:
        model.compile()


def _final_metrics(
    trainer: L.Trainer, module: FineTuner, data: TaskData, callbacks: _Callbacks
) -> dict[str, Tensor | float]:
    """Returns the last metrics of training, and those of the run's final adapters."""
    metrics: dict[str, Tensor | float] = dict(trainer.callback_metrics)
    if callbacks.best.metrics_are_old(trainer):
        metrics |= trainer.validate(module, data, verbose=False)[0]
    if data.test_dataloader() is not None:
        metrics |= trainer.test(module, data, verbose=False)[0]
    return metrics
