"""Where a run's numbers go: Weights & Biases, online or offline, and always a CSV file."""

from lora_lab.tracking.config import TrackingConfig, wandb_mode
from lora_lab.tracking.history import replay
from lora_lab.tracking.loggers import build_loggers, close_loggers, log_adapter, log_page, summarise
from lora_lab.tracking.metrics_file import MetricsFile, read_metrics

__all__ = [
    "MetricsFile",
    "TrackingConfig",
    "build_loggers",
    "close_loggers",
    "log_adapter",
    "log_page",
    "read_metrics",
    "replay",
    "summarise",
    "wandb_mode",
]
