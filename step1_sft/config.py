"""Settings of stage 1, supervised fine-tuning."""

from training.stage_config import SupervisedConfig


class SFTConfig(SupervisedConfig):
    """Fine-tunes a causal language model on responses; the prompt carries no loss."""

    script = "step1_sft"


if __name__ == "__main__":  # what scripts/launch.sh starts
    from training.cli import command

    command(SFTConfig, "step1_sft.main")
