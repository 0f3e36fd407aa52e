"""Strict configs: JSON (or YAML) with `key.path=value` overrides becomes one typed, frozen object.

Every fault of a config is found before anything expensive starts. One message lists them all, each
with its path in the file. stage_config.py has what the configs of all stages have in common.
"""

import copy
import json
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from training.errors import KNOWN, UserError, did_you_mean

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Count = Annotated[int, Field(ge=1)]

UNKNOWN_KEY = "unknown key"
EMPTY = "''"
"""How messages write the empty text as a key."""


def expanded(path: str) -> str:
    """A path in which `~`, $NAME and ${NAME} are replaced, as a shell would do.

    Raises:
        ValueError: a variable is not set, or `~name` is no user.
    """
    found = os.path.expandvars(path)
    if unset := re.search(r"\$(\w+|\{\w+\})", found):
        raise ValueError(f"{path}: the variable {unset.group()} is not set")
    if found.startswith("~"):
        found = os.path.expanduser(found)
        if found.startswith("~"):
            raise ValueError(f"{path}: no home directory is known for {Path(found).parts[0]}")
    return found


PathText = Annotated[str, AfterValidator(expanded)]
"""A path, or a name that may be one: `~` and $VARIABLES in it are expanded."""


class StrictModel(BaseModel):
    """Refuses unknown keys, wrong types and NaN; an unknown key is told the nearest known one."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,  # for the settings' reference
    )
    script: ClassVar[str] = ""
    """Name of the script that takes such a config, for its help."""
    variants: ClassVar["Variants"] = {}
    """Fields that hold one of several objects, by the `name` in the object."""

    @model_validator(mode="wrap")
    @classmethod
    def _suggest_names(cls, data: Any, handler: Any) -> Any:
        try:
            return handler(data)
        except ValidationError as error:
            raise ValidationError.from_exception_data(
                cls.__name__, [cls._explained(detail) for detail in error.errors()]
            ) from None

    @classmethod
    def _explained(cls, detail: Any) -> InitErrorDetails:
        kind: Any = detail["type"]
        location = detail["loc"]
        if kind == "extra_forbidden" and len(location) == 1:
            known = {field.alias or name for name, field in cls.model_fields.items()}
            hint = did_you_mean(str(location[0]), known)
            kind = PydanticCustomError("unknown_key", f"{UNKNOWN_KEY}{hint}")
        elif kind not in ("value_error", "assertion_error") and "ctx" not in detail:
            kind = PydanticCustomError(kind, detail["msg"].replace("{", "(").replace("}", ")"))
        return InitErrorDetails(
            type=kind, loc=location, input=detail["input"], ctx=detail.get("ctx", {})
        )

    def faults(self) -> list[str]:
        """What a type cannot say: contradictions between fields, files that do not exist."""
        found = []
        for name, value in self:
            members = value if isinstance(value, tuple) else (value,)
            for index, member in enumerate(members):
                if isinstance(member, StrictModel):
                    place = f"{name}.{index}" if isinstance(value, tuple) else name
                    found += [f"{place}.{fault}" for fault in member.faults()]
        return found


Variants = Mapping[str, Mapping[str, type[StrictModel]]]

Config = TypeVar("Config", bound=StrictModel)


def shipped_configs() -> dict[str, list[Path]]:
    """The configs that come with the stages, by the script that takes them.

    A stage's script has the stage's name; NAME-direct.json is a config of step3_direct.sh.
    """
    found: dict[str, list[Path]] = {}
    for file in sorted(Path(__file__).parents[1].glob("step*/configs/*.json")):
        script = "step3_direct" if file.stem.endswith("-direct") else file.parents[1].name
        found.setdefault(script, []).append(file)
    return found


def load_config(config_class: type[Config], path: str, overrides: list[str]) -> Config:
    """Read `path`, apply `key.path=value` overrides, and check everything.

    Raises:
        UserError: with every fault, each with its path in the file.
    """
    data = read_mapping(path)
    faults = apply_overrides(data, overrides)
    return check_config(config_class, data, heading=f"{path} cannot be used:", faults=faults)


def check_config(
    config_class: type[Config], data: dict[str, Any], heading: str, faults: list[str] | None = None
) -> Config:
    """The typed config from plain data.

    Args:
        heading: the first line of the message.
        faults: those that have been found already.

    Raises:
        UserError: with every fault.
    """
    faults = list(faults or [])
    if unreadable := list(_half_characters(data)):
        # The rest of the config is checked with whole characters in their place.
        _, found = _validated(config_class, _with_whole_characters(data))
        unknown = [f"{_place(at)}: {message}" for at, message in found if _is_unknown(message)]
        places = tuple(fault.partition(f": {UNKNOWN_KEY}")[0] for fault in unknown)
        inside = tuple(f"{place}{end}" for place in places for end in (".", ":"))
        elsewhere = [fault for fault in unreadable if not fault.startswith(inside)]
        raise UserError(faults + unknown + elsewhere, heading)
    config, found = _validated(config_class, data)
    unknown = [str(at[0]) for at, text in found if len(at) == 1 and text.startswith("unknown key")]
    faults += _of_another_stage(config_class, unknown)
    faults += [f"{_place(location)}: {message}" for location, message in found]
    if config is not None:
        try:
            faults += config.faults()
        except OSError as error:
            faults.append(_path_fault(data, error))
    else:
        faults += _faults_of_the_rest(config_class, data, [location for location, _ in found])
    if faults:
        raise UserError(_with_each_list_once(faults), heading)
    assert config is not None
    return config


def _of_another_stage(config_class: type[StrictModel], unknown: list[str]) -> list[str]:
    """Whose config it seems to be, if its unknown keys are all in another stage's examples."""
    others = []
    for script, files in shipped_configs().items():
        examples = [json.loads(file.read_text("utf-8")) for file in files]
        known = {key for example in examples for key in example}
        if unknown and config_class.script and known.issuperset(unknown):
            others.append(f"scripts/{script}.sh")
    if not others:
        return []
    return [f"this seems to be a config of {' or '.join(others)}: {', '.join(unknown)}"]


def _with_each_list_once(faults: list[str]) -> list[str]:
    """The faults, each list of known names only where it stands first."""
    seen: set[str] = set()
    found = []
    for fault in faults:
        text, _, names = fault.partition(KNOWN)
        found.append(text if names in seen else fault)
        seen |= {names} - {""}
    return found


def _validated(
    config_class: type[Config], data: dict[str, Any]
) -> tuple[Config | None, list[tuple[tuple[int | str, ...], str]]]:
    try:
        return config_class.model_validate_json(json.dumps(data)), []
    except ValidationError as error:
        return None, [
            (detail["loc"], detail["msg"].removeprefix("Value error, "))
            for detail in error.errors()
        ]


def _faults_of_the_rest(
    config_class: type[Config], data: dict[str, Any], faulty: list[tuple[int | str, ...]]
) -> list[str]:
    """Contradictions in the sound part: the fields' examples stand in for the faulty entries."""
    if () in faulty:
        return []  # the whole is of no use
    replaced: set[str] = set()
    for _ in range(3):  # an example may be needed for what is missing inside a removed entry
        for location in reversed(faulty):
            field = _put_example(config_class, data, location)
            replaced.add(_place(location[: field + 1]))
        config, found = _validated(config_class, data)
        if config is not None:
            try:
                return [f for f in config.faults() if not f.startswith(tuple(replaced))]
            except OSError as error:
                return [_path_fault(data, error)]
        faulty = [location for location, _ in found]
    return []


def _put_example(
    config_class: type[StrictModel], data: dict[str, Any], location: tuple[int | str, ...]
) -> int:
    """Put an example in place of the innermost field on the way to `location` that has one.

    Where no field has an example, the entry is removed.

    Returns:
        The index in `location` of that field.
    """
    owner: Any = config_class
    target: Any = data
    index, key, parent, examples = 0, str(location[0]), data, list[Any]()
    for place, part in enumerate(location):
        fields = getattr(owner, "model_fields", {})
        if part not in fields or not isinstance(target, dict):
            break
        index, key, parent, examples = place, str(part), target, fields[part].examples or []
        owner, target = fields[part].annotation, target.get(part)
    parent.pop(key, None)
    if examples:
        parent[key] = copy.deepcopy(examples[0])
    return index


def _path_fault(data: Any, error: OSError) -> str:
    """The fault of a path that is too long, or must not be looked into, under its key."""
    path = str(error.filename)
    found = (place for place, text in _texts(data) if text and text in path)
    return f"{next(found, '(top level)')}: {path}: {error.strerror}"


def _texts(value: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """All texts among the values, each with its place; the longest first within an object."""
    if isinstance(value, str):
        yield place, value
    elif isinstance(value, dict | list):
        members = value.items() if isinstance(value, dict) else enumerate(value)
        below = [pair for name, part in members for pair in _texts(part, _below(place, str(name)))]
        yield from sorted(below, key=lambda pair: -len(pair[1]))


def _with_whole_characters(value: Any) -> Any:
    """The same with U+FFFD in place of halves of surrogate pairs."""
    if isinstance(value, str):
        return re.sub("[\ud800-\udfff]", "\ufffd", value)
    if isinstance(value, list):
        return [_with_whole_characters(member) for member in value]
    if isinstance(value, dict):
        pairs = value.items()
        return {_with_whole_characters(n): _with_whole_characters(m) for n, m in pairs}
    return value


def _is_unknown(message: str) -> bool:
    return message.startswith(UNKNOWN_KEY)


def _half_characters(value: Any, place: str = "") -> Iterator[str]:
    r"""Faults of texts with half of a surrogate pair (`\ud83d` alone), which no file can hold."""
    if isinstance(value, str):
        if any("\ud800" <= character <= "\udfff" for character in value):
            yield f"{place}: {value!a} is not valid Unicode"
    elif isinstance(value, dict):
        for name, member in value.items():
            yield from _half_characters(name, f"the key {name!a}")
            yield from _half_characters(member, _below(place, name))
    elif isinstance(value, list):
        for index, member in enumerate(value):
            yield from _half_characters(member, _below(place, str(index)))


def _below(place: str, name: str) -> str:
    """The place of a member; an empty name is written as one."""
    return f"{place}.{name or EMPTY}" if place else name or EMPTY


def _place(location: tuple[int | str, ...]) -> str:
    return ".".join(str(part) or EMPTY for part in location) or "(top level)"


def absolute_paths(value: Any, name: str = "") -> Any:
    """Plain data in which every text that is an existing path is replaced by its absolute path.

    A text without a slash is taken as a path only where the setting's name says so.
    """
    if isinstance(value, dict):
        return {key: absolute_paths(part, key) for key, part in value.items()}
    if isinstance(value, list):
        return [absolute_paths(part, name) for part in value]
    if isinstance(value, str) and ("/" in value or name.endswith(("path", "dir", "sets"))):
        try:
            return str(Path(value).resolve()) if value and Path(value).exists() else value
        except OSError:  # a long text with a slash
            return value
    return value


def read_mapping(path: str) -> dict[str, Any]:
    """The object in a JSON or YAML file."""
    file = Path(path)
    if not file.is_file():
        raise UserError(f"{path}: no such config file")
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix in (".yaml", ".yml"):
            data = yaml.safe_load(text)
        else:
            data = json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}, column {error.colno}: {error.msg}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: an object {{...}} was expected at the top level")
    try:
        json.dumps(data)
    except (TypeError, ValueError) as error:  # YAML knows dates, and keys that are no texts
        raise UserError(f"{path}: {error}") from None
    return data


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    for key in keys:
        if keys.count(key) > 1:
            raise ValueError(f"the key {key!r} stands twice in one object")
    return dict(pairs)


def apply_overrides(data: dict[str, Any], overrides: list[str]) -> list[str]:
    """Set each `key.path=value` in `data`. A value that is not JSON is taken as a text.

    Returns:
        The faults of overrides that could not be applied.
    """
    faults = []
    for override in overrides:
        path, equals, text = override.partition("=")
        keys = path.split(".")
        if not equals or not all(keys):
            faults.append(f"override {override!r}: write it as key.path=value")
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text
        target: Any = data
        for key in keys[:-1]:
            target = _child(target, key)
        if isinstance(target, dict):
            target[keys[-1]] = value
        elif isinstance(target, list) and keys[-1].isdecimal() and int(keys[-1]) < len(target):
            target[int(keys[-1])] = value
        else:
            faults.append(f"override {override!r}: {path!r} leads through a plain value")
    return faults


def _child(parent: Any, key: str) -> Any:
    if isinstance(parent, dict):
        if parent.get(key) is None:  # absent, or an object that is null so far
            parent[key] = {}
        return parent[key]
    if isinstance(parent, list) and key.isdecimal() and int(key) < len(parent):
        return parent[int(key)]
    return None
