"""Hiding other libraries' advice from the terminal."""

import logging
import warnings

import transformers


def quiet_libraries() -> None:
    """Silences the libraries' advice that our own settings make unnecessary."""
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for message in (
        ".*does not have many workers.*",
        ".*in eval mode at the start of training.*",
        ".*smaller than the logging interval.*",
        ".*LeafSpec.*is deprecated.*",
        ".*broadcast_buffers.* is deprecated.*",  # its successor is missing in torch 2.6
        ".*have overridden `on_after_batch_transfer`.*",
        ".*gradient_checkpointing.* is deprecated.*",  # its successor is missing in transformers 5.0
    ):
        warnings.filterwarnings("ignore", message=message)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
