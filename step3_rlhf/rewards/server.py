"""Rewards from a server: HTTP requests in the form of OpenRLHF's remote reward models.

A request is a POST of a JSON object with these lists, one entry for each response:

    query      prompt and response as one text, as the policy read and wrote it, special tokens too
    prompts    the prompts as people read them
    responses  the responses, without special tokens
    messages   the dialogues as messages, the response as the last one

The answer is {"rewards": [...]}, or the list alone.
"""

import http.client
import json
import time
import urllib.error
import urllib.request
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from step3_rlhf.config import RewardSettings
from step3_rlhf.rewards.answers import agreed, checked
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.data import encode_responses
from training.errors import UserError
from training.runtime.tracking import say

LONGEST_WAIT = 30.0
"""Seconds between two attempts; the first waits are 1, 2, 4 … seconds."""
SHOWN = 200
"""Characters of a server's error page that a message repeats."""
TRANSIENT = (408, 425, 429)
"""Refusals that may pass; so may all of 500 and above."""


class ServerReward:
    """Asks the server that `reward.url` names; each rank asks for its own responses."""

    def __init__(self, settings: RewardSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        """
        Args:
            tokenizer: the policy's.
        """
        assert settings.url is not None
        self.url = settings.url
        self.settings = settings
        self.tokenizer = tokenizer

    def __call__(self, rollout: Rollout) -> Tensor:
        return agreed(lambda: self.ask(rollout, self.settings.retries), rollout)

    def ask(self, rollout: Rollout, retries: int) -> list[float]:
        """The rewards [B], `batch_size` responses in one request.

        Raises:
            UserError: the server cannot be reached, refuses, or gives something else than rewards.
        """
        rewards: list[float] = []
        for first in range(0, len(rollout), self.settings.batch_size):
            part = rollout.rows(first, first + self.settings.batch_size)
            answer = post(self.url, self.request(part), self.settings.timeout, retries)
            rewards += checked(answer, part, f"reward.url {self.url}")
        return rewards

    def request(self, rollout: Rollout) -> dict[str, list[Any]]:
        """What the server is given."""
        rows = zip(rollout.input_ids, rollout.attention_mask.bool(), strict=True)
        read = [ids[mask].tolist() for ids, mask in rows]
        answered = zip(rollout.dialogues, rollout.responses, strict=True)
        return {
            "query": self.tokenizer.batch_decode(read, clean_up_tokenization_spaces=False),
            "prompts": list(rollout.prompts),
            "responses": list(rollout.responses),
            "messages": [
                [*dialogue, {"role": "assistant", "content": response}]
                for dialogue, response in answered
            ],
        }


def try_server(settings: RewardSettings, tokenizer: PreTrainedTokenizerBase) -> None:
    """Ask for the reward of one response, once, before anything expensive starts.

    Raises:
        UserError: see `ServerReward.ask`.
    """
    texts = ["Hi"]
    rollout = assemble(
        encode_prompt_texts(texts, tokenizer),
        encode_responses(["Hello"], tokenizer),
        texts,
        tokenizer,
        torch.device("cpu"),
    )
    ServerReward(settings, tokenizer).ask(rollout, retries=0)


def post(url: str, content: dict[str, Any], timeout: float, retries: int) -> Any:
    """POST `content` as JSON and return the answer's JSON.

    Args:
        timeout: seconds that the server may be silent.
        retries: further attempts if the server cannot be reached, is silent, or has an error.

    Raises:
        UserError: no attempt succeeded, or the server refuses the request or gives no JSON.
    """
    request = urllib.request.Request(
        url,
        data=json.dumps(content).encode(),
        headers={"Content-Type": "application/json", "Accept": "application/json"},
    )
    fault = ""
    for attempt in range(retries + 1):
        if attempt:
            wait = min(2.0 ** (attempt - 1), LONGEST_WAIT)
            say(f"reward.url {url} {fault}; trying again in {wait:.0f} s")
            time.sleep(wait)
        try:
            with _opener.open(request, timeout=timeout) as answer:
                text: bytes = answer.read()
            break
        except urllib.error.HTTPError as error:
            fault = f"answered {error.code} {error.reason}{_shown(error)}"
            if error.code < 500 and error.code not in TRANSIENT:
                raise UserError(f"reward.url {url} {fault}") from None
        except TimeoutError:
            fault = f"was silent for {timeout:g} s (reward.timeout)"
        except urllib.error.URLError as error:
            late = isinstance(error.reason, TimeoutError)
            fault = f"was silent for {timeout:g} s (reward.timeout)" if late else _unreached(error)
        except (OSError, http.client.HTTPException) as error:
            fault = f"broke off: {error!r}"
    else:
        times = "" if not retries else f", {retries + 1} times"
        raise UserError(f"reward.url {url} {fault}{times}")
    try:
        return json.loads(text)
    except ValueError:
        start = text[:SHOWN].decode(errors="replace")
        raise UserError(f"reward.url {url} gave an answer that is not JSON: {start!r}") from None


def _unreached(error: urllib.error.URLError) -> str:
    return f"cannot be reached ({error.reason}); start the server first"


def _shown(error: urllib.error.HTTPError) -> str:
    """The beginning of what a server says about its error, or where it redirects to."""
    if 300 <= error.code < 400:
        return f", to {error.headers.get('Location')}; give that address"
    try:
        text = error.read(SHOWN).decode(errors="replace").strip()
    except (OSError, http.client.HTTPException):
        text = ""
    return f": {text}" if text else ""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Following one would turn the POST into a GET without any responses."""

    def redirect_request(self, *arguments: Any) -> None:
        return None


_opener = urllib.request.build_opener(_NoRedirect)
