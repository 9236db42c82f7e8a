"""Which values fit a declared type, from YAML and as words of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pytest

from sdxl_host.errors import ConfigError
from sdxl_host.settings.values import coerce, first_infinite, parse, parse_yaml


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, 1.0),
        (1, int | float, 1),
        (1, float | int, 1),
        (1, float | None, 1.0),
        ([1, 2.5], list[float], [1.0, 2.5]),
        ([1, 2], Sequence[float], [1.0, 2.0]),
        ([1, 2], tuple[float, int], [1.0, 2]),
        ([1, 2], tuple[float, ...], [1.0, 2.0]),
        ({"a": 1}, dict[str, float], {"a": 1.0}),
        ({"a": [1]}, Mapping[str, Any], {"a": [1]}),
        ("x", Any, "x"),
    ],
)
def test_a_value_of_a_file_becomes_the_declared_type(value: Any, hint: Any, expected: Any) -> None:
    made = coerce(value, hint, "here")
    assert made == expected
    assert repr(made) == repr(expected)  # 1 and 1.0 are equal, and not the same here


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (True, Literal[1, 2]),
        (1, Literal[True]),
        (True, int),
        (1, bool),
        ("1", int),
        ([1], tuple[int, int]),
        ([1, 2, 3], tuple[int, int]),
        ([True], list[int]),
        (1, list[int]),
        ([1], dict[str, int]),
        (None, int | str),
    ],
)
def test_a_value_of_another_type_is_refused(value: Any, hint: Any) -> None:
    with pytest.raises(ConfigError, match=r"^here: .* does not fit its type, "):
        coerce(value, hint, "here")


@pytest.mark.parametrize(
    ("text", "hint", "expected"),
    [
        ("5", int | str, 5),
        ("5", str, "5"),
        ("x", int | str, "x"),
        ("None", float | None, None),
        ("none", str | None, "none"),
        ("yes", bool | str, True),
        ("1e-5", float, 1e-5),
        ("2", Literal[1, 2], 2),
        ("[1, 2]", list[int], [1, 2]),
        ("3", list[int], [3]),
        ("{a: 1}", dict[str, int], {"a": 1}),
    ],
)
def test_a_word_is_read_for_the_declared_type(text: str, hint: Any, expected: Any) -> None:
    made = parse(text, hint, "--flag")
    assert made == expected
    assert type(made) is type(expected)


@pytest.mark.parametrize(
    ("text", "hint", "remedy"),
    [
        ("maybe", bool, "give True or False"),
        ("[1", list[int], r"a list is written \[a, b\]"),
        ("a", dict[str, int], r"a mapping is written \{a: 1\}"),
        ("1.5", int, "int"),
        ("3", Literal[1, 2], "one of 1, 2"),
    ],
)
def test_a_word_that_is_none_is_refused_with_a_remedy(text: str, hint: Any, remedy: str) -> None:
    with pytest.raises(ConfigError, match=rf"^--flag .*: does not fit its type, .*{remedy}$"):
        parse(text, hint, "--flag")


def test_yaml_on_the_command_line_knows_numbers_as_files_do() -> None:
    assert parse_yaml("1e-5") == 1e-5
    with pytest.raises(ValueError, match="expected"):
        parse_yaml("[a")


def test_the_first_number_that_is_not_finite_is_found() -> None:
    assert first_infinite([1.0, [2.0, float("inf")]]) == float("inf")
    assert first_infinite([1.0, "nan"]) is None
