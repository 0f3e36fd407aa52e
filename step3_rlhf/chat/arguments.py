"""The command line of scripts/chat.sh, checked before torch is imported."""

import argparse
import math
from typing import NoReturn

from training.data.chat_template import ChatTemplate
from training.errors import UserError, did_you_mean

USAGE = "bash scripts/chat.sh MODEL [MODEL ...] [options]"
DESCRIPTION = """Talk to policies, and see how often each gives which answer.

MODEL is a Hugging Face directory, a Hub name, a GGUF file, or a run of this project: of a run of
stage 3 its actor/ answers, of a run of stage 1 its model/. All models are asked the same, with the
same random numbers."""
EXAMPLES = """examples:
  bash scripts/chat.sh runs/quickstart/conditional_pm
  bash scripts/chat.sh runs/quickstart/sft runs/quickstart/kl runs/quickstart/conditional_pm \\
      --share --prompt "Please suggest a drink."
  bash scripts/chat.sh Qwen/Qwen2.5-0.5B-Instruct --bf16 --system "Answer in one sentence."
  bash scripts/chat.sh runs/quickstart/kl < questions.txt > answers.txt

In a terminal, /share shows the distribution of answers to the last question, /reset forgets the
dialogue, /quit ends, and Ctrl-C stops an answer. Without a terminal, every line of standard input
is a question of its own, and the answers are printed as plain text. In a distribution, answers that
differ only in white space count as equal; case and punctuation count.

Answers are drawn at temperature 1 from the whole distribution. This is the policy that training
scores and evaluation measures. A lower temperature sharpens every distribution, so that a policy
looks collapsed that is not."""
LARGEST_SEED = 2**32 - 1


class ChatParser(argparse.ArgumentParser):
    """Ends a mistake with the usage and one message, which knows the nearest option."""

    def error(self, message: str) -> NoReturn:
        if message.startswith("the following arguments are required"):
            message = "name at least one MODEL"
        unknown = message.removeprefix("unrecognized arguments: ").split(" ")[0]
        if unknown != message.split(" ")[0]:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            message = f"{unknown}: unknown option{did_you_mean(unknown, known)}"
        self.exit(2, f"{self.format_usage()}{message}\n")


def chat_parser() -> ChatParser:
    """The command line."""
    parser = ChatParser(
        usage=USAGE,
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("models", nargs="+", metavar="MODEL", help="whom to ask; several answer side by side")
    add("--prompt", type=whole, metavar="TEXT", help="answer this once and end")
    add("--system", type=whole, metavar="TEXT", help="a system message before every dialogue")
    add(
        "--share",
        action="store_true",
        help="in place of one answer, show the distribution of --samples answers",
    )
    add("--samples", type=count, default=200, metavar="N", help="answers for a distribution (200)")
    add("--top", type=count, default=10, metavar="N", help="answers that it shows one by one (10)")
    add(
        "--max-tokens",
        type=count,
        default=256,
        metavar="N",
        help="tokens after which an answer is cut (256); it is cut earlier where the model's "
        "positions end",
    )
    add("--temperature", type=positive, default=1.0, help="1 draws from the scored policy (1)")
    add(
        "--seed",
        type=seed,
        default=42,
        help="the same seed and questions get the same answers (42)",
    )
    add("--bf16", action="store_true", help="compute in bfloat16 in place of float32")
    add(
        "--batch-size",
        type=count,
        default=64,
        metavar="N",
        help="answers of a distribution that are drawn at the same time (64)",
    )
    add(
        "--chat-template",
        metavar="NAME",
        help="a Jinja file or bundled template in place of the models' own",
    )
    add("--trust-remote-code", action="store_true", help="run code that comes with a model")
    add("--debug", action="store_true", help="show the traceback of a mistake")
    return parser


def whole(text: str) -> str:
    """A text that was UTF-8; Python hands over other bytes as halves of characters."""
    if not is_utf8(text):
        raise argparse.ArgumentTypeError("it is not UTF-8; convert it with iconv")
    return text


def is_utf8(text: str) -> bool:
    """Whether a text can be written in UTF-8, and so be given to a tokenizer."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def count(text: str) -> int:
    """A whole number above 0."""
    if not text.isascii() or not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text}: a whole number above 0 was expected")
    return int(text)


def seed(text: str) -> int:
    """A whole number from 0 to 2^32 - 1."""
    if not text.isascii() or not text.isdigit() or int(text) > LARGEST_SEED:
        raise argparse.ArgumentTypeError(
            f"{text}: a whole number from 0 to {LARGEST_SEED} was expected"
        )
    return int(text)


def positive(text: str) -> float:
    """A number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: a number above 0 was expected")
    return number


def template_of(options: argparse.Namespace) -> ChatTemplate:
    """The chat template that the command line asks for.

    Raises:
        UserError: there is none of that name.
    """
    template = ChatTemplate(options.chat_template)
    if faults := template.faults():
        raise UserError([fault.replace("chat_template:", "--chat-template:") for fault in faults])
    return template
