"""Settings of stage 1, supervised fine-tuning."""

from training.stage_config import SupervisedConfig


class SFTConfig(SupervisedConfig):
    """Fine-tunes a causal language model on responses; the prompt carries no loss."""

    script = "step1_sft"


if __name__ == "__main__":  # for --help, which needs nothing else
    from training.cli import stage_parser

    stage_parser(SFTConfig).parse_args()
