"""What `sdxl-host data` and `sdxl-host plan` both show of the data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sdxl_host.commands.printer import columns

if TYPE_CHECKING:
    from sdxl_host.data.dataset import Text2ImageDataset
    from sdxl_host.training.summary import Fact

__all__ = ["data_facts"]

_BAR = 24  # characters of a bar that stands for all images


def data_facts(dataset: Text2ImageDataset) -> list[Fact]:
    """Images and what is set aside, sizes, what a square crop loses, and a histogram of aspects.

    dataset: one that was checked.
    """
    from sdxl_host.planning.data import aspects, data_rows, size_rows

    sizes = dataset.heights_and_widths
    rows = [
        (found.name, f"{found.images:,}", "#" * round(_BAR * found.share))
        for found in aspects(sizes)
        if found.images
    ]
    return [
        *data_rows(dataset),
        *size_rows([image.name for image in dataset.images], sizes),
        ("aspects", "width : height, and images"),
        *columns(rows, "<>", indent=2),
    ]
