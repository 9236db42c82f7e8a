"""Flags are read alike for every command, and wrong ones are named with the remedy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from sdxl_host.commands.flags import Command, flag_rows
from sdxl_host.errors import ConfigError
from sdxl_host.settings.options import option


@dataclass
class Flags:
    """One flag of each kind."""

    out: Path | None = option(None, help="a folder [here]")
    word: str = option("", help="a word")
    kind: Literal["one", "two"] | None = option(None, help="which")
    number_of: int = option(3, help="a count", minimum=1)
    scale: float = option(1.0, help="a factor", minimum=0.0)
    is_on: bool = option(False, help="a switch")
    maybe: bool | None = option(None, help="a switch [the model's]")
    item: list[str] = option([], help="given once for each")


CLOSED = Command("try", "Tries.", Flags)
WITH_ARGUMENTS = Command("try", "Tries.", Flags, arguments={"SRC": "a source", "DST": "a target"})
OPEN = Command("try", "Tries.", Flags, rest="arguments of sdxl-host train")


def read(command: Command, *words: str) -> tuple[Any, ...]:
    """What the command's function is called with."""
    calls: list[tuple[Any, ...]] = []

    def function(*given: Any) -> int:
        calls.append(given)
        return 7

    assert command.run(words, function) == 7
    return calls[0]


def refused(command: Command, *words: str) -> str:
    with pytest.raises(ConfigError) as error:
        command.run(words, lambda *given: 0)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "name", "value"),
    [
        (["--out", "a/b"], "out", Path("a/b")),
        (["--out=~/b"], "out", Path("~/b").expanduser()),
        (["--word", "x y"], "word", "x y"),
        (["--word="], "word", ""),
        (["--word=a=b"], "word", "a=b"),
        (["--word", "7"], "word", "7"),
        (["--kind", "two"], "kind", "two"),
        (["--number_of=2"], "number_of", 2),
        (["--number-of", "2"], "number_of", 2),
        (["--scale", "2"], "scale", 2.0),
        (["--scale", "1e-3"], "scale", 1e-3),
        (["--is_on"], "is_on", True),
        (["--is_on", "False"], "is_on", False),
        (["--is_on=no"], "is_on", False),
        (["--maybe", "false"], "maybe", False),
        (["--maybe"], "maybe", True),
        (["--item", "[a]", "--item=b, c"], "item", ["[a]", "b, c"]),
    ],
)
def test_a_value_is_read_as_its_type(words: list[str], name: str, value: Any) -> None:
    (given,) = read(CLOSED, *words)
    assert getattr(given, name) == value
    assert type(getattr(given, name)) is type(value)
    assert given == Flags(**{name: value})  # the others keep their defaults


def test_a_switch_takes_no_argument_for_its_value() -> None:
    given, source, target = read(WITH_ARGUMENTS, "--is_on", "a", "--maybe", "--word", "w", "b")
    assert (given, source, target) == (Flags(is_on=True, maybe=True, word="w"), "a", "b")


def test_what_else_may_follow_is_handed_on_in_order() -> None:
    words = ["--seed", "1", "--word=w", "train.x=2", "--is_on", "--snr_gamma=3", "--item", "i"]
    given, rest = read(OPEN, *words)
    assert given == Flags(word="w", is_on=True, item=["i"])
    assert rest == ["--seed", "1", "train.x=2", "--snr_gamma=3"]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        (CLOSED, ["--wrod", "x"], "--wrod: there is no such flag (did you mean word?); "),
        (CLOSED, ["--wor", "x"], "--wor: there is no such flag"),  # a longer name is not guessed
        (CLOSED, ["x"], "x: not understood; sdxl-host try --help"),
        (CLOSED, ["--word"], "--word: needs a value (str)"),
        (CLOSED, ["--out", "--is_on"], "--out: needs a value (Path)"),
        (CLOSED, ["--out", " "], "--out: is empty"),
        (CLOSED, ["--word=a", "--word", "b"], "--word: given twice; give it once"),
        (CLOSED, ["--is_on", "--is-on"], "--is_on: given twice; give it once"),
        (CLOSED, ["--is_on=perhaps"], "--is_on perhaps: does not fit its type, bool; give True"),
        (CLOSED, ["--is_on", "perhaps"], "perhaps: not understood"),
        (CLOSED, ["--kind", "three"], "--kind three: does not fit its type, one of one, two"),
        (CLOSED, ["--number_of", "x"], "--number_of x: does not fit its type, int"),
        (CLOSED, ["--number_of", "0"], "--number_of: 0 is out of range; it must be at least 1"),
        (CLOSED, ["--number_of", "-1"], "--number_of: -1 is out of range"),
        (CLOSED, ["--scale", "nan"], "--scale: nan is not a finite number"),
        (WITH_ARGUMENTS, ["a"], "DST: is missing; sdxl-host try --help"),
        (WITH_ARGUMENTS, ["a", "b", "c"], "c: not understood"),
        (OPEN, ["--word"], "--word: needs a value (str)"),
    ],
)
def test_a_wrong_flag_is_refused_by_name(command: Command, words: list[str], message: str) -> None:
    assert refused(command, *words).startswith(message)


@pytest.mark.parametrize("word", ["-h", "--help"])
def test_help_calls_nothing(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert WITH_ARGUMENTS.run(["a", word, "--wrod"], lambda *given: 1) == 0
    usage, _, about, *_ = capsys.readouterr().out.splitlines()
    assert usage == "usage: sdxl-host try SRC DST [--flag VALUE ...]"
    assert about == "Tries."


def test_help_shows_arguments_types_help_and_defaults() -> None:
    text = WITH_ARGUMENTS.help()
    assert "  SRC                           a source\n" in text
    rows = dict(flag_rows(Flags))
    assert rows["--number_of int"] == "a count [3]"
    assert rows["--is_on bool"] == "a switch [False]"
    # Nothing that is left out has a default to show.
    assert rows["--kind one of one, two"] == "which"
    assert rows["--word str"] == "a word"
    assert rows["--item list[str]"] == "given once for each"
    assert all(term in text for term in rows)
    assert OPEN.help().startswith("usage: sdxl-host try [arguments of sdxl-host train] [--flag")
