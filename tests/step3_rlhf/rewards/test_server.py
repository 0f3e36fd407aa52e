"""A reward server, asked over HTTP: what it is given, what may be answered, and its faults."""

import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
import torch

from step3_rlhf.config import PPOConfig, RewardSettings
from step3_rlhf.rewards import server as module
from step3_rlhf.rewards.server import ServerReward
from step3_rlhf.rewards.sources import check_reward, load_reward
from step3_rlhf.roles import roles_of
from step3_rlhf.rollout import Rollout, assemble, encode_prompt_texts
from training.config import check_config
from training.data import encode_responses
from training.errors import UserError

PROMPTS = ("Please suggest a drink.", "What is a good pet?", "Hi")
RESPONSES = ("tea", "a cat, or perhaps two of them", "hello")
LENGTHS = [3.0, 29.0, 5.0]


class StandIn:
    """A reward server on this machine whose reward is a response's length."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.script: list[tuple[int, bytes]] = []  # answers that come first: status and body
        self.answer = lambda asked: {"rewards": [len(text) for text in asked["responses"]]}
        self.silence = threading.Event()
        self.silence.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                outer.requests.append(
                    json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                )
                outer.silence.wait(10)
                status, body = 200, json.dumps(outer.answer(outer.requests[-1])).encode()
                if outer.script:
                    status, body = outer.script.pop(0)
                self.send_response(status)
                if 300 <= status < 400:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/get_reward"
        self.thread = threading.Thread(target=self.http.serve_forever, args=(0.02,))
        self.thread.start()

    def close(self) -> None:
        self.silence.set()
        self.http.shutdown()
        self.thread.join()
        self.http.server_close()


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    monkeypatch.setattr(module.time, "sleep", lambda seconds: None)
    server = StandIn()
    yield server
    server.close()


@pytest.fixture
def rollout(world_tokenizer) -> Rollout:
    ids = encode_responses(list(RESPONSES), world_tokenizer)
    ids[1] = ids[1][:-1]  # cut before its end
    return assemble(
        encode_prompt_texts(PROMPTS, world_tokenizer),
        ids,
        PROMPTS,
        world_tokenizer,
        torch.device("cpu"),
    )


def reward_of(url: str, tokenizer, **settings: object) -> ServerReward:
    return ServerReward(RewardSettings(url=url, **settings), tokenizer)


def test_what_the_server_is_given(stand_in: StandIn, rollout: Rollout, world_tokenizer) -> None:
    found = reward_of(stand_in.url, world_tokenizer)(rollout)
    assert found.tolist() == LENGTHS
    assert found.dtype == torch.float32
    (asked,) = stand_in.requests
    assert asked["prompts"] == list(PROMPTS)
    assert asked["responses"] == list(RESPONSES)
    assert asked["messages"][2] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "hello"},
    ]
    end = world_tokenizer.eos_token
    assert [text.endswith(end) for text in asked["query"]] == [True, False, True]
    for text, prompt, response in zip(asked["query"], PROMPTS, RESPONSES, strict=True):
        assert prompt in text
        assert text.removesuffix(end).endswith(response)
    assert world_tokenizer.pad_token not in "".join(asked["query"])


def test_batches_keep_the_order(stand_in: StandIn, rollout: Rollout, world_tokenizer) -> None:
    found = reward_of(stand_in.url, world_tokenizer, batch_size=2)(rollout)
    assert found.tolist() == LENGTHS
    assert [len(asked["query"]) for asked in stand_in.requests] == [2, 1]


@pytest.mark.parametrize(
    "answer",
    [
        {"rewards": [1, 2.5, -3]},
        {"reward": [1.0, 2.5, -3.0]},
        {"scores": [0, 0, 0], "rewards": [1.0, 2.5, -3.0], "extra_logs": {"a": [1, 2, 3]}},
        {"scores": [[1.0], [2.5], [-3.0]]},
        [1.0, 2.5, -3.0],
    ],
)
def test_forms_of_an_answer(stand_in: StandIn, rollout: Rollout, world_tokenizer, answer) -> None:
    stand_in.answer = lambda asked: answer
    assert reward_of(stand_in.url, world_tokenizer)(rollout).tolist() == [1.0, 2.5, -3.0]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"rewards": [1.0, 2.0]}, "returned 2 rewards for 3 responses"),
        (
            {"rewards": [1.0, float("nan"), 2.0]},
            f"returned nan for the prompt {PROMPTS[1]!r} and the response {RESPONSES[1]!r}",
        ),
        ({"rewards": [1.0, 2.0, None]}, f"returned None for the prompt {PROMPTS[2]!r}"),
        ({"rewards": [1.0, 2.0, [1.0, 2.0]]}, "returned [1.0, 2.0] for the prompt"),
        ({"detail": "ok"}, "returned an object without 'rewards': it has 'detail'"),
        ({}, "returned an object without 'rewards': it has nothing in it"),
        (None, "returned None; one number for each response is needed"),
        (0.5, "returned 0.5; one number for each response is needed"),
    ],
)
def test_answers_that_are_no_rewards(
    stand_in: StandIn, rollout: Rollout, world_tokenizer, answer, message: str
) -> None:
    stand_in.answer = lambda asked: answer
    with pytest.raises(UserError, match=re.escape(f"reward.url {stand_in.url} {message}")):
        reward_of(stand_in.url, world_tokenizer)(rollout)
    assert len(stand_in.requests) == 1


def test_an_answer_that_is_not_json(stand_in: StandIn, rollout: Rollout, world_tokenizer) -> None:
    stand_in.script = [(200, b"<html>Welcome</html>")]
    with pytest.raises(UserError, match="gave an answer that is not JSON: '<html>Welcome"):
        reward_of(stand_in.url, world_tokenizer)(rollout)


def test_passing_faults_are_tried_again(
    stand_in: StandIn, rollout: Rollout, world_tokenizer, capsys
) -> None:
    stand_in.script = [(503, b"loading"), (429, b"slower")]
    assert reward_of(stand_in.url, world_tokenizer)(rollout).tolist() == LENGTHS
    printed = capsys.readouterr().out
    assert "answered 503 Service Unavailable: loading; trying again in 1 s" in printed
    assert "answered 429 Too Many Requests: slower; trying again in 2 s" in printed


def test_lasting_faults_end_the_run(stand_in: StandIn, rollout: Rollout, world_tokenizer) -> None:
    stand_in.script = [(500, b"no memory")] * 3
    with pytest.raises(UserError, match=r"answered 500 .*: no memory, 3 times"):
        reward_of(stand_in.url, world_tokenizer, retries=2)(rollout)
    assert len(stand_in.requests) == 3


@pytest.mark.parametrize(
    ("status", "message"),
    [(404, "answered 404 Not Found: no such page"), (302, "to /elsewhere; give that address")],
)
def test_refusals_are_not_tried_again(
    stand_in: StandIn, rollout: Rollout, world_tokenizer, status: int, message: str
) -> None:
    stand_in.script = [(status, b"no such page")]
    with pytest.raises(UserError, match=message):
        reward_of(stand_in.url, world_tokenizer)(rollout)
    assert len(stand_in.requests) == 1


def test_a_silent_server(stand_in: StandIn, rollout: Rollout, world_tokenizer) -> None:
    stand_in.silence.clear()
    with pytest.raises(UserError, match=r"was silent for 0\.2 s \(reward\.timeout\), 2 times"):
        reward_of(stand_in.url, world_tokenizer, timeout=0.2, retries=1)(rollout)


def configured(url: str, stage_settings) -> PPOConfig:
    return check_config(PPOConfig, stage_settings("ppo") | {"reward": {"url": url}}, "config:")


def test_one_request_is_tried_before_the_run(stand_in: StandIn, stage_settings) -> None:
    config = configured(stand_in.url, stage_settings)
    check_reward(config.reward, roles_of(config))
    assert [asked["responses"] for asked in stand_in.requests] == [["Hello"]]
    assert isinstance(load_reward(config, roles_of(config)), ServerReward)
    stand_in.answer = lambda asked: {"rewards": []}
    with pytest.raises(UserError, match="returned 0 rewards for 1 responses"):
        check_reward(config.reward, roles_of(config))


def test_a_server_that_is_not_there(stage_settings) -> None:
    closed = StandIn()
    closed.close()
    config = configured(closed.url, stage_settings)
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\); start the server"):
        check_reward(config.reward, roles_of(config))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"url": "localhost:5000"}, "reward.url"),
        ({"url": "http://a", "function": "m:f"}, "give exactly one of"),
        ({"function": "m:f", "timeout": 5.0}, "reward.timeout: only a reward server (url) has it"),
        ({"url": "http://a", "retries": -1}, "reward.retries"),
    ],
)
def test_settings_of_a_server(stage_settings, settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        check_config(PPOConfig, stage_settings("ppo") | {"reward": settings}, "config:")
