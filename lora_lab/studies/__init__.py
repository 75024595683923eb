"""Studies: many runs that answer one question, `lora-lab ablate STUDY.yaml`.

spec        what the file may say
cells       from the file to composed configs, with every fault of every cell in one message
matching    sizes at which methods train equally many parameters
tuning      each cell's search on validation, before the comparison
executors   where runs run: in local processes that stay alive
clusters    the same on Ray and Slurm
results     what is stored of a study: results.csv, validations.csv, …
ablation    a study from its lock to its end
"""

from lora_lab.studies.ablation import ablate
from lora_lab.studies.cells import Cell, Study, read_study

__all__ = ["Cell", "Study", "ablate", "read_study"]
