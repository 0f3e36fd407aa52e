"""The mean reward of the reference policy on each prompt, at which rewards are centered.

Example 2 takes C_{1,x} = −E_{y~π_ref(·|x)} r(x, y), which depends on the prompt alone, so that the
optimum stays where it is, and rewards get mean zero on every prompt rather than over all prompts.
The paper calls the conditional mean computationally expensive: it takes K more responses to each
prompt. They are drawn apart from the responses that are learned from, so that no gradient depends
on the mean.
"""

from collections.abc import Callable

from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import PPOConfig
from step3_rlhf.prompts import Prompts
from step3_rlhf.rollout import Rollout, sample
from training.models.lora import WithoutAdapter
from training.runtime.faults import dumped, require_finite


def prompt_centers(rewards: Tensor, draws: int, generations: int) -> Tensor:
    """[B] the mean reward of the K draws of each prompt, once for each of its responses (Ex. 2).

    Args:
        rewards: [P · K] of the reference's responses, K = `draws` adjacent ones to each prompt.
        generations: responses to each prompt that are centered; B = P · generations.
    """
    means = rewards.view(-1, draws).mean(-1)  # −C_{1,x}
    return means.repeat_interleave(generations)


def centers_of_iteration(
    number: int,
    prompts: Prompts,
    reference: nn.Module | WithoutAdapter,
    tokenizer: PreTrainedTokenizerBase,
    rewards_of: Callable[[Rollout], Tensor],
    config: PPOConfig,
) -> Tensor:
    """[B] −C_{1,x} for this rank's responses of iteration `number`.

    The draws depend on the seed and the place in the stream of prompts only, so that a resumed run
    and any number of ranks make the same ones.

    Args:
        rewards_of: [P · K] the effective rewards of responses.

    Raises:
        UserError: a reward is not finite.
    """
    draws = config.reward_centering_draws
    batch = prompts.for_prompt_centering(number, draws)
    rollout = sample(reference, tokenizer, *batch, config.sampling)
    rewards = rewards_of(rollout)
    with dumped(config.output_dir, number + 1, rollout.readable):
        require_finite("rewards of the reference's responses", rewards)
    return prompt_centers(rewards, draws, config.num_generations)
