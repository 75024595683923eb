from .adapters import METHODS as METHODS, Adapter as Adapter, AdapterSet as AdapterSet, inject as inject
from .adapters.storage import load_adapter as load_adapter, save_adapter as save_adapter
from .callbacks import (
    CONTROLLERS as CONTROLLERS,
    Controller as Controller,
    build_controllers as build_controllers,
)
from .config import ExperimentConfig as ExperimentConfig, compose as compose
from .data import DataConfig as DataConfig, TaskData as TaskData, build_data as build_data
from .errors import LabError as LabError
from .experiment import RunResult as RunResult, evaluate as evaluate, run as run
from .models.attention import split_attention as split_attention
from .models.build import (
    ModelConfig as ModelConfig,
    build_model as build_model,
    build_tokenizer as build_tokenizer,
)
from .registry import register as register
from .training.module import FineTuner as FineTuner
from .training.optimization import (
    OptimizationConfig as OptimizationConfig,
    build_optimizer as build_optimizer,
    keep_frozen_parts as keep_frozen_parts,
    parameter_groups as parameter_groups,
)
from .training.trainer import TrainerConfig as TrainerConfig, trainer_arguments as trainer_arguments
