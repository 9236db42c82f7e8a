"""The tree of settings while its layers are merged, and where each of its values came from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdxl_host.config.interpolation import as_written, refuse_resolvers
from sdxl_host.errors import ConfigError
from sdxl_host.settings.options import first_line

__all__ = ["OVERRIDE", "Layers", "Place", "leaves", "place_of"]

# Keys and indices, as text: data.transforms[0].size is ("data", "transforms", "0", "size").
Place = tuple[str, ...]
OVERRIDE = "override"


class Layers:
    """The merged tree: of two layers the later counts.

    tree: the sections as they stand after the layers that were merged so far. origins: by place,
    the layer that set it last, for those values that a layer has set: the name of the file,
    "override", a flag such as "--seed", or the targets that a plugin takes as its options.
    file_is_a_runs: whether the file is one that a run wrote.
    """

    def __init__(self, tree: DictConfig, file: str) -> None:
        self.tree = tree
        # Both are of one start, so only a run writes them down. Not every setting is asked for: an
        # older run lacks those that were added since.
        self.file_is_a_runs = {"resume", "allow_changes"} <= set(tree.get("train") or ())
        self.origins: dict[Place, str] = dict.fromkeys(leaves(as_written(tree)), file)
        for name in tree.get("plugins") or ():
            self.select(name, file)
        self._file = file

    def set(self, key: str, value: Any, origin: str, subject: str) -> None:
        """Sets a dotted key, making what lies on the way. Raises ConfigError about `subject`."""
        refuse_resolvers(value, key)
        try:
            OmegaConf.update(self.tree, key, value, force_add=True)
        except (
            OmegaConfBaseException,
            AttributeError,
            AssertionError,
            LookupError,
            TypeError,
            ValueError,
        ) as error:
            raise ConfigError(f"{subject}: can't be set: {first_line(error)}") from error
        self.origins.update(dict.fromkeys(leaves(value, place_of(key)), origin))
        if key.startswith("plugins."):
            self.select(place_of(key)[1], origin)

    def select(self, plugin: str, origin: str) -> None:
        """Notes what selected a plugin; the first layer that does counts."""
        self.origins.setdefault(("plugins", plugin), origin)

    def in_file(self, key: str) -> bool:
        """Whether the config file has what counts for a key, or for any part of its value."""
        return self._file in self._origins_of(key)

    def on_command_line(self, key: str) -> bool:
        """Whether an override or a flag set the key, or any part of its value."""
        return any(o == OVERRIDE or o.startswith("--") for o in self._origins_of(key))

    def _origins_of(self, key: str) -> set[str]:
        place = place_of(key)
        return {o for where, o in self.origins.items() if where[: len(place)] == place}


def leaves(value: Any, place: Place = ()) -> Iterator[Place]:
    """The places of all values that hold no others; an empty mapping or list is one."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*place, str(key)))
    elif isinstance(value, list) and value:
        for index, inner in enumerate(value):
            yield from leaves(inner, (*place, str(index)))
    else:
        yield place


def place_of(key: str) -> Place:
    """The place that a dotted key names."""
    return tuple(re.findall(r"[^.\[\]]+", key))
