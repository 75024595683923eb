"""A multi-layer perceptron as a model of `transformers`, which this module registers under the type `MLP`."""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_lab.models.tiny import TINY

MLP = "lora_lab_mlp"


class MultiLayerPerceptronConfig(PretrainedConfig):
    """Config of `MultiLayerPerceptron`.

    Args:
        sizes: Width of the input and of each hidden layer; the output has `num_labels`.
        **kwargs: The common fields of transformers, whose loading code requires this.
    """

    model_type = MLP

    def __init__(self, sizes: list[int] | None = None, **kwargs: Any):
        self.sizes = list(TINY["mlp"]["sizes"] if sizes is None else sizes)
        super().__init__(**kwargs)


class MultiLayerPerceptron(PreTrainedModel):
    """Linear layers `layer1`, `layer2`, ... with ReLU between: the smallest model for testing an adapter.

    Args:
        config: The widths.
    """

    config_class = MultiLayerPerceptronConfig
    main_input_name = "features"

    def __init__(self, config: MultiLayerPerceptronConfig):
        super().__init__(config)
        sizes = [*config.sizes, config.num_labels]
        for number, (width_in, width_out) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
            self.add_module(f"layer{number}", nn.Linear(width_in, width_out))
        self.post_init()  # type: ignore[no-untyped-call]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
            nn.init.zeros_(module.bias)

    def forward(self, features: Tensor) -> SequenceClassifierOutput:
        """Maps features (batch, sizes[0]) to an output with `logits`, (batch, num_labels)."""
        hidden = features
        for number in range(1, len(self.config.sizes) + 1):
            hidden = self.get_submodule(f"layer{number}")(hidden if number == 1 else hidden.relu())
        return SequenceClassifierOutput(logits=hidden)


AutoConfig.register(MLP, MultiLayerPerceptronConfig, exist_ok=True)
AutoModelForSequenceClassification.register(MultiLayerPerceptronConfig, MultiLayerPerceptron, exist_ok=True)
