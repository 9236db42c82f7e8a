"""What a source of captioned images holds, in whichever of the forms it is."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from sdxl_host.data.captioned import Captioned
from sdxl_host.data.problems import Listing
from sdxl_host.data.shards import COMPRESSED, from_shards
from sdxl_host.data.sidecars import from_sidecars
from sdxl_host.data.tables import from_tables
from sdxl_host.data.tree import IMAGE_SUFFIXES, Tree, count, walk
from sdxl_host.errors import DataError, in_brief

__all__ = ["read_folder"]

# Endings of images that Pillow by itself can't read, or that users take for images.
_OTHER_IMAGES = (".heic", ".heif", ".jfif", ".jp2", ".jxl", ".psd", ".svg", ".svgz", ".tga")

_METADATA = ("metadata.jsonl", "metadata.csv")


def read_folder(source: Path) -> Listing:
    """The captioned images of a folder or of one .tar shard, sorted by name.

    The first of these forms that is there is taken, and what it passes over is said:
    `metadata.jsonl` or `metadata.csv`, in the folder, in `train/` below it, or in any subfolder;
    the folder's one other `.csv`; a `.txt` or `.caption` beside each image; WebDataset shards.
    An image without a caption and a caption without an image are set aside.
    Raises DataError, naming file and remedy, for a source without one captioned image, a table with
    a line that can't be understood, and an image that is captioned twice.
    """
    if source.name.lower().endswith(COMPRESSED):
        _refuse_compressed(source, [source.name])
    if source.is_file() and source.suffix.lower() == ".tar":
        listing = from_shards(os.path.join(source.parent, ""), [source.name])
        return _checked(source, listing)
    if not source.is_dir():
        raise DataError(f"data_path {source}: there is no such folder, nor a .tar file")
    try:
        tree = walk(str(source))
    except OSError as error:
        raise DataError(
            f"data_path {source}: can't be read ({error.strerror}); make it readable"
        ) from error
    listing = _read(source, tree)
    listing.problems += tree.problems
    listing.notes += tree.notes
    others = tree.ending(*_OTHER_IMAGES)
    if others:
        listing.notes.append(
            f"{count(len(others), 'file')} in formats that are not read, such as {others[0]}."
        )
    return _checked(source, listing)


def _read(source: Path, tree: Tree) -> Listing:
    """What the tree holds in the first form that is there."""
    tables = [path for path in tree.ending(*_METADATA) if os.path.basename(path) in _METADATA]
    if tables:
        return _from_metadata(tree, tables)
    tables = _top_tables(tree)
    if len(tables) > 1:
        some = ", ".join([*tables[:3], *(["..."] if len(tables) > 3 else [])])
        raise DataError(
            f"data_path {source}: holds {len(tables)} caption tables ({some}); leave one"
        )
    if tables:
        listing = from_tables(tree, tables)
        _say_passed_over(listing, tables[0], tree.ending(".txt", ".caption", ".tar"))
        return listing
    listing = from_sidecars(tree)
    shards = tree.ending(".tar", *COMPRESSED)
    if listing.images or not shards:
        _say_passed_over(listing, "captions beside images", shards)
        return listing
    split, chosen = _split(shards)
    compressed = [shard for shard in chosen if shard.lower().endswith(COMPRESSED)]
    if compressed:
        _refuse_compressed(source, compressed)
    found = from_shards(tree.root, chosen)
    found.problems += listing.problems
    _say_split(found, split, len(shards) - len(chosen), "shard")
    return found


def _from_metadata(tree: Tree, tables: list[str]) -> Listing:
    """What the metadata files say: of one folder, its jsonl."""
    lines = {table for table in tables if table.endswith(".jsonl")}
    doubled = {table for table in tables if f"{table.removesuffix('csv')}jsonl" in lines}
    split, chosen = _split([t for t in tables if t not in doubled])
    passed = sorted(doubled.union(_top_tables(tree)).difference(chosen))
    part = tree.below(split)
    listing = from_tables(part, chosen)
    outside = sum(len(names) for names in tree.files.values()) - sum(
        len(names) for names in part.files.values()
    )
    _say_split(listing, split, outside, "file")
    _say_passed_over(listing, chosen[0], passed + tree.ending(".txt", ".caption", ".tar"))
    return listing


def _top_tables(tree: Tree) -> list[str]:
    return sorted(name for name in tree.files[""] if name.lower().endswith(".csv"))


def _split(paths: list[str]) -> tuple[str, list[str]]:
    """("train/", the paths below it) where some are and none is at the top; else ("", all)."""
    trained = [path for path in paths if path.startswith("train/")]
    if trained and all("/" in path for path in paths):
        return "train/", trained
    return "", paths


def _say_split(listing: Listing, split: str, left: int, what: str) -> None:
    if split and left:
        listing.notes.append(f"{count(left, what)} outside of train/ not read.")


def _say_passed_over(listing: Listing, first: str, passed: list[str]) -> None:
    """That files which could hold captions are not read, because of what comes before them."""
    if passed:
        listing.notes.append(
            f"{count(len(passed), 'file')} not read, such as {passed[0]}, because {first} "
            f"come{'' if first.endswith('images') else 's'} before."
        )


def _checked(source: Path, listing: Listing) -> Listing:
    """The listing, sorted, with a note on empty captions. Raises DataError where no image is left,
    or one is there twice."""
    if not listing.images:
        kinds = Counter(problem.kind for problem in listing.problems)
        first = {p.kind: p.name for p in reversed(listing.problems)}
        found = [f"{n:,} x {kind} ({first[kind]})" for kind, n in kinds.most_common()]
        raise DataError(
            f"data_path {source}: holds no captioned image"
            f"{', but ' + in_brief(found, 3) if found else ''}; put images "
            f"({', '.join(IMAGE_SUFFIXES)}) there, each with a .txt beside it, or a "
            "metadata.jsonl, a .csv or .tar shards"
        )
    listing.images.sort(key=lambda image: image.name)
    previous = ""
    for image in listing.images:
        if image.name == previous:
            raise DataError(f"data_path {source}: {previous} is captioned twice; keep one caption")
        previous = image.name
    empty = [image.name for image in listing.images if not any(_texts(image))]
    if empty:
        listing.notes.append(
            f"{count(len(empty), 'image')} with an empty caption, such as {empty[0]}."
        )
    return listing


def _texts(image: Captioned) -> Iterable[str]:
    texts = (image.text,) if isinstance(image.text, str) else image.text
    return (text for text in texts if text and not text.isspace())


def _refuse_compressed(source: Path, shards: list[str]) -> None:
    raise DataError(
        f"data_path {source}: {in_brief(shards, 3)}: compressed, and samples are read in any "
        "order; unpack to plain .tar"
    )
