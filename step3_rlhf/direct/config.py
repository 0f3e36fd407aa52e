"""Settings of direct optimization."""

from typing import Any, ClassVar

from pydantic import Field

from step3_rlhf.config import AlignmentConfig, RewardSettings
from step3_rlhf.regularizers.registry import REGULARIZERS, RegularizerField
from step3_rlhf.rewards.calibration import CALIBRATED
from training.config import Count, Positive, StrictModel, Variants
from training.data.settings import DataSettings
from training.stage_config import SupervisedConfig

NOT_CALIBRATED = (
    '"calibrated" divides a reward model\'s rewards by their temperature, and here no rewards are '
    "learned from: people's choices are log-odds as they are, so that beta 1 matches them; give "
    "beta as a number"
)


class AnchorSettings(StrictModel):
    """A term that keeps the policy's mass on the compared responses."""

    weight: Positive
    """Factor of −log Σ π(y|x), the sum being over all responses that were compared for the prompt.
    """


class DirectConfig(SupervisedConfig, AlignmentConfig):
    """Aligns the policy with comparisons or rankings, without a reward model."""

    script = "step3_direct"
    variants: ClassVar[Variants] = {"regularizer": REGULARIZERS}

    reward: RewardSettings | None = None
    """Rewards that the evaluation compares the policy with; training needs none. Null leaves the
    figures out that need them."""
    data: DataSettings = Field(examples=[{"sources": ["owner/dataset"]}])
    """Comparisons or rankings to learn from, those of the stage `reward`; and, of the stage `ppo`,
    the held-out prompts of the evaluation."""
    regularizer: RegularizerField = Field(examples=[{"name": "pm"}])
    """The regularizer by its name and parameters, or by {"class": "module:Class"}, whose optimum is
    learned; `kl` is DPO."""
    anchor: AnchorSettings | None = None
    """Keeps the mass of the compared responses up, which comparisons alone leave free; null is
    off."""
    early_stopping_patience: Count | None = None
    """Evaluations in a row without a better loss after which training ends; null never stops early.
    The weights with the best evaluation loss are saved either way."""

    @classmethod
    def _calibrated(cls, data: Any) -> tuple[Any, str]:
        regularizer = data.get("regularizer") if isinstance(data, dict) else None
        if not isinstance(regularizer, dict) or regularizer.get("beta") != CALIBRATED:
            return data, ""
        rest = {name: value for name, value in regularizer.items() if name != "beta"}
        return {**data, "regularizer": rest}, NOT_CALIBRATED

    def faults(self) -> list[str]:
        found = super().faults()
        found += self.reward.mixture_faults(self.regularizer) if self.reward else []
        if self.regularizer.is_flat:
            found.append(
                f"regularizer: the marginal of {self._spelled_regularizer} does not change with "
                "small changes of π, so that comparisons have no gradient; any other one has, and "
                "scripts/step3_rlhf.sh trains with this one"
            )
        if self.regularizer.response_classes is not None:
            found.append(
                "regularizer.classes: a class's share under the reference changes the reward, and "
                "comparisons say nothing about it; scripts/step3_rlhf.sh learns classes"
            )
        if self.lora is not None and self.lora.lora_dropout > 0:
            found.append(
                "lora.lora_dropout: log-probabilities are compared with the reference's, which "
                "have no dropout; 0 is the value here"
            )
        return found

    @property
    def _spelled_regularizer(self) -> str:
        divergence = getattr(self.regularizer, "divergence", None)
        return str(divergence or self.regularizer.name)


if __name__ == "__main__":  # what scripts/launch.sh starts
    from training.cli import command

    command(DirectConfig, "step3_rlhf.direct.main")
