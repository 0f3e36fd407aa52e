"""The reference of a config's settings, from the docstrings of its fields.

Every field is one `Setting`; every config class that a field holds is one `Section`. The same
sections are printed by `--help` and stand in each stage's configs/README.md.
"""

import argparse
import inspect
import json
import textwrap
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from training.config import StrictModel, shipped_configs
from training.plugins import import_object

WORDS = {str: "text", int: "integer", float: "number", bool: "true or false", dict: "object"}
BOUNDS = (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))


@dataclass(frozen=True)
class Setting:
    """One field: its path in the JSON, its type in words, its default as JSON, its sentence."""

    path: str
    type: str
    default: str
    sentence: str


@dataclass(frozen=True)
class Section:
    """One object of the JSON."""

    path: str
    """Empty for the top level."""
    sentence: str
    settings: tuple[Setting, ...]


def sections_of(
    config_class: type[StrictModel], path: str = "", left_out: Sequence[str] = ()
) -> list[Section]:
    """The settings of a config class, then those of the objects in it.

    Args:
        left_out: fields that need no place.

    Raises:
        ValueError: a field has no docstring.
    """
    own: list[Setting] = []
    inner: list[Section] = []
    for name, field in config_class.model_fields.items():
        if name in left_out:
            continue
        place = f"{path}.{name}" if path else name
        if not field.description:
            raise ValueError(f"{config_class.__name__}.{name} has no docstring")
        sentence = " ".join(field.description.split())
        own.append(Setting(place, type_of(field), default_of(field), sentence))
        if name in config_class.variants:
            for title, variant in config_class.variants[name].items():
                inner += _variant(place, title, variant)
            continue
        for member in _models_in(field.annotation):
            is_list = "list" in own[-1].type
            inner += sections_of(member, f"{place}[]" if is_list else place)
    return [Section(path, _first_paragraph(config_class), tuple(own)), *inner]


def _variant(place: str, title: str, variant: type[StrictModel]) -> list[Section]:
    """One of the objects that a field may hold, which says so by its name."""
    first, *inner = sections_of(variant, place, left_out=["name"])
    return [Section(f'{place} {{"name": "{title}"}}', first.sentence, first.settings), *inner]


def _first_paragraph(config_class: type[StrictModel]) -> str:
    return " ".join((inspect.getdoc(config_class) or "").split("\n\n")[0].split())


def _models_in(annotation: Any) -> Iterator[type[StrictModel]]:
    """Config classes inside an annotation such as `tuple[Source, ...] | None`."""
    if inspect.isclass(annotation) and issubclass(annotation, StrictModel):
        yield annotation
    for part in get_args(annotation):
        yield from _models_in(part)


def default_of(field: FieldInfo) -> str:
    """As it would be written in JSON."""
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    assert value is not PydanticUndefined
    if isinstance(value, StrictModel):
        return "its own defaults"
    return json.dumps(value)


def type_of(field: FieldInfo) -> str:
    """`integer ≥ 1`, `"a" or "b"`, `list of texts`: a field's type in a user's words."""
    return _in_words(field.annotation, field.metadata)


def _in_words(annotation: Any, metadata: Sequence[Any] = ()) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner, *found = parts
        metadata = [m for item in found for m in getattr(item, "metadata", [item])]
        return _in_words(inner, metadata)
    if origin is Literal:
        return " or ".join(json.dumps(value) for value in parts)
    if origin in (Union, types.UnionType):
        kinds = [_in_words(part, metadata) for part in parts if part is not type(None)]
        return " or ".join(kinds + (["null"] if type(None) in parts else []))
    if origin in (list, tuple):
        members = [part for part in parts if part is not Ellipsis]
        if origin is tuple and Ellipsis not in parts:
            return f"list of {len(members)} × {_in_words(members[0])}"
        return f"list of {_in_words(members[0])}"
    if inspect.isclass(annotation) and issubclass(annotation, StrictModel):
        return "object"
    word = WORDS.get(origin or annotation, "")
    if not word:
        raise ValueError(f"no word for the type {annotation}")
    bounds = [
        f"{sign} {_number(getattr(item, name))}"
        for item in metadata
        for name, sign in BOUNDS
        if getattr(item, name, None) is not None
    ]
    return " ".join([word, " and ".join(bounds)]).strip()


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:g}"


def as_text(sections: Sequence[Section], width: int = 96) -> str:
    """For the terminal."""
    lines: list[str] = []
    for section in sections:
        lines += ["", section.path or "settings", *_wrapped(section.sentence, 2, width)]
        for setting in section.settings:
            default = setting.default if setting.default == "required" else f"= {setting.default}"
            lines.append(f"  {setting.path}  ({setting.type}; {default})")
            lines += _wrapped(setting.sentence, 6, width)
    return "\n".join(lines).strip("\n")


def _wrapped(text: str, indent: int, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent=" " * indent, subsequent_indent=" " * indent)


def as_markdown(sections: Sequence[Section]) -> str:
    """A table for each section."""
    lines: list[str] = []
    for section in sections:
        heading = f"`{section.path}`" if section.path else "Settings"
        lines += [f"## {heading}", "", section.sentence, ""]
        if section.settings:
            lines += ["| setting | type | default | meaning |", "|---|---|---|---|"]
            lines += [_row(setting) for setting in section.settings]
            lines.append("")
    return "\n".join(lines)


def _row(setting: Setting) -> str:
    default = setting.default
    if default not in ("required", "its own defaults"):
        default = f"`{default}`"
    cells = (f"`{setting.path}`", setting.type, default, setting.sentence)
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


README = """# Configs and settings of `{script}`

<!-- Made by `python -m training.settings_reference {path}`: change the configs or the docstrings
of the settings, not this file. -->

Those of the bundled world (`quickstart`) and of SmolLM2-135M (`smollm2`) have been run. Those for
OPT and Llama have been checked with `--dry-run` only. `-paper.json` files follow the published
code where the default does not.
"""


def configs_readme(path: str) -> str:
    """The whole file of a script: the shipped configs that it takes, then all settings.

    Args:
        path: `package.config:Class` of the stage's config class.
    """
    config_class: type[StrictModel] = import_object(path)
    lines = [README.format(script=config_class.script, path=path)]
    lines += ["| config | starts from | what it is for |", "|---|---|---|"]
    for file in shipped_configs()[config_class.script]:
        data = json.loads(file.read_text(encoding="utf-8"))
        description = data.get("description", "")
        lines.append(
            f"| [`{file.name}`]({file.name}) | `{data['model_name_or_path']}` | "
            f"{_cell(description)} |"
        )
    return "\n".join([*lines, "", as_markdown(sections_of(config_class))])


def reference_file(path: str) -> Path:
    """Where it stands: README.md for a stage's own script, SCRIPT.md for another one."""
    script = import_object(path).script
    directory = shipped_configs()[script][0].parent
    return directory / ("README.md" if directory.parent.name == script else f"{script}.md")


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write the reference of a script's settings.")
    parser.add_argument("config_class", help="such as step1_sft.config:SFTConfig")
    path: str = parser.parse_args(arguments).config_class
    file = reference_file(path)
    file.write_text(configs_readme(path), encoding="utf-8")
    print(file)


if __name__ == "__main__":
    main()
