"""What is printed is aligned, whatever the lengths of its parts."""

from __future__ import annotations

import pytest

from sdxl_host.commands.printer import columns, definitions, details, lines_of, tenth_lines
from sdxl_host.planning.curves import Quarters, Tenth


def test_labels_stand_in_a_column_and_an_empty_one_goes_on() -> None:
    assert lines_of(("plugins", "edm, snr")) == ["plugins     edm, snr"]
    assert lines_of(("", "more")) == [" " * 12 + "more"]
    assert lines_of(("importlib-metadata", "9")) == ["importlib-metadata 9"]
    assert lines_of(("note", "")) == ["note"]
    assert lines_of("a sentence") == ["a sentence"]


def test_details_have_their_texts_in_the_same_column() -> None:
    rows = [("longest", "4"), ("", "and more")]
    assert details(rows) == ["  longest   4", " " * 12 + "and more"]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    rows = [("name", "count", "of"), ("a", "12", "a longer cell"), ("longer", "1", "")]
    assert columns(rows, "<>") == [
        "name    count  of",
        "a          12  a longer cell",
        "longer      1",
    ]
    assert columns([("a", "b")], "<", indent=2) == ["  a  b"]


def test_definitions_are_wrapped_beside_their_terms() -> None:
    lines = definitions([("--short", "word " * 30), ("--a_name_that_is_too_long_for_it int", "x")])
    assert lines[0].startswith("  --short" + " " * 23 + "word word")
    assert lines[1].startswith(" " * 32 + "word")
    assert max(map(len, lines)) <= 100
    assert lines[-2:] == ["  --a_name_that_is_too_long_for_it int", " " * 32 + "x"]


def quarters(is_changed: bool) -> Quarters:
    return Quarters(
        ([0.25] * 4, [0.2, 0.2, 0.2, 0.4]), ([1.0, 0, 0, 0], [0.25] * 4), (1.0, 0.2071), is_changed
    )


def test_quarters_are_shown_without_plugins_and_with_them() -> None:
    assert lines_of(quarters(is_changed=True)) == [
        "curves      quarters of the timesteps, clean to noisy; without plugins -> with them",
        "  draws p    25.0  25.0  25.0  25.0 %  ->   20.0  20.0  20.0  40.0 %",
        "  p*w       100.0   0.0   0.0   0.0 %  ->   25.0  25.0  25.0  25.0 %",
        "  mean w    1.000  ->  0.207",
    ]


def test_where_plugins_change_nothing_one_side_is_shown() -> None:
    lines = lines_of(quarters(is_changed=False))
    assert lines[0].endswith("clean to noisy")
    assert lines[1] == "  draws p    25.0  25.0  25.0  25.0 %"
    assert lines[3] == "  mean w    1.000"


def tenth(share: tuple[float, float], weight: tuple[float, float] = (1.0, 0.487)) -> Tenth:
    return Tenth(100, 199, (0.3441, 0.5693), (0.1, 0.16), weight, share)


def test_tenths_are_a_table_with_bars_in_proportion() -> None:
    """The longest bar has 24 characters; `|` is where the bar without plugins ends."""
    head, first, second, third = tenth_lines([tenth((0.1, 0.4)), tenth((0.2, 0.1)), tenth((0, 0))])
    assert head.split() == ["timesteps", "sigma", "draws", "p,", "%", "weight", "w", "p*w,", "%"]
    assert " ".join(first.split()[:11]) == (
        "100-199 0.344-0.569 10.0 -> 16.0 1.000 -> 0.487 10.0 -> 40.0"
    )
    assert first.endswith("  " + "#" * 6 + "|" + "#" * 17)
    assert second.endswith("  " + "#" * 6 + " " * 6 + "|")
    assert third.endswith("  |")
    assert len({line.index("->") for line in (first, second, third)}) == 1


@pytest.mark.parametrize(
    ("weight", "shown"), [(0.0, "0.000"), (0.00012, "0.00012"), (1234.5, "1.2e+03")]
)
def test_weights_keep_digits_that_say_something(weight: float, shown: str) -> None:
    assert shown in tenth_lines([tenth((0, 0), (weight, 1.0))])[1].split()
