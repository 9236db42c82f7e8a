"""Images with captions, by index."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_host.data.buckets import bucket_sizes, crop_losses, nearest
from sdxl_host.data.captioned import Captioned
from sdxl_host.data.captions import Captions
from sdxl_host.data.decode import decode
from sdxl_host.data.folder import read_folder
from sdxl_host.data.problems import Listing
from sdxl_host.data.survey import survey
from sdxl_host.data.transforms import Resize, Transform
from sdxl_host.errors import DataError, PluginError, did_you_mean, in_brief
from sdxl_host.settings.declarations import DataSettings
from sdxl_host.settings.targets import build

__all__ = ["DEMO_IMAGES", "Sample", "Text2ImageDataset", "make_dataset"]

DEMO_IMAGES = Path(__file__).parent / "demo"

_NAMED = 3  # bad images, in the error that says that there are too many


@dataclass(frozen=True)
class Sample:
    """One image as a training step uses it.

    name: its id. pixels: (3, H, W) float32 in [-1, 1]; of an image whose latents are kept, in
    their place moments, what the first stage's `moments` gave. sizes: (height, width) or
    (top, left) pairs, and the score, by embedder key.
    """

    name: str
    pixels: np.ndarray | None
    sizes: dict[str, tuple[float, ...]]
    moments: np.ndarray | None = None


class Text2ImageDataset:
    """A folder of captioned images (see `folder.read_folder`).

    Args:
        target_size: side of the square that the network sees, in pixels.
        transforms: nodes of `transforms`, applied in order.
        data_path: the folder; empty for the images that the package carries.
        only: names of the images to take from the folder; none given, all of them.
        aesthetic_score: the condition of every image, for models that take one, such as SDXL's
            refiner.
    """

    def __init__(
        self,
        target_size: int,
        transforms: Sequence[Mapping[str, Any]],
        data_path: str = "",
        only: Sequence[str] | None = None,
        aesthetic_score: float = 6.0,
    ) -> None:
        if target_size < 1:
            raise ValueError(
                f"Text2ImageDataset: target_size must be at least 1, not {target_size}"
            )
        self.aesthetic_score = float(aesthetic_score)
        lists_folders = type(self).list_images is Text2ImageDataset.list_images
        self.is_demo = not data_path and lists_folders
        self.target_size = target_size
        # The sizes that images are made, and of each image which; more than one with buckets.
        self.sizes = [(target_size, target_size)]
        self.is_bucketed = False
        self.repeats: Mapping[str, int] = {}
        self.captions = Captions()
        self.source = Path(data_path).expanduser() if data_path else DEMO_IMAGES
        listing = self.list_images(self.source)
        self.images, self.problems, self.notes = listing.images, listing.problems, listing.notes
        if not self.images:
            raise DataError(f"data_path {data_path}: holds no captioned image; give another")
        if only is not None:
            if not only:
                raise ValueError(
                    "Text2ImageDataset: only names no image; name some, or leave it out to take "
                    "all of them"
                )
            by_name = {entry.name: entry for entry in self.images}
            for name in only:
                if name not in by_name:
                    raise DataError(
                        f"data.dataset_config.params.only: there is no image {name}"
                        f"{did_you_mean(name, by_name)} in {data_path or 'the carried images'}"
                    )
            self.images = [by_name[name] for name in only]
        self.size_of = np.zeros(len(self.images), np.int64)
        where = "data.dataset_config.params.transforms"
        self._transforms: list[Transform] = [
            build(node, "transform", f"{where}[{index}]") for index, node in enumerate(transforms)
        ]
        # Whatever comes before Resize may need the whole image.
        first = self._transforms[0] if self._transforms else None
        self._needed = (first.size, first.size) if isinstance(first, Resize) else None

    def list_images(self, source: Path) -> Listing:
        """What the source holds; its images are numbered in this order. Another dataset than the
        host's can bring its own."""
        return read_folder(source)

    def __len__(self) -> int:
        return len(self.images)

    def check(
        self,
        threads: Executor,
        max_bad_fraction: float = 1.0,
        progress: Callable[[int, int], None] | None = None,
        began_without: Collection[str] | None = None,
    ) -> None:
        """Looks at every image and sets aside those that can't be decoded, as `problems`.

        max_bad_fraction: the share of the images that may be bad. progress: called with how many
        images are looked at, and of how many. began_without: of a run that goes on, the images that
        were set aside when it began; one that broke later keeps its place in the order, where the
        next one is taken instead of it, and does not count as bad here. Raises DataError for too
        many bad images, and where all are bad.
        """
        found = survey(self.images, self.source, threads, progress)
        self.problems += found.problems
        self.notes += found.notes
        count, bad = len(self.images), len(found.problems)
        kept = found.usable.copy()
        if began_without is not None:
            kept |= [image.name not in began_without for image in self.images]
        if count - kept.sum() > max_bad_fraction * count or (count and bad == count):
            named = {image.name: image for image in self.images}
            first = [f"{named[one.name].place}: {one.detail}" for one in found.problems]
            raise DataError(
                f"data_path {self.source}: {bad:,} of {count:,} images can't be read as an image, "
                f"more than data.max_bad_fraction {max_bad_fraction:g} lets be set aside: "
                f"{in_brief(first, _NAMED)}; mend or remove them, or set data.max_bad_fraction "
                "higher"
            )
        self.images = [image for image, stays in zip(self.images, kept, strict=True) if stays]
        self.heights_and_widths = found.sizes[kept]
        # Of one that broke later, the size may be unknown.
        unknown = self.heights_and_widths[:, 0] == 0
        self.heights_and_widths[unknown] = np.median(found.sizes[found.usable], axis=0)
        self.size_of = np.zeros(len(self.images), np.int64)

    def use_buckets(self, step: int) -> None:
        """Gives each image the size of the nearest aspect ratio, after `check`.

        step: what sides must be multiples of.
        """
        sizes, images = bucket_sizes(self.target_size, step), self.heights_and_widths
        found = nearest(images, sizes)
        used, self.size_of = np.unique(found, return_inverse=True)
        self.sizes = [sizes[index] for index in used]
        self.is_bucketed = True

    def bucket_rows(self) -> list[tuple[tuple[int, int], int, float]]:
        """Of each size: (height, width), its images, and the mean share of their pixels that
        cropping to its shape takes away."""
        images = self.heights_and_widths
        rows = []
        for index, size in enumerate(self.sizes):
            inside = images[self.size_of == index]
            rows.append((size, len(inside), float(crop_losses(inside, size).mean())))
        return rows

    def groups(self) -> list[np.ndarray]:
        """Of each size the images of an epoch, as indices; one that is repeated stands there so
        many times."""
        times = np.array([self._times(image) for image in self.images])
        every = np.repeat(np.arange(len(self)), times)
        return [every[self.size_of[every] == index] for index in range(len(self.sizes))]

    def _times(self, image: Captioned) -> int:
        """How often an epoch holds an image: as its source says, times what its folder is given;
        of folders inside each other the innermost counts."""
        folder = image.name
        while self.repeats and "/" in folder:
            folder = folder.rpartition("/")[0]
            if folder in self.repeats:
                return image.repeats * self.repeats[folder]
        return image.repeats

    def typical_size(self) -> tuple[int, int]:
        """Median (height, width) of the images as they were before resizing, after `check`."""
        height, width = np.median(self.heights_and_widths, axis=0).astype(int)
        return int(height), int(width)

    def all_captions(self) -> Iterator[tuple[str, list[str]]]:
        """Each image's name, and every caption that a step may have of it."""
        for image in self.images:
            yield image.name, self.captions.variants(image)

    def caption(self, index: int, generator: np.random.Generator) -> str:
        """The caption of image `index` in one step; what is chosen in it is drawn."""
        return self.captions.draw(self.images[index], generator)

    def sample(self, index: int, generator: np.random.Generator) -> Sample:
        """Image `index`; its random crop is drawn from `generator`."""
        entry = self.images[index]
        target = self.sizes[self.size_of[index]]
        decoded = decode(entry, target if self.is_bucketed and self._needed else self._needed)
        sample: dict[str, Any] = {
            "image": np.asarray(decoded.image),
            "original_size_as_tuple": decoded.size,
            "crop_coords_top_left": (0, 0),
            "target_size_as_tuple": target,
            "aesthetic_score": (self.aesthetic_score,),
            "is_bucketed": self.is_bucketed,
        }
        for index, transform in enumerate(self._transforms):
            before = sample["image"]
            try:
                sample = transform(sample, generator)
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"data.dataset_config.params.transforms[{index}]: {type(transform).__name__} "
                    f"can't take the {before.dtype} {before.shape} that those before it make of "
                    f"{entry.name} ({error}); the usual order is Resize, Rescaler, "
                    "AddOriginalImageSizeAsTupleAndCropToSquare, Transpose"
                ) from error
        pixels = sample.pop("image")
        for name in ("is_bucketed", "crop_right"):  # of use to transforms alone
            sample.pop(name, None)
        if pixels.shape != (3, *target) or pixels.dtype != np.float32:
            raise DataError(
                f"data.dataset_config.params.transforms: they make {pixels.dtype} "
                f"{pixels.shape} of {entry.name}, not float32 {(3, *target)}; resize and crop "
                "to target_size, rescale and transpose"
            )
        return Sample(entry.name, pixels, sample)


def make_dataset(settings: DataSettings) -> Text2ImageDataset:
    """The dataset that the section `data` describes. Raises HostError."""
    node = settings.dataset_config
    if settings.resolution:
        node = _at_resolution(node, settings.resolution)
    dataset = build(node, "dataset", "data.dataset_config")
    if not isinstance(dataset, Text2ImageDataset):
        raise PluginError(
            f"data.dataset_config.target: {node['target']} is not derived from "
            "sdxl_host.Text2ImageDataset; its package must derive it, or name another dataset"
        )
    dataset.captions = Captions(
        settings.captions,
        settings.caption_prefix,
        settings.caption_suffix,
        settings.shuffle_tags,
        settings.keep_tags,
    )
    folders = {image.name.rpartition("/")[0] for image in dataset.images}
    for folder in settings.repeats:
        if not any(each == folder or each.startswith(f"{folder}/") for each in folders):
            raise DataError(
                f"data.repeats.{folder}: there is no such folder with images"
                f"{did_you_mean(folder, folders)}; folders are named as below data_path"
            )
    dataset.repeats = settings.repeats
    return dataset


def _at_resolution(node: Mapping[str, Any], resolution: int) -> dict[str, Any]:
    """A dataset's node with this size in place of its `target_size` and of what `Resize` and crops
    are given."""
    params = dict(node.get("params") or {})
    params["target_size"] = resolution
    transforms = []
    for transform in params.get("transforms") or []:
        given = dict(transform.get("params") or {})
        if "size" in given:
            transform = {**transform, "params": {**given, "size": resolution}}
        transforms.append(transform)
    return {**node, "params": {**params, "transforms": transforms}}
