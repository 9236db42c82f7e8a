"""What the data is: sizes, shapes, what a crop loses, what is set aside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from sdxl_host.data.buckets import bucket_sizes, crop_losses, nearest
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.problems import Problem
from sdxl_host.errors import in_brief

__all__ = ["Aspects", "aspects", "data_rows", "problem_rows", "size_rows"]

_EXAMPLES = 3  # of each kind of problem

# Width over height of an image, at whose edges the rows of the histogram meet.
_EDGES = (0.5, 2 / 3, 0.8, 0.95, 1.05, 1.25, 1.5, 2.0)
_EDGE_NAMES = ("1:2", "2:3", "4:5", "0.95", "1.05", "5:4", "3:2", "2:1")


@dataclass(frozen=True)
class Aspects:
    """How many images are between two aspects; `name` says which, as width : height."""

    name: str
    images: int
    share: float


def aspects(sizes: np.ndarray) -> list[Aspects]:
    """The histogram of width over height. sizes: (N, 2) heights and widths."""
    ratios = sizes[:, 1] / sizes[:, 0]
    # A ratio that is an edge, but for rounding, belongs to the row above it.
    rows = np.bincount(np.searchsorted(np.array(_EDGES) - 1e-9, ratios), minlength=len(_EDGES) + 1)
    names = [f"below {_EDGE_NAMES[0]}"]
    names += [f"{low} to {high}" for low, high in pairwise(_EDGE_NAMES)]
    names += [f"from {_EDGE_NAMES[-1]}"]
    return [
        Aspects(name, count, count / len(sizes))
        for name, count in zip(names, rows.tolist(), strict=True)
    ]


def size_rows(names: Sequence[str], sizes: np.ndarray) -> list[tuple[str, str]]:
    """The median, smallest and largest image, and what a square crop loses.

    sizes: (N, 2) heights and widths of the images of those names.
    """
    area = sizes.prod(axis=1, dtype=np.int64)
    small, large = int(area.argmin()), int(area.argmax())
    height, width = np.median(sizes, axis=0).astype(int)
    losses = crop_losses(sizes, (1, 1))
    worst = int(losses.argmax())
    rows = [
        ("sizes", f"median {height}x{width}, height x width"),
        ("", f"smallest {sizes[small, 0]}x{sizes[small, 1]} ({names[small]})"),
        ("", f"largest {sizes[large, 0]}x{sizes[large, 1]} ({names[large]})"),
        ("square crop", f"loses {100 * losses.mean():.1f} % of an image's pixels on average"),
    ]
    if losses[worst] > 0:
        rows.append(("", f"and {100 * losses[worst]:.1f} % of {names[worst]}, the most"))
    # Whatever the resolution: the shapes of the buckets are about those at SDXL's own.
    buckets = bucket_sizes(1024, 64)
    in_buckets = crop_losses(sizes, np.array(buckets)[nearest(sizes, buckets)])
    rows.append(("", f"with --buckets True {100 * in_buckets.mean():.1f} % on average"))
    return rows


def problem_rows(problems: Iterable[Problem], where: str = "") -> list[tuple[str, str]]:
    """What is set aside: a row with the count of all, and one a kind with its first examples.

    where: what has them all, if anything.
    """
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    if not kinds:
        return []
    count = sum(map(len, kinds.values()))
    rows = [("set aside", f"{count:,}" + (f", all listed in {where}" if where else ""))]
    for kind, ones in sorted(kinds.items(), key=lambda item: -len(item[1])):
        first = [
            f"{one.name}: {one.detail}" if one.detail else one.name for one in ones[:_EXAMPLES]
        ]
        more = [""] * (len(ones) - len(first))
        rows.append(("", f"{len(ones):,} x {kind} ({in_brief([*first, *more], _EXAMPLES)})"))
    return rows


def data_rows(dataset: Text2ImageDataset, where: str = "") -> list[tuple[str, str]]:
    """The images, and what is set aside of the source. where: what lists all of it."""
    rows = _bucket_rows(dataset) if dataset.is_bucketed else []
    rows += problem_rows(dataset.problems, where)
    notes = [*dataset.notes, *dataset.captions.notes(dataset.images)]
    rows += [("note", note) for note in notes]
    if not dataset.is_demo:
        return [("data", f"{len(dataset):,} captioned images"), *rows]
    return [
        ("data", f"{len(dataset):,} captioned images that the package carries"),
        ("", "(Fluent Emoji 3D, MIT, Microsoft); --data_path FOLDER trains on yours"),
        *rows,
    ]


def _bucket_rows(dataset: Text2ImageDataset) -> list[tuple[str, str]]:
    """How many images have which size; each size is a graph."""
    graphs = len(dataset.sizes)
    return [
        ("buckets", f"{graphs}, each a shape of its own that is compiled once"),
        *(
            ("", f"{width}x{height}: {count:,} images, of which cropping takes {loss:.1%}")
            for (height, width), count, loss in dataset.bucket_rows()
        ),
    ]
