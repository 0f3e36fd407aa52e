"""Scalar models (reward model, critic) built on Hugging Face's classifiers."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from training.models.families.noise import Quiet
from training.models.hidden_states import hidden_states, takes_positions


class ScalarModel(Quiet):
    """A sequence-classification model with one label: a reward model or a critic."""

    def __init__(self, model: PreTrainedModel, packing: bool = False) -> None:
        super().__init__()
        self.model = model
        self._takes_positions = takes_positions(model.base_model)
        self._packing = packing

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute values [batch, length] float32: the head's scalar after each token."""
        states = hidden_states(
            self.model.base_model, input_ids, attention_mask, self._takes_positions, self._packing
        )
        return self.model.score(states).squeeze(-1)

    def rewards(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Compute rewards [batch]: the scalar after each row's last token."""
        return last_token(self(input_ids, attention_mask), attention_mask)


class Classifier(Quiet):
    """A one-label sequence-classification model of any architecture, called as it is."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, **more: Tensor) -> Tensor:
        """Compute rewards [batch] float32.

        Args:
            input_ids: [batch, length], padded on the right.
            more: further outputs of the model's tokenizer, such as token_type_ids.
        """
        logits = self.model(input_ids=input_ids, attention_mask=attention_mask, **more).logits
        return logits.reshape(len(input_ids)).float()  # [batch, 1], or [batch] of foreign code


class Float32Head(nn.Linear):
    """A linear head with float32 output, whatever the type of its weights.

    bfloat16 resolves a reward of 10 only to 0.06, and preferences depend on differences of rewards.
    """

    @classmethod
    def like(cls, head: nn.Linear) -> "Float32Head":
        """Build a head with the same weights under the same names."""
        own = cls(head.in_features, head.out_features, bias=head.bias is not None)
        own.weight, own.bias = head.weight, head.bias
        return own

    def forward(self, hidden: Tensor) -> Tensor:
        bias = self._parameters["bias"]
        return nn.functional.linear(
            hidden.float(), self.weight.float(), None if bias is None else bias.float()
        )


def last_token(values: Tensor, attention_mask: Tensor) -> Tensor:
    """Select from `values` [batch, length] the entry [batch] at each row's last attended token."""
    columns = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = (columns * attention_mask.long()).argmax(dim=-1)
    return values.gather(1, last.unsqueeze(1)).squeeze(1)
