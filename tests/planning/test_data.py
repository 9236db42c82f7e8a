"""Facts of the data, by hand."""

from __future__ import annotations

import numpy as np

from sdxl_host.data.problems import Problem
from sdxl_host.planning.data import aspects, problem_rows, size_rows


def test_each_aspect_has_one_row_and_an_edge_belongs_to_the_row_above_it() -> None:
    widths = [49, 50, 66, 67, 80, 95, 100, 105, 125, 149, 150, 199, 200, 900]
    rows = aspects(np.array([[100, width] for width in widths]))
    assert [(row.name, row.images) for row in rows] == [
        ("below 1:2", 1),
        ("1:2 to 2:3", 2),
        ("2:3 to 4:5", 1),
        ("4:5 to 0.95", 1),
        ("0.95 to 1.05", 2),
        ("1.05 to 5:4", 1),
        ("5:4 to 3:2", 2),
        ("3:2 to 2:1", 2),
        ("from 2:1", 2),
    ]
    assert [row.share for row in rows[:2]] == [1 / 14, 2 / 14]


def test_sizes_name_the_smallest_and_the_largest() -> None:
    sizes = np.array([[100, 100], [50, 300], [200, 100]])
    assert size_rows(["a", "b", "c"], sizes) == [
        ("sizes", "median 100x100, height x width"),
        ("", "smallest 100x100 (a)"),
        ("", "largest 200x100 (c)"),
        ("square crop", f"loses {100 * (5 / 6 + 1 / 2) / 3:.1f} % of an image's pixels on average"),
        ("", "and 83.3 % of b, the most"),
        # 1:6 is cropped to 1:4; the others have buckets of their own shape.
        ("", "with --buckets True 11.1 % on average"),
    ]


def test_problems_are_counted_by_kind_the_most_first_with_three_examples() -> None:
    assert problem_rows([]) == []
    found = [Problem("empty", "z.png"), *(Problem("cut", f"{n}.png", "half") for n in range(5))]
    assert problem_rows(found, "all.jsonl") == [
        ("set aside", "6, all listed in all.jsonl"),
        ("", "5 x cut (0.png: half; 1.png: half; 2.png: half; and 2 more)"),
        ("", "1 x empty (z.png)"),
    ]
    assert problem_rows(found)[0] == ("set aside", "6")
