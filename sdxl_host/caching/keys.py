"""What makes an entry of the cache, as its key, and what of a run can't be in a cache."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import asdict
from functools import cache
from typing import Any

from omegaconf import OmegaConf

from sdxl_host.config.load import RunConfig
from sdxl_host.data.cache import Key, Recipe
from sdxl_host.data.dataset import Text2ImageDataset
from sdxl_host.data.image_digests import ImageDigests
from sdxl_host.diffusion.model import DiffusionModel
from sdxl_host.errors import ConfigError
from sdxl_host.models.precision import is_half
from sdxl_host.models.tokenizer import FOLDER as TOKENIZER_FOLDER
from sdxl_host.plugins.hooks import Hooks
from sdxl_host.settings.declarations import TrainSettings
from sdxl_host.weights.frozen import ENCODERS, FIRST_STAGE, FrozenNetworks

__all__ = ["CaptionKeys", "LatentKeys", "check_cacheable", "crops", "parts", "target_size"]

# Of the dataset's params, what says where images are and which of them are taken.
_WHERE = ("data_path", "only")


def parts(settings: TrainSettings) -> tuple[bool, bool]:
    """Whether latents and whether embeddings are made, or read: what the switches say, and where
    they say nothing all that can be made."""
    is_all = settings.task == "cache" and not (
        settings.cache_latent or settings.cache_text_embedding
    )
    return settings.cache_latent or is_all, settings.cache_text_embedding or is_all


def check_cacheable(config: RunConfig, hooks: Hooks, dataset: Text2ImageDataset) -> None:
    """Raises ConfigError where embeddings are to be cached and captions or encoders differ from
    step to step."""
    _, has_embeddings = parts(config.train)
    if not has_embeddings:
        return
    if not dataset.captions.is_fixed:
        raise ConfigError(
            "--cache_text_embedding True: captions are shuffled anew in every step, so there are "
            "too many to encode beforehand; use --shuffle_tags False, or leave the flag out"
        )
    for link in hooks.links("encode_prompt"):
        instance = None if link.plugin is None else link.plugin.instance
        if hasattr(instance, "state_dict") or getattr(instance, "varies_by_step", False):
            raise ConfigError(
                f"--cache_text_embedding True: the plugin {link.name} keeps state, and what it "
                "answers on encode_prompt may change from step to step; leave the flag or the "
                "plugin out"
            )


def crops(config: RunConfig) -> int:
    """How many fixed crops an image has whose latents are kept."""
    return max(1, config.data.crops_per_image)


def target_size(dataset: Text2ImageDataset, index: int) -> tuple[int, int]:
    """(height, width) that image `index` is made."""
    return dataset.sizes[dataset.size_of[index]]


class LatentKeys:
    """Keys of what the first stage makes of images.

    digests: of the images' bytes. indices: the images whose keys are asked for; all unless given.
    Raises DataError for an image that can't be read.
    """

    def __init__(
        self,
        config: RunConfig,
        dataset: Text2ImageDataset,
        model: DiffusionModel,
        frozen: FrozenNetworks,
        digests: ImageDigests,
        threads: Executor,
        indices: range | None = None,
    ) -> None:
        self._dataset = dataset
        self._indices = range(len(dataset)) if indices is None else indices
        images = [dataset.images[index] for index in self._indices]
        self._images = dict(zip(self._indices, digests.of(images, threads), strict=True))
        self._recipe = Recipe("latents", _latent_facts(config, model, frozen))

    def key(self, index: int, variant: int) -> Key:
        """The key of one crop of image `index`. Its name is in it, because a crop is drawn from
        that."""
        name, size = self._dataset.images[index].name, target_size(self._dataset, index)
        return self._recipe.key(self._images[index].hex(), name, size, variant)

    def all(self, count: int) -> Iterator[tuple[Key, tuple[int, int]]]:
        """(key, (index, variant)) of `count` crops of every image."""
        for index in self._indices:
            for variant in range(count):
                yield self.key(index, variant), (index, variant)


class CaptionKeys:
    """Keys of what `encode_prompt` makes of captions."""

    def __init__(
        self, config: RunConfig, dataset: Text2ImageDataset, hooks: Hooks, frozen: FrozenNetworks
    ) -> None:
        self._dataset = dataset
        self._recipe = Recipe("embeddings", _embedding_facts(config, hooks, frozen))

    def key(self, caption: str) -> Key:
        """The key of a caption."""
        return self._recipe.key(caption)

    def all(self) -> list[tuple[Key, str]]:
        """(key, caption) of every caption that a step may have, each once."""
        captions = (c for _, variants in self._dataset.all_captions() for c in variants)
        return [(self.key(caption), caption) for caption in dict.fromkeys(captions)]


def _latent_facts(
    config: RunConfig, model: DiffusionModel, frozen: FrozenNetworks
) -> dict[str, Any]:
    settings, first_stage = config.train, model.first_stage
    node = config.data.dataset_config
    params = {key: value for key, value in (node.get("params") or {}).items() if key not in _WHERE}
    computes_in = "float32"
    if is_half(settings.ms_amp_level) and not first_stage.keeps_float32:
        computes_in = f"{settings.ms_amp_level} {settings.ms_amp_dtype}"
    return {
        "dataset": [node["target"], _plain(params)],
        "resolution": config.data.resolution,
        "is_bucketed": config.data.buckets,
        "first stage": _plain(config.tree.model.params.first_stage_config),
        "class": f"{type(first_stage).__module__}.{type(first_stage).__qualname__}",
        "weights": frozen.digest(FIRST_STAGE),
        "precision": computes_in,
        "seed": settings.seed,
        "dtype": settings.cache_dtype,
    }


def _embedding_facts(config: RunConfig, hooks: Hooks, frozen: FrozenNetworks) -> dict[str, Any]:
    nodes = _plain(config.tree.model.params.conditioner_config)["params"]["emb_models"]
    encoders = [
        [node["target"], node.get("params")] for node in nodes if node.get("input_key") == "txt"
    ]
    chain: list[Any] = []
    for link in hooks.links("encode_prompt"):
        if link.plugin is None:
            chain.append("host")
            continue
        installed, options = link.plugin.installed, link.plugin.options
        given = asdict(options) if options is not None else {}
        chain.append([installed.name, installed.distribution, installed.version, _plain(given)])
    return {
        "encoders": encoders,
        "weights": frozen.digest(ENCODERS),
        "tokenizer": _tokenizer_digest(),
        "encode_prompt": chain,
        "dtype": config.train.cache_dtype,
    }


@cache
def _tokenizer_digest() -> str:
    found = hashlib.sha256()
    for file in sorted(TOKENIZER_FOLDER.glob("*.*")):
        if file.suffix in (".json", ".txt"):
            found.update(file.name.encode("utf-8"))
            found.update(file.read_bytes())
    return found.hexdigest()


def _plain(value: Any) -> Any:
    """A config's value as JSON can hold it; what it can't hold, as text."""
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
