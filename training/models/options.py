"""Options that a run loads its models with."""

from dataclasses import dataclass

import torch

from training.stage_config import LoraSettings, RunConfig, StageConfig


def precision(config: RunConfig) -> torch.dtype:
    """The data type of weights and computation."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else torch.float32


@dataclass(frozen=True)
class LoadOptions:
    """What the loading functions need to know besides the model itself."""

    dtype: torch.dtype = torch.float32
    packing: bool = False
    """Compute several short sequences in one row."""
    dropout: bool = False
    """Keep the model's dropout. It must be off wherever log-probabilities are compared."""
    gradient_checkpointing: bool = False
    lora: LoraSettings | None = None
    """Train an adapter and, of the model itself, only a classification head."""

    @property
    def noise_is_wanted(self) -> bool:
        """Whether two passes in training mode shall differ."""
        return self.dropout or (self.lora is not None and self.lora.lora_dropout > 0)

    @classmethod
    def trained(cls, config: StageConfig, dropout: bool = False) -> "LoadOptions":
        """The options for a model that the stage trains."""
        return cls(
            precision(config), config.packing, dropout, config.gradient_checkpointing, config.lora
        )

    @classmethod
    def frozen(cls, config: RunConfig) -> "LoadOptions":
        """The options for a model that only scores or draws."""
        return cls(precision(config), config.packing)


PLAIN = LoadOptions()
"""float32, nothing trained, nothing packed."""
