"""Talks to policies, and shows how often each gives which answer.

    bash scripts/chat.sh MODEL [MODEL ...] [options]

The command line is checked before torch is imported, which takes seconds.
"""

import argparse
import contextlib
import gc
import os
import sys
from collections.abc import Iterator

from step3_rlhf.chat.arguments import chat_parser, template_of
from step3_rlhf.chat.settings import ChatSettings
from step3_rlhf.chat.sources import Source, sources_of
from training.cli import announce_foreign_code, errors_end_cleanly
from training.data.chat_template import ChatTemplate
from training.launch.gpus import require_usable_gpus


def main(arguments: list[str] | None = None) -> None:
    options = chat_parser().parse_intermixed_args(arguments)
    with interruptions_end_cleanly(), errors_end_cleanly(options.debug):
        sources = sources_of(options.models)
        template = template_of(options)
        require_usable_gpus()
        announce_foreign_code(options.trust_remote_code)
        for source in sources:
            print(source, file=sys.stderr, flush=True)
        talk(options, sources, template)


def talk(options: argparse.Namespace, sources: list[Source], template: ChatTemplate) -> None:
    """Load the models and answer, in a terminal or in plain text."""
    gc.disable()  # as in training/launch/process.py
    import transformers

    from step3_rlhf.chat.plain import answer_lines, answer_once
    from step3_rlhf.chat.session import Session
    from step3_rlhf.chat.speakers import load_speakers
    from step3_rlhf.config import SamplingSettings

    gc.freeze()  # otherwise Python would look through all of it once more at the end, for seconds
    gc.enable()
    transformers.utils.logging.disable_progress_bar()
    drawing = SamplingSettings(response_length=options.max_tokens, temperature=options.temperature)
    beginning = [{"role": "system", "content": options.system}] if options.system else []
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the answers
        speakers = load_speakers(
            sources, drawing, beginning, options.bf16, template, options.trust_remote_code
        )
    session = Session(speakers, beginning, options.seed)
    settings = ChatSettings(options.share, options.samples, options.top, options.batch_size)
    if sys.stdout.isatty() and (options.prompt is not None or sys.stdin.isatty()):
        from step3_rlhf.chat.screen import Screen

        screen = Screen(session, settings)
        screen.converse() if options.prompt is None else screen.answer(options.prompt)
    elif options.prompt is None:
        answer_lines(session, settings, sys.stdin)
    else:
        answer_once(session, settings, options.prompt)


@contextlib.contextmanager
def interruptions_end_cleanly() -> Iterator[None]:
    """End without a traceback on Ctrl-C, and where nobody reads the answers any more."""
    try:
        yield
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        sys.exit(141)


if __name__ == "__main__":
    main()
