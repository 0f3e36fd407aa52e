"""The chat template that a config gives a tokenizer, with values for the template's variables.

The values are written into the template as defaults, so that whatever reads the saved model writes
dialogues as the run did, without knowing the config.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUNDLED = Path(__file__).parent / "chat_templates"

GIVEN = {
    *"messages add_generation_prompt bos_token eos_token pad_token unk_token tools".split(),
    *"documents raise_exception strftime_now tojson date_string namespace".split(),
}
"""Variables and functions of templates whose values are not a user's to choose."""

_TRAINING_MARKS = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")


@dataclass(frozen=True)
class ChatTemplate:
    """`chat_template` and `chat_template_kwargs` of a config."""

    source: str | None = None
    """Path or name of a template; None keeps the tokenizer's."""
    variables: dict[str, Any] = field(default_factory=dict)

    def faults(self) -> list[str]:
        """A template that cannot be found."""
        found = []
        names = bundled_names()
        if self.source not in (None, *names) and not Path(str(self.source)).is_file():
            found.append(
                f"chat_template: {self.source!r} is neither a file nor one of {', '.join(names)}"
            )
        bad = [name for name in self.variables if not name.isidentifier() or name in GIVEN]
        return found + [f"chat_template_kwargs: {name!r} cannot be set" for name in bad]

    def apply(self, tokenizer: "PreTrainedTokenizerBase", model: str) -> None:
        """Give the tokenizer this template and its variables.

        Args:
            model: the tokenizer's, for messages.

        Raises:
            UserError: the template is no Jinja, or has no such variable; or there is none.
        """
        if self.source is not None:
            tokenizer.chat_template = _text(self.source)
        if not self.variables:
            return
        if not tokenizer.chat_template:
            raise UserError(f"chat_template_kwargs: the tokenizer of {model} has no chat template")
        template = tokenizer.chat_template
        several = template if isinstance(template, dict) else {"default": template}
        known = set().union(*(_variables(text, self.source or model) for text in several.values()))
        for name in self.variables:
            if name not in known:
                raise UserError(
                    f"chat_template_kwargs: the chat template of {self.source or model} has no "
                    f"variable {name!r}{did_you_mean(name, known - GIVEN)}"
                )
        filled = {name: with_defaults(text, self.variables) for name, text in several.items()}
        tokenizer.chat_template = filled if isinstance(template, dict) else filled["default"]


def bundled_names() -> list[str]:
    """Names of the templates that come with this package."""
    return sorted(path.stem for path in BUNDLED.glob("*.jinja"))


def with_defaults(template: str, variables: dict[str, Any]) -> str:
    """The template with a value for each variable that its caller does not set."""
    start = "".join(
        f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}"
        for name, value in variables.items()
    )
    # The empty text keeps a new line at the template's beginning, which a block would swallow.
    start += "{{ '' }}"
    return template if template.startswith(start) else start + template


def _text(source: str) -> str:
    path = Path(source)
    if not path.is_file():
        path = BUNDLED / f"{source}.jinja"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"chat_template: {source} is unreadable: {error}") from None
    _variables(text, source)
    return text


def _variables(template: str, name: str) -> set[str]:
    """The variables that a template reads from its caller."""
    from jinja2 import Environment, TemplateSyntaxError, meta

    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    try:
        parsed = environment.parse(_TRAINING_MARKS.sub("", template))
    except TemplateSyntaxError as error:
        raise UserError(
            f"chat_template: {name}, line {error.lineno}: {json.dumps(error.message)[1:-1]}"
        ) from None
    return meta.find_undeclared_variables(parsed)
