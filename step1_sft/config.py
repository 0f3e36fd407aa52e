"""Settings of stage 1, supervised fine-tuning."""

from training.stage_config import SupervisedConfig


class SFTConfig(SupervisedConfig):
    """Fine-tunes a causal language model on responses; the prompt carries no loss."""
