"""A classifier on the mean of an encoder's tokens, for encoders without a trained pooler."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from lora_lab.errors import CheckpointError


def was_mean_pooled(stored: Mapping[str, Any]) -> bool:
    """Whether the folder of this `config.json` was written from a `PooledEncoder`."""
    return stored.get("lora_lab_pooling") == "mean"


def restore_classifier(model: "PooledEncoder", folder: Path) -> None:
    """Loads the classifier of a folder that was written from a `PooledEncoder` into a model, in place.

    Raises:
        CheckpointError: if it was saved for another number of classes.
    """
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found = {key for key in file.keys() if key.startswith("classifier.")}  # noqa: SIM118
            for key in found:
                parameter = model.get_parameter(key)
                parameter.data.copy_(_same_shape(file.get_tensor(key), parameter, key))


def _head_dropout(config: PretrainedConfig) -> float:
    """Returns the dropout before the architecture's classifier, 0 if it has none."""
    names = ("classifier_dropout", "seq_classif_dropout", "hidden_dropout_prob")
    rates = (getattr(config, name, None) for name in names)
    return next((rate for rate in rates if rate is not None), 0.0)


def _same_shape(saved: Tensor, parameter: Tensor, key: str) -> Tensor:
    if saved.shape != parameter.shape:
        raise CheckpointError(
            f"model.name: {key} was saved with shape {tuple(saved.shape)}, the data need"
            f" {tuple(parameter.shape)}; use data with as many classes or the model it was made from"
        )
    return saved


class PooledEncoder(PreTrainedModel):
    """An encoder, the mean over its unpadded tokens, dropout and one linear classifier.

    The encoder is held under its own prefix ("bert"), so parameters have the names of the architecture's
    model for sequence classification.

    Args:
        config: The encoder's config, with `num_labels`.
        encoder: Bare model without a task head.
    """

    supports_gradient_checkpointing = True
    # Attention is left to the encoder; it has already checked what it supports.
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: PretrainedConfig, encoder: PreTrainedModel):
        super().__init__(config)
        config.lora_lab_pooling = "mean"
        if hasattr(encoder, "pooler"):
            # Not used here: it would count as trainable and get no gradient.
            encoder.register_module("pooler", None)
        self.encoder_name = encoder.base_model_prefix
        self.all_tied_weights_keys = {}
        self.add_module(self.encoder_name, encoder)
        self.dropout = nn.Dropout(_head_dropout(config))
        self.classifier = nn.Linear(config.hidden_size, cast(int, config.num_labels), dtype=encoder.dtype)
        nn.init.normal_(self.classifier.weight, std=getattr(config, "initializer_range", 0.02))
        nn.init.zeros_(self.classifier.bias)
        self._takes_token_types = "token_type_ids" in inspect.signature(encoder.forward).parameters

    @property
    def body(self) -> PreTrainedModel:
        """The encoder, under any prefix."""
        return cast(PreTrainedModel, self.get_submodule(self.encoder_name))

    def get_input_embeddings(self) -> nn.Module:
        """Returns the encoder's token embeddings."""
        return self.body.get_input_embeddings()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput | tuple[Tensor, ...]:
        """Classifies a batch; the arguments are those with which PEFT calls a classifier of transformers.

        Args:
            input_ids: (batch, time)
            attention_mask: (batch, time), 1 for tokens, 0 for padding; None means no padding.
            token_type_ids: (batch, time), for encoders that distinguish the first text from the second.
            inputs_embeds: (batch, time, width), instead of `input_ids`.
            labels: (batch,), classes, or real numbers if the model has one label; adds `loss`.
            output_attentions: add the encoder's attention weights.
            output_hidden_states: add the encoder's hidden states.
            return_dict: False gives the output as a tuple.

        Returns:
            Output with `logits`, (batch, num_labels).
        """
        if attention_mask is None:
            tokens = input_ids if inputs_embeds is None else inputs_embeds[..., 0]
            attention_mask = torch.ones_like(cast(Tensor, tokens))
        inputs: dict[str, Any] = {
            "input_ids": input_ids,
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
        }
        if self._takes_token_types:
            inputs["token_type_ids"] = token_type_ids
        encoded = self.body(**{name: given for name, given in inputs.items() if given is not None})
        hidden = encoded.last_hidden_state  # (batch, time, width)
        mask = attention_mask.unsqueeze(-1).to(hidden)  # (batch, time, 1)
        mean = (hidden * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (batch, width)
        logits = self.classifier(self.dropout(mean))
        output = SequenceClassifierOutput(
            loss=None if labels is None else self._loss(logits, labels),
            logits=logits,
            hidden_states=encoded.hidden_states,
            attentions=encoded.attentions,
        )
        return output.to_tuple() if return_dict is False else output

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if logits.shape[-1] == 1:
            return F.mse_loss(logits.squeeze(-1), labels.to(logits))
        return F.cross_entropy(logits, labels)
