"""`sdxl-host data`: what a folder of captioned images holds, and what the network gets of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_host.commands.data_facts import data_facts
from sdxl_host.commands.flags import Command
from sdxl_host.commands.image_file import check_out, unwritable
from sdxl_host.commands.printer import show
from sdxl_host.errors import ConfigError
from sdxl_host.settings.options import option

if TYPE_CHECKING:
    import numpy as np

    from sdxl_host.data.dataset import Text2ImageDataset

__all__ = ["data"]

_SHOWN = 32  # images of the contact sheet
_STEP = 32  # what SDXL's networks downsample by
_THUMBNAIL = 192  # pixels of its longer side

# A caption has 75 of the 77 tokens of CLIP; the others say where it begins and ends.
_TOKENS = 75
_CAPTIONS = 50_000  # that are counted; of more, every second, third and so on


@dataclass
class Flags:
    """The flags of `sdxl-host data`."""

    resolution: int = option(1024, help="side of the square that the network gets", minimum=8)
    buckets: bool = option(
        False, help="as --buckets of sdxl-host train: the aspect ratios of SDXL, not a square"
    )
    workers: int = option(2, help="threads that look at images", minimum=1)
    out: Path = option(
        Path("data.png"), help=f"PNG file, what the network gets of up to {_SHOWN} images"
    )


_COMMAND = Command(
    "data",
    "Looks at every image of a folder, as sdxl-host train does before it starts: what can't be "
    "used and why, sizes and aspects, what a square crop loses, how long captions are; and draws "
    "what the network gets, cropped as the released configs crop.",
    Flags,
    arguments={"DIR": "captioned images, as for --data_path"},
    notes="What was found is remembered, so a second look is instant.",
)


def data(arguments: Sequence[str]) -> int:
    """Shows what is in a folder; returns the exit code."""
    return _COMMAND.run(arguments, _data)


def _data(flags: Flags, folder: str) -> int:
    from sdxl_host.data.dataset import Text2ImageDataset
    from sdxl_host.training.data_check import look

    if not folder.strip():
        raise ConfigError("DIR: is empty, as an unset variable is; give a folder of images")
    check_out(flags.out)
    dataset = Text2ImageDataset(flags.resolution, _transforms(flags.resolution), folder)
    look(dataset, flags.workers, 1.0, show)
    if flags.buckets:
        dataset.use_buckets(min(_STEP, flags.resolution))
    show(*data_facts(dataset), *_caption_rows(dataset))
    _draw(flags.out, dataset)
    show(("drawn", str(flags.out)))
    return 0


def _transforms(side: int) -> list[dict[str, Any]]:
    """The transforms of the released configs."""
    return [
        {"target": "sdxl_host.Resize", "params": {"size": side, "interpolation": 3}},
        {"target": "sdxl_host.Rescaler"},
        {"target": "sdxl_host.AddOriginalImageSizeAsTupleAndCropToSquare"},
        {"target": "sdxl_host.Transpose"},
    ]


def _caption_rows(dataset: Text2ImageDataset) -> list[tuple[str, str]]:
    """How long captions are, and how many are cut."""
    import numpy as np

    from sdxl_host.models.tokenizer import tokenize
    from sdxl_host.planning.captions import some_captions

    tokens: dict[str, int] = {}  # each caption is counted once, by the first image that has it
    names: dict[str, str] = {}
    images = some_captions(dataset, _CAPTIONS)
    for name, variants in images:
        for caption in variants:
            if caption not in tokens:
                tokens[caption], names[caption] = len(tokenize(caption)), name
    counts = np.array(list(tokens.values()))
    longest = max(tokens, key=tokens.__getitem__)
    lost = np.maximum(counts - _TOKENS, 0)
    of_some = f" of {len(images):,} images" if len(images) < len(dataset) else ""
    rows = [
        (
            "captions",
            f"{len(counts):,} different ones{of_some}, median {np.median(counts):.0f} tokens",
        ),
        ("", f"longest {tokens[longest]:,} tokens ({names[longest]})"),
    ]
    if lost.any():
        rows += [
            ("", f"{np.count_nonzero(lost):,} are cut at 77 tokens, of which {_TOKENS} are theirs"),
            ("", f"{lost.sum():,} of all {counts.sum():,} tokens are lost; --lpw True keeps them"),
        ]
    return rows


def _draw(out: Path, dataset: Text2ImageDataset) -> None:
    """The contact sheet: images at equal distances, each with its name and caption."""
    import numpy as np

    from sdxl_host.randomness import Stream, generator
    from sdxl_host.sampling.grid import save_grid

    side = min(_THUMBNAIL, max(max(size) for size in dataset.sizes))
    chosen = range(0, len(dataset), -(-len(dataset) // _SHOWN))
    images, texts = [], []
    for index in chosen:
        sample = dataset.sample(index, generator(0, Stream.CROP, 1, index))
        images.append(_thumbnail(sample.pixels, side))
        caption = dataset.caption(index, generator(0, Stream.CAPTION, 1, index))
        texts.append(f"{sample.name}: {caption}")
    try:
        save_grid(out, np.stack(images), texts)
    except OSError as error:
        raise unwritable(out, error) from error


def _thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> the same in a white square, (3, side, side)."""
    import numpy as np
    from PIL import Image

    from sdxl_host.sampling.grid import to_bytes

    image = Image.fromarray(to_bytes(pixels[None])[0])
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    square = Image.new("RGB", (side, side), "white")
    square.paste(image, ((square.width - image.width) // 2, (square.height - image.height) // 2))
    return np.asarray(square).transpose(2, 0, 1) / 127.5 - 1.0
