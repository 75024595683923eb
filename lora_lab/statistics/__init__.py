"""What the numbers of a study show: intervals, paired comparisons, equivalence, ranks.

Needs scipy, `pip install 'lora_lab[study]'`.
"""

from lora_lab.errors import IncompatibleError

try:
    import scipy  # noqa: F401
except ModuleNotFoundError as error:
    raise IncompatibleError("the statistics need scipy: pip install 'lora_lab[study]'") from error

from lora_lab.statistics.analysis import Analysis, CellSummary, analyse
from lora_lab.statistics.intervals import Interval, mean_interval
from lora_lab.statistics.metrics import example_values, higher_is_better
from lora_lab.statistics.paired import Comparison, Outcome, compare_paired, detectable_difference, holm
from lora_lab.statistics.resampling import Resampled, rank_interval, resample_seeds

__all__ = [
    "Analysis",
    "CellSummary",
    "Comparison",
    "Interval",
    "Outcome",
    "Resampled",
    "analyse",
    "compare_paired",
    "detectable_difference",
    "example_values",
    "higher_is_better",
    "holm",
    "mean_interval",
    "rank_interval",
    "resample_seeds",
]
