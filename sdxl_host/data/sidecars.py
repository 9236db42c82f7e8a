"""Captions that stand beside their images: `cat.png` and `cat.txt` or `cat.caption`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.problems import Listing, Problem
from sdxl_host.data.tree import IMAGE_SUFFIXES, Tree, count, same_name

__all__ = ["WITHOUT_CAPTION", "WITHOUT_IMAGE", "from_sidecars"]

WITHOUT_CAPTION = "an image without a caption"
WITHOUT_IMAGE = "a caption without an image"

# Of several captions of one image the first of these counts.
SUFFIXES = (".txt", ".caption")

# Where files are far away, waiting for one takes longer than reading it.
_THREADS, _FILES_A_TASK = 8, 256


def from_sidecars(tree: Tree) -> Listing:
    """The images of a tree that have a caption beside them; what stands alone is set aside."""
    listing = Listing([])
    shared: list[str] = []
    several: list[str] = []
    with ThreadPoolExecutor(_THREADS) as threads:
        for folder in sorted(tree.files):
            pairs = _paired(folder, tree.files[folder], listing.problems, shared, several)
            texts = threads.map(partial(_texts, tree.root + folder), _slices(pairs))
            read = (text for part in texts for text in part)
            for (image, sidecar), text in zip(pairs, read, strict=True):
                if isinstance(text, str):
                    listing.images.append(
                        Captioned(folder + image, tree.root + folder + image, text)
                    )
                else:
                    listing.problems.append(
                        Problem("a caption that can't be read", folder + sidecar, str(text))
                    )
    if shared:
        listing.notes.append(
            f"{count(len(shared), 'image')} share their caption with another of the same stem, "
            f"such as {shared[0]}; each is taken."
        )
    if several:
        listing.notes.append(
            f"{count(len(several), 'image')} with several captions beside them, such as "
            f"{several[0]}; .txt comes before .caption, and the others are not read."
        )
    return listing


def _paired(
    folder: str, names: set[str], problems: list[Problem], shared: list[str], several: list[str]
) -> list[tuple[str, str]]:
    """(image, its sidecar) of one folder, sorted by image."""
    sidecars: dict[str, str] = {}
    crowded: set[str] = set()
    images: list[tuple[str, str]] = []
    for name in names:
        stem, dot, suffix = name.rpartition(".")
        suffix = (dot + suffix).lower()
        if suffix in IMAGE_SUFFIXES:
            images.append((name, same_name(stem)))
        elif suffix in SUFFIXES:
            stem = same_name(stem)
            other = sidecars.setdefault(stem, name)
            if other is not name:
                crowded.add(stem)
                sidecars[stem] = min(other, name, key=_precedence)
    images.sort()
    pairs: list[tuple[str, str]] = []
    last: dict[str, str] = {}
    for image, stem in images:
        sidecar = sidecars.get(stem)
        if sidecar is None:
            problems.append(Problem(WITHOUT_CAPTION, folder + image))
            continue
        pairs.append((image, sidecar))
        if last.setdefault(stem, image) is not image:
            shared.append(folder + image)
        if stem in crowded:
            several.append(folder + image)
    lonely = sorted(sidecar for stem, sidecar in sidecars.items() if stem not in last)
    problems.extend(Problem(WITHOUT_IMAGE, folder + sidecar) for sidecar in lonely)
    return pairs


def _precedence(sidecar: str) -> tuple[int, bool, str]:
    suffix = sidecar[sidecar.rindex(".") :]
    return SUFFIXES.index(suffix.lower()), suffix != suffix.lower(), sidecar


def _slices(pairs: Sequence[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    left = iter(pairs)
    while part := list(islice(left, _FILES_A_TASK)):
        yield part


def _texts(folder: str, pairs: Sequence[tuple[str, str]]) -> list[str | Exception]:
    """The text of each sidecar, or why it can't be read."""
    found: list[str | Exception] = []
    for _, sidecar in pairs:
        try:
            with open(folder + sidecar, "rb", buffering=0) as stream:
                found.append(stream.read().decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            found.append(ValueError(f"not UTF-8 text: {error}"))
        except OSError as error:
            found.append(error)
    return found
