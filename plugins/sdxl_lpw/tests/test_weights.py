"""The syntax of prompt weights."""

from __future__ import annotations

import pytest

from sdxl_lpw.weights import parse_weights


@pytest.mark.parametrize(
    ("prompt", "runs"),
    [
        # The examples that the convention's own documentation gives.
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.573),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.55),
                (", sun, ", 1.1),
                ("sky", 1.4641),
                (".", 1.1),
            ],
        ),
        # And the rest of its rules.
        ("((x))", [("x", 1.21)]),
        ("(x:1.3)", [("x", 1.3)]),
        ("(x: .5 )", [("x", 0.5)]),
        ("(x:-1)", [("x", -1.0)]),
        ("[x]", [("x", 1 / 1.1)]),
        ("[[x] y", [("x", 1 / 1.21), (" y", 1 / 1.1)]),
        (r"\\ \[ \) a\b", [(r"\ [ ) a\b", 1.0)]),
        ("a) b] c:2) d: e", [("a) b] c:2) d: e", 1.0)]),
        ("(a [b) c]", [("a ", 1.1), ("b", 1.0), (" c", 1 / 1.1)]),
        ("(two\nlines)", [("two\nlines", 1.1)]),
        ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
        ("", []),
    ],
)
def test_the_syntax_of_weights(prompt: str, runs: list[tuple[str, float]]) -> None:
    (section,) = parse_weights(prompt)
    assert [text for text, _ in section] == [text for text, _ in runs]
    assert [weight for _, weight in section] == pytest.approx([weight for _, weight in runs])


def test_break_parts_a_prompt_also_inside_brackets() -> None:
    assert parse_weights("a BREAK b") == [[("a", 1.0)], [("b", 1.0)]]
    assert parse_weights("(a\nBREAK b)c") == [[("a", 1.1)], [("b", 1.1), ("c", 1.0)]]
    assert parse_weights("BREAKFAST") == [[("BREAKFAST", 1.0)]]
    assert parse_weights("a BREAK") == [[("a", 1.0)], []]
