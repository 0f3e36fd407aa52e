"""Refuses a model for which training would compute something other than its own forward.

Training takes log-probabilities and rewards from hidden states, in padded batches and in training
mode. Families of models differ in each of these, and a wrong number raises no error. A few tokens
are therefore computed both ways when a model is loaded.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from training.errors import UserError
from training.models.decoding.decoder import Decoder, has_decoder
from training.models.families.generation import logits_while_drawing
from training.models.families.noise import Quiet, drawn_so_far, undisturbed
from training.models.logprobs import without_absent
from training.models.policy import Policy
from training.models.scalar import Classifier, ScalarModel
from training.runtime.faults import remedy
from training.runtime.tracking import say

TOKENS = 8
"""Length of the text that is compared. The padded rows hold its first half."""

LARGEST_ROUNDED = 32.0
"""Logits are rarely above 32, where neighbouring bfloat16 numbers are 0.25 apart; two ways to
compute a logit may differ by that much. Over all families of transformers they differed by at most
0.004."""

DEEP_SUMS = 1e-3
"""Sums in another order differ in float32 too: by 1e-5 over 24 layers. Families that are computed
wrongly differ by 0.01 to 30."""

REPEATED = 1e-5
"""Two passes over the same tensors add in the same order."""

STEPS = 2
"""Drawn tokens: one right after the prompt, and one that reads the cache."""

PADDINGS = ("without padding", "padded on the left", "padded on the right")


def rounding(dtype: torch.dtype) -> float:
    """Return how much two ways to compute the same number near 1 may differ."""
    return max(DEEP_SUMS, LARGEST_ROUNDED * torch.finfo(dtype).eps)


@dataclass(frozen=True)
class Text:
    """A few ordinary tokens, the same for every model with this tokenizer."""

    ids: tuple[int, ...]
    pad: int

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, positions: int | None) -> "Text":
        """Tokens from all over the vocabulary, at most as many as the model has positions."""
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        known = sorted(tokenizer.get_vocab().values())
        ordinary = [token for token in known if token not in special] or known
        count = min(TOKENS, positions) if positions and positions > 1 else TOKENS
        places = [(2 * k + 1) * len(ordinary) // (2 * count) for k in range(count)]
        return cls(tuple(ordinary[place] for place in places), tokenizer.pad_token_id)

    @property
    def beginning(self) -> tuple[int, ...]:
        return self.ids[: len(self.ids) // 2]

    def rows(self) -> tuple[Tensor, Tensor]:
        """Return the whole text, and its beginning padded as `PADDINGS` says.

        Returns:
            ids and attention mask, [3, tokens] each.
        """
        ids = torch.full((len(PADDINGS), len(self.ids)), self.pad)
        mask = torch.zeros_like(ids)
        for row, start in enumerate([0, len(self.ids) - len(self.beginning), 0]):
            text = torch.tensor(self.beginning if row else self.ids)
            ids[row, start : start + len(text)] = text
            mask[row, start : start + len(text)] = 1
        return ids, mask


@torch.no_grad()
def own_logits(model: PreTrainedModel, ids: tuple[int, ...], name: str) -> Tensor:
    """Compute the model's own logits [tokens, vocabulary] of one text without padding, in float32.

    Raises:
        UserError: the model's own forward fails, or its logits are not finite.
    """
    takes_cache = "use_cache" in inspect.signature(model.forward).parameters
    options = {"use_cache": False} if takes_cache else {}
    with undisturbed(model):
        model.eval()
        logits: Tensor = _tried(
            lambda: model(input_ids=torch.tensor([ids]), **options).logits[0],
            f"{name}: its own forward fails",
        )
    if bool((logits.isnan() | logits.isposinf()).any()):
        raise UserError(
            f"{name}: its own forward gives values that are not finite on a few ordinary tokens; "
            "its weights are damaged, or too large for its precision"
        )
    return logits.float()


@torch.no_grad()
def require_own_log_probs(
    policy: Policy, own: Tensor, text: Text, name: str, dropout: bool
) -> None:
    """Refuse a policy whose log-probabilities are not those of its own forward.

    Noise in training mode is switched off, unless it is wanted.

    Args:
        own: logits [tokens, vocabulary] of the whole text, from `own_logits`.
        dropout: noise in training mode is wanted.

    Raises:
        UserError: with the largest difference.
    """
    ids, mask = text.rows()
    scored = (mask == 1) & (mask.cumsum(-1) > 1)
    logp = without_absent(own, policy.absent)[:-1].log_softmax(-1)
    logp = logp.gather(1, torch.tensor(text.ids[1:])[:, None]).squeeze(1)
    expected = torch.zeros(scored.shape)
    for row in range(len(scored)):  # what follows a token says nothing about it
        expected[row, scored[row]] = logp[: int(scored[row].sum())]
    _require_equal(
        policy,
        lambda: policy(ids, mask, scored)[0],
        expected,
        tolerance=rounding(policy.model.dtype),
        what="log-probabilities",
        unit=" nats",
        name=name,
        dropout=dropout,
    )


@torch.no_grad()
def require_own_draws(policy: Policy, own: Tensor, text: Text, name: str) -> None:
    """Refuse a policy that draws, token by token, from another distribution than its own forward.

    `policy.decodes` becomes true if `Decoder` draws from that distribution. Otherwise transformers'
    `generate` must.

    Args:
        own: logits [tokens, vocabulary] of the whole text, from `own_logits`.

    Raises:
        UserError: with the largest difference.
    """
    whole, beginning = len(text.ids) - STEPS, len(text.beginning)
    prompts = torch.full((2, whole), text.pad)
    prompts[0] = torch.tensor(text.ids[:whole])
    prompts[1, whole - beginning :] = torch.tensor(text.beginning)
    mask = (torch.arange(whole) >= torch.tensor([[0], [whole - beginning]])).long()
    tokens = torch.tensor([text.ids[end : end + STEPS] for end in (whole, beginning)])
    expected = torch.stack([own[end - 1 : end - 1 + STEPS] for end in (whole, beginning)])
    tolerance = rounding(policy.model.dtype)

    def gap(drawn: Tensor) -> float:
        """Largest difference of log-probabilities between drawing and the own forward."""
        found, wanted = (
            without_absent(logits, policy.absent).log_softmax(-1).gather(-1, tokens[..., None])
            for logits in (drawn, expected)
        )
        return (found - wanted).abs().nan_to_num(torch.inf).max().item()

    with undisturbed(policy):
        policy.eval()
        if has_decoder(policy):
            try:
                decoded = logits_while_decoding(policy, prompts, mask, tokens)
            except Exception as error:  # families raise anything
                say(f"{name} is not decoded step by step here ({error}); generate draws instead")
            else:
                policy.decodes = gap(decoded) <= tolerance
                if not policy.decodes:
                    say(
                        f"{name} is not decoded step by step here (it would draw other tokens); "
                        "generate draws instead"
                    )
        drawn = _tried(
            lambda: logits_while_drawing(policy.model, prompts, mask, tokens, text.pad),
            f"{name}: a few tokens cannot be drawn",
        )
    if (found := gap(drawn)) > tolerance:
        raise UserError(
            f"{name}: log-probabilities of tokens that are drawn after prompts of different "
            f"lengths differ by up to {found:.2g} nats from those of the model's own forward, "
            f"where rounding explains {tolerance:.2g}; this kind of model ({_kind(policy)}) would "
            "not draw from the distribution that is scored"
        )


def logits_while_decoding(policy: Policy, prompts: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """[batch, steps, vocabulary] logits from which `Decoder` would draw `tokens` [batch, steps].

    Args:
        prompts, mask: [batch, length], padded on the left.
    """
    seen: list[Tensor] = []

    def choose(logits: Tensor) -> Tensor:
        seen.append(logits)
        return tokens[:, len(seen) - 1]

    Decoder(policy, prompts, mask, tokens.shape[1]).run(choose, lambda: torch.zeros(1))
    return torch.stack(seen, dim=1)


@torch.no_grad()
def require_own_rewards(
    scalar: ScalarModel | Classifier, text: Text, name: str, dropout: bool = False
) -> None:
    """Refuse a scalar model whose rewards are not those of its own forward.

    Raises:
        UserError: with the largest difference.
    """
    model: PreTrainedModel = scalar.model
    whole, beginning = (own_logits(model, ids, name) for ids in (text.ids, text.beginning))
    if whole.numel() != 1:
        raise UserError(f"{name} gives {whole.numel()} numbers for a text; a reward is one")
    whole, beginning = whole.reshape(1), beginning.reshape(1)
    if isinstance(scalar, Classifier):  # is given rows that are padded on the right only
        ids, mask = (part[[0, 2]] for part in text.rows())
        expected = torch.cat([whole, beginning])
    else:
        ids, mask = text.rows()
        expected = torch.cat([whole, beginning.expand(len(PADDINGS) - 1)])
    rewards = scalar if isinstance(scalar, Classifier) else scalar.rewards
    _require_equal(
        scalar,
        lambda: rewards(ids, mask),
        expected,
        tolerance=rounding(model.dtype) * expected.abs().max().item(),
        what="rewards",
        unit="",
        name=name,
        dropout=dropout,
    )


def _require_equal(
    module: Quiet,
    compute: Callable[[], Tensor],
    expected: Tensor,
    tolerance: float,
    what: str,
    unit: str,
    name: str,
    dropout: bool,
) -> None:
    """Refuse a module that does not compute `expected` in evaluation and in training mode."""
    with undisturbed(module):
        module.eval()
        found = _tried(compute, f"{name}: a few tokens cannot be computed as they are in training")
        gaps = (found - expected).abs().reshape(len(expected), -1).amax(1).nan_to_num(torch.inf)
        if (gap := gaps.max().item()) > tolerance:
            paddings = PADDINGS if len(gaps) == len(PADDINGS) else (PADDINGS[0], PADDINGS[2])
            where = next(place for place, g in zip(paddings, gaps, strict=True) if g > tolerance)
            raise UserError(
                f"{name}: {what} of a text {where} differ by up to {gap:.2g}{unit} from those of "
                f"the model's own forward without padding, where rounding explains "
                f"{tolerance:.2g}; this kind of model ({_kind(module)}) would be trained and "
                "scored wrongly here"
            )
        if dropout:
            return
        for noiseless in (False, True):
            module.noiseless = noiseless
            module.train()
            before = drawn_so_far()
            first, second = (
                _tried(compute, f"{name}: a few tokens cannot be computed in training mode")
                for _ in range(2)
            )
            noise = (first - second).abs().max().item()
            gap = (first - found).abs().max().item()
            # A router with a clear choice hides its noise on a few tokens but draws random numbers.
            silent = noiseless or drawn_so_far() == before
            if noise <= REPEATED and gap <= tolerance and silent:
                return
    raise UserError(
        f"{name}: {what} of the same text differ by up to {max(noise, gap):.2g}{unit} between two "
        "passes in training mode, or from evaluation mode: "
        f"this kind of model ({_kind(module)}) has noise in training that cannot be switched off, "
        "and PPO would take it for a change of the policy"
    )


def _kind(module: Quiet) -> str:
    model = module.model
    return type(model).__name__


def _tried(compute: Callable[[], Tensor], what: str) -> Tensor:
    try:
        return compute()
    except Exception as error:  # families raise anything for input that they do not know
        if remedy(error):  # memory, not the model
            raise
        message = (str(error).splitlines() or [""])[0]
        raise UserError(f"{what}: {type(error).__name__}: {message}") from error
