"""Steps of real trainers, and what they must be by brute force: one unpadded example after the other.

As a script it measures the cases of two processes, of which it is one: `step_cases.py <folder>`.
"""

import itertools
import json
import random
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import lightning as L
import torch
import torch.nn.functional as F

from lora_lab.adapters import inject
from lora_lab.adapters.methods.hra import HRASpec
from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.data import build_data
from lora_lab.data.files import FilesConfig
from lora_lab.data.toy import ToyConfig
from lora_lab.models.build import ModelConfig, build_model, build_tokenizer
from lora_lab.training.module import FineTuner
from lora_lab.training.optimization import OptimizationConfig
from lora_lab.training.trainer import TrainerConfig, trainer_arguments

ROWS, VALIDATED, GLOBAL_BATCH = 17, 7, 4
"""17 rows in batches of 4 end with a single row, which one of two processes has to do without."""


@dataclass(frozen=True)
class Case:
    task: str
    accumulate: int
    processes: int
    padding: str = "right"
    precision: str = "32-true"
    model: str = "gpt2"
    prompts: bool = False
    penalty: bool = False
    weights: bool = False

    def __str__(self) -> str:
        """Returns a name for the test."""
        extra = "-prompts" * self.prompts + "-penalty" * self.penalty + "-weights" * self.weights
        spread = f"{self.processes}_processes-accumulate_{self.accumulate}"
        return f"{self.task}-{self.model}-{spread}-{self.padding}-{self.precision}{extra}"

    @property
    def evaluation_batch(self) -> int:
        return {1: 1, 3: 3, 4: 64}[self.accumulate]


MODELS = {"sequence_classification": "gpt2", "regression": "bert", "causal_lm": "gpt2"}
CASES = [
    *(
        Case(task, accumulate, processes, padding, precision, model)
        for (task, model), accumulate, processes, padding, precision in itertools.product(
            MODELS.items(), (1, 3, 4), (1, 2), ("right", "left"), ("32-true", "bf16-mixed")
        )
        # Two processes take their time to agree; what half precision adds is the same at each window.
        if processes == 1 or precision == "32-true" or (accumulate, padding) == (4, "left")
    ),
    *(Case("causal_lm", 4, n, padding, prompts=True) for n in (1, 2) for padding in ("right", "left")),
    *(Case("regression", accumulate, n, model="mlp", penalty=True) for n in (1, 2) for accumulate in (1, 3)),
    *(Case("sequence_classification", a, n, weights=True) for n in (1, 2) for a in (1, 3, 4)),
]
WEIGHTS = [0.05, 3.0, 0.25]
"""Of classes; a batch may weigh less than one label without weights."""


def write_rows(folder: Path) -> None:
    chance = random.Random(3)
    for split, count in (("train", ROWS), ("validation", VALIDATED)):
        rows = [
            {
                "ask": "?" * chance.randint(0, 9),
                "text": "".join(chance.choices("abcdefgh", k=chance.choice([1, 2, 3, 20, 45]))) + str(number),
                "class": "abc"[number % 3],
                "number": chance.gauss(0, 2),
            }
            for number in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def build(case: Case, folder: Path):
    """Returns the module and the data of a case; the same weights for all cases of one model."""
    torch.manual_seed(0)
    quiet = {
        "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
        "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        "mlp": {},
    }
    model_config = ModelConfig(name=f"random:{case.model}", task=case.task, config=quiet[case.model])
    sizes = {"batch_size": GLOBAL_BATCH // case.processes, "evaluation_batch_size": case.evaluation_batch}
    if case.model == "mlp":
        limits = {"train_limit": ROWS, "validation_limit": VALIDATED, "test_limit": VALIDATED}
        data = build_data(ToyConfig(target="product", size=ROWS, **limits, **sizes), None, case.task, 0)
    else:
        tokenizer = build_tokenizer(model_config)
        tokenizer.padding_side = case.padding
        label = {"sequence_classification": "class", "regression": "number", "causal_lm": None}[case.task]
        paths = {split: str(folder / f"{split}.jsonl") for split in ("train", "validation")}
        config = FilesConfig(**paths, label=label, prompt="ask" if case.prompts else None, **sizes)
        data = build_data(config, tokenizer, case.task, 0)
    model = build_model(model_config, data.num_labels)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)  # positions and neighbours are to matter
    if case.penalty:
        spec = HRASpec(rank=2, targets=["layer1", "layer2"], reg_lambda=0.3)
    else:
        targets = {"gpt2": ["up", "down"], "bert": ["query", "value"]}[case.model]
        spec = LoRASpec(rank=2, targets=targets, modules_to_save=[])
    adapters = inject(model, spec, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapters.trainable_parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    # Steps so small that every step has the gradients of the same weights.
    still = OptimizationConfig(learning_rate=1e-30, gradient_clip=None, warmup=0.0, schedule="constant")
    weights = WEIGHTS if case.weights else None
    module = FineTuner(model.train(), adapters, case.task, data.num_labels, still, class_weights=weights)
    return module, data


class Catch(L.Callback):
    """Keeps what callbacks see before each step, and what is logged of it."""

    def __init__(self):
        self.gradients, self.losses, self.logged = [], [], []

    def on_before_optimizer_step(self, trainer, module, optimizer):
        parameters = module.adapters.trainable_parameters()
        self.gradients.append(torch.cat([p.grad.flatten().clone() for p in parameters]))
        self.losses.append(float(module.step_loss()))

    def on_train_batch_end(self, trainer, module, *_):
        if len(self.logged) < trainer.global_step:
            names = ("train/loss", "train/penalty")
            self.logged.append([float(trainer.logged_metrics[name]) for name in names])


def measure(case: Case, folder: Path) -> dict:
    """Trains an epoch and validates."""
    module, data = build(case, folder)
    catch = Catch()
    config = TrainerConfig(
        max_epochs=1,
        accumulate=case.accumulate,
        devices=case.processes,
        precision=case.precision,
        accelerator="cpu",
        log_every=1,
        progress_bar=False,
    )
    trainer = L.Trainer(**trainer_arguments(config, None), callbacks=[catch], logger=False)
    trainer.fit(module, data)
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    return {
        "gradients": torch.stack(catch.gradients),
        "losses": catch.losses,
        "logged": catch.logged,
        "metrics": {name: value for name, value in metrics.items() if name.startswith("validation/")},
    }


def by_hand(
    module: FineTuner, task: str, example: dict, weights: bool
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Returns an example's sum of losses, its number of labels or weight, and what it predicts of them."""
    given = {
        name: x[None] for name, x in example.items() if name in ("input_ids", "token_type_ids", "features")
    }
    logits, labels = module.model(**given).logits[0], example["labels"]
    if task == "sequence_classification":
        weight = WEIGHTS[labels] if weights else 1
        return -weight * F.log_softmax(logits, -1)[labels], weight, logits.argmax()
    if task == "regression":
        return (logits.squeeze() - labels.squeeze()) ** 2, 1, logits.squeeze()
    learned = [at for at in range(1, len(labels)) if labels[at] != -100]
    chances = F.log_softmax(logits, -1)
    return -sum(chances[at - 1, labels[at]] for at in learned), len(learned), logits.argmax(-1)


@cache
def expected(
    task: str, model: str, prompts: bool, penalty: bool, folder: Path, weights: bool = False
) -> dict:
    """Returns the gradient, loss and count of each training example, and the metrics of validation."""
    module, data = build(Case(task, 1, 1, model=model, prompts=prompts, penalty=penalty), folder)
    parameters = list(module.adapters.trainable_parameters())
    train, validation = data.splits["train"].examples, data.splits["validation"].examples
    found = {"gradients": [], "losses": [], "counts": [], "lengths": data.splits["train"].lengths}
    for index in range(ROWS):
        loss, count, _ = by_hand(module, task, train[index], weights)
        gradient = torch.autograd.grad(loss, parameters)
        found["gradients"].append(torch.cat([g.flatten() for g in gradient]))
        found["losses"].append(loss.item())
        found["counts"].append(count)
    found["penalty"], found["penalty_gradient"] = 0.0, 0.0
    if penalty:
        value = module.adapters.penalty()
        gradient = torch.autograd.grad(value, parameters)
        found["penalty"] = value.item()
        found["penalty_gradient"] = torch.cat([g.flatten() for g in gradient])
    with torch.no_grad():
        rows = [by_hand(module, task, validation[index], weights) for index in range(VALIDATED)]
    loss = sum(float(loss) for loss, _, _ in rows) / sum(count for _, count, _ in rows)
    found["metrics"] = {"validation/loss": loss}
    labels = [validation[index]["labels"] for index in range(VALIDATED)]
    if task == "sequence_classification":
        right = [bool(answer == label) for (_, _, answer), label in zip(rows, labels, strict=True)]
        found["metrics"]["validation/accuracy"] = sum(right) / VALIDATED
    elif task == "regression":
        answers = torch.stack([answer for _, _, answer in rows])
        pair = torch.stack([answers, torch.stack(labels).flatten()])
        found["metrics"]["validation/mse"] = loss
        found["metrics"]["validation/mae"] = float((pair[0] - pair[1]).abs().mean())
        found["metrics"]["validation/pearson"] = float(torch.corrcoef(pair)[0, 1])
    else:
        found["metrics"]["validation/perplexity"] = float(torch.tensor(loss).exp())
    return found


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    measured = {str(case): measure(case, folder) for case in CASES if case.processes == 2}
    rank = torch.distributed.get_rank()
    torch.save(measured, folder / f"measured_{rank}.pt")
