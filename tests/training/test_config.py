"""Strict configs: every fault with its place, the nearest valid name, overrides, repeats."""

import json
import re
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from training.config import (
    Count,
    Fraction,
    Positive,
    StrictModel,
    absolute_paths,
    apply_overrides,
    check_config,
    expanded,
    load_config,
    read_mapping,
)
from training.errors import UserError, did_you_mean


class Inner(StrictModel):
    width: Positive = 1.0
    kind: Literal["round", "square"] = "round"

    def faults(self) -> list[str]:
        return ["width: too wide"] if self.width > 100 else []


class Outer(StrictModel):
    name: str
    count: Count = 1
    share: Fraction = 0.5
    flag: bool = False
    inner: Inner = Inner()
    several: Annotated[tuple[Inner, ...], Field(strict=False)] = ()

    def faults(self) -> list[str]:
        found = super().faults()
        if self.flag and self.count > 1:
            found.append("flag: contradicts count")
        return found


def faults_of(data: dict) -> list[str]:
    with pytest.raises(UserError) as caught:
        check_config(Outer, data, heading="config:")
    return caught.value.faults


def test_a_sound_config_is_typed_and_frozen() -> None:
    config = check_config(
        Outer, {"name": "x", "inner": {"width": 2}, "several": [{"kind": "square"}]}, "config:"
    )
    assert config == Outer(name="x", inner=Inner(width=2.0), several=(Inner(kind="square"),))
    with pytest.raises(Exception, match="frozen"):
        config.count = 3  # type: ignore[misc]


def test_an_unknown_key_names_its_place_and_the_nearest_valid_name() -> None:
    assert faults_of({"name": "x", "cuont": 2}) == ["cuont: unknown key; did you mean 'count'?"]
    assert faults_of({"name": "x", "inner": {"witdh": 2.0}}) == [
        "inner.witdh: unknown key; did you mean 'width'?"
    ]
    assert faults_of({"name": "x", "several": [{}, {"zzz": 1}]}) == [
        "several.1.zzz: unknown key; known here: kind, width"
    ]


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"count": "2"}, "count"),
        ({"count": 2.5}, "count"),
        ({"count": True}, "count"),
        ({"count": 0}, "count"),
        ({"share": 1.5}, "share"),
        ({"share": "0.5"}, "share"),
        ({"share": float("nan")}, "share"),
        ({"share": float("inf")}, "share"),
        ({"flag": 1}, "flag"),
        ({"flag": "true"}, "flag"),
        ({"name": None}, "name"),
        ({"name": 3}, "name"),
        ({"inner": [1]}, "inner"),
        ({"inner": {"kind": "triangle"}}, "inner.kind"),
        ({"several": {"width": 1}}, "several"),
    ],
)
def test_a_wrong_type_or_value_is_never_converted(entry: dict, place: str) -> None:
    (fault,) = faults_of({"name": "x"} | entry)
    assert fault.startswith(f"{place}: ")


def test_a_missing_key_is_named() -> None:
    assert faults_of({}) == ["name: Field required"]


def test_every_fault_stands_in_one_message() -> None:
    inner = {"width": 200.0, "kind": "oval"}
    data = {"name": "x", "cuont": 2, "count": "a", "inner": inner, "share": 2.0}
    message = str(UserError(faults_of(data), "config:"))
    for place in ("cuont", "count", "inner.kind", "inner.width", "share"):
        assert f"  - {place}: " in message


def test_contradictions_are_found_beside_other_faults() -> None:
    data = {"name": "x", "flag": True, "count": 2, "cuont": 1, "several": [{"width": 101.0}]}
    assert faults_of(data) == [
        "cuont: unknown key; did you mean 'count'?",
        "several.0.width: too wide",
        "flag: contradicts count",
    ]


def test_overrides() -> None:
    several = [{"width": 1.0}, {"width": 1.0}]
    data: dict = {"name": "x", "several": several, "null": None}
    faults = apply_overrides(
        data,
        [
            "count=3",
            "share=1e-1",
            "flag=true",
            "name=plain text",
            "inner.width=2",
            "several.1.width=7",
            'several.0={"kind": "square"}',
            "new.deep.key=null",
            "with=a=b",
            "null.width=2",
        ],
    )
    assert faults == []
    assert data == {
        "count": 3,
        "share": 0.1,
        "flag": True,
        "name": "plain text",
        "inner": {"width": 2},
        "several": [{"kind": "square"}, {"width": 7}],
        "new": {"deep": {"key": None}},
        "with": "a=b",
        "null": {"width": 2},
    }


def test_overrides_that_cannot_be_applied() -> None:
    data = {"name": "x", "several": [{}]}
    faults = apply_overrides(data, ["count", "=3", "a..b=1", "name.first=1", "several.1=1"])
    assert faults == [
        "override 'count': write it as key.path=value",
        "override '=3': write it as key.path=value",
        "override 'a..b=1': write it as key.path=value",
        "override 'name.first=1': 'name.first' leads through a plain value",
        "override 'several.1=1': 'several.1' leads through a plain value",
    ]
    assert data == {"name": "x", "several": [{}]}


def test_faults_of_overrides_and_of_the_file_come_together(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"name": "x", "cuont": 1}))
    with pytest.raises(UserError, match=re.escape(f"{file} cannot be used:")) as caught:
        load_config(Outer, str(file), ["nonsense", "inner.witdh=3"])
    assert set(caught.value.faults) == {
        "override 'nonsense': write it as key.path=value",
        "cuont: unknown key; did you mean 'count'?",
        "inner.witdh: unknown key; did you mean 'width'?",
    }


def test_json_and_yaml_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"name": "x", "inner": {"width": 2}}')
    (tmp_path / "a.yaml").write_text("name: x\ninner:\n  width: 2\n")
    both = [load_config(Outer, str(tmp_path / name), []) for name in ("a.json", "a.yaml")]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"name": "x",}', "line 1, column"),
        ('{\n"name" "x"}', "line 2, column 8"),
        ('["name"]', "an object {...} was expected"),
        ('{"inner": {"a": 1, "a": 2}}', "'a' stands twice"),
        ("", "line 1, column 1"),
    ],
)
def test_files_that_are_no_config(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(text)
    with pytest.raises(UserError, match=re.escape(message)):
        read_mapping(str(file))


def test_broken_yaml_binary_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("name: [1")
    (tmp_path / "binary.json").write_bytes(b"\xff\xfe\x00")
    for name in ("bad.yaml", "binary.json", "missing.json"):
        with pytest.raises(UserError, match=name):
            read_mapping(str(tmp_path / name))


def test_nearest_names() -> None:
    assert did_you_mean("learning_rte", ["learning_rate", "seed"]) == (
        "; did you mean 'learning_rate'?"
    )
    assert did_you_mean("q", ["b", "a"]) == "; known here: a, b"


def test_a_list_of_known_names_is_given_once() -> None:
    assert faults_of({"name": "x", "several": [{"zzz": 1}, {"qqq": 1}], "yyy": 2}) == [
        "several.0.zzz: unknown key; known here: kind, width",
        "several.1.qqq: unknown key",
        "yyy: unknown key; known here: count, flag, inner, name, several, share",
    ]


def test_paths_expand_as_in_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ü")
    monkeypatch.setenv("DATA", "/data")
    assert expanded("~/runs") == "/home/ü/runs"
    assert expanded("$DATA/${DATA}x") == "/data//datax"
    assert expanded("owner/name") == "owner/name"
    assert expanded("a~b/$") == "a~b/$"
    with pytest.raises(ValueError, match=r"\$NO_SUCH: the variable \$NO_SUCH is not set"):
        expanded("$NO_SUCH")
    with pytest.raises(ValueError, match="no home directory is known for ~nobody_here"):
        expanded("~nobody_here/x")


def test_existing_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    data = {"model_name_or_path": "a", "description": "a", "sources": [{"path": "a/b"}, "c/d"]}
    assert absolute_paths(data) == {
        "model_name_or_path": f"{tmp_path}/a",
        "description": "a",
        "sources": [{"path": f"{tmp_path}/a/b"}, "c/d"],
    }
