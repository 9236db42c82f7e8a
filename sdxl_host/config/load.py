"""One tree of settings from four layers: defaults < YAML file < dotted overrides < flags.

A key or flag that nobody claims is an error with a suggestion. Nothing here imports MindSpore.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import DictConfig, OmegaConf

from sdxl_host.config import mindone
from sdxl_host.config.dataset_targets import register_datasets
from sdxl_host.config.flags import SECTIONS, Arguments, apply_flag, apply_override
from sdxl_host.config.interpolation import as_written, refuse_resolvers, resolve
from sdxl_host.config.layers import Layers, Place, leaves
from sdxl_host.config.no_effect import no_effect_lines
from sdxl_host.config.plugin_targets import adopt
from sdxl_host.config.yaml_files import (
    DEFAULT_CONFIG,
    SDXL_CONFIG,
    find_config,
    packaged_configs,
    read_yaml,
)
from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.plugins.discovery import Installed, normalize
from sdxl_host.plugins.selection_and_order import SelectedPlugin, Selection
from sdxl_host.settings.declarations import SCHEMAS, DataSettings, OptimSettings, TrainSettings
from sdxl_host.settings.options import build_options
from sdxl_host.settings.values import parse_yaml, union_members

__all__ = ["RunConfig", "image_size", "load", "load_model", "restore"]


@dataclass(frozen=True)
class RunConfig:
    """The resolved settings of a run.

    tree: all of them, read-only; writing it as YAML and loading that repeats the run. notices:
    lines to show at the start. explicit_config: the --config that was given, or "". origins: which
    layer each value came from, and what selected each plugin, by place: see `Layers.origins`; or
    "default", or "default of snr" for an option of a plugin.
    """

    tree: DictConfig
    train: TrainSettings
    data: DataSettings
    optim: OptimSettings
    plugins: tuple[SelectedPlugin, ...]
    notices: tuple[str, ...]
    explicit_config: str = ""
    origins: Mapping[Place, str] = field(default_factory=dict, compare=False, repr=False)


def load(arguments: Sequence[str]) -> RunConfig:
    """The settings that the arguments of `sdxl-host train` describe. Raises HostError."""
    line = Arguments(arguments)
    file = find_config(line.config) if line.config else packaged_configs() / DEFAULT_CONFIG
    return _merged(read_yaml(file), file.name, line, line.config)


def load_model(arguments: Sequence[str]) -> RunConfig:
    """The same for a config that need not say how to train: what it lacks is SDXL's."""
    line = Arguments(arguments)
    file = find_config(line.config)
    tree = read_yaml(file)
    usual = read_yaml(packaged_configs() / SDXL_CONFIG)
    for section in ("optim", "data"):
        if tree.get(section) is None:
            tree[section] = usual[section]
    return _merged(tree, file.name, line, line.config)


def restore(path: Path) -> RunConfig:
    """The settings of the YAML file that a run or a checkpoint wrote."""
    return _merged(read_yaml(path), path.name, Arguments([]), str(path))


def image_size(config: RunConfig) -> tuple[int, int]:
    """(height, width) in pixels of the images that the config's model is trained on."""
    params = config.data.dataset_config.get("params", {})
    side = config.data.resolution or params.get("target_size", 1024)
    return side, side


def _merged(tree: DictConfig, file: str, line: Arguments, path: str) -> RunConfig:
    """The settings of a file's tree and of the command line, layer by layer.

    file: its name, the origin of what it sets. path: as it was given, or "" for the default config.
    """
    where = path or "the default config"

    # The file.
    notices = mindone.drop_idle_sections(tree)
    _check_sections(tree, where)
    _normalize_plugins(tree, where)
    layers = Layers(tree, file)

    # Dotted overrides.
    for key, text in line.overrides:
        apply_override(layers, key, text)
    _check_sections(tree, where)
    _complete(tree, where)

    # What the targets that are named by now ask of plugins.
    mindone.rename_targets(tree)
    selection = Selection([str(name) for name in tree.plugins], line.plugins)
    for name in line.plugins or ():
        layers.select(name, "--plugins")
    adopt(layers, selection)

    # Flags.
    for flag in line.flags():
        apply_flag(layers, flag, selection, line)
    chosen, plugin_notices = selection.finish(tree)

    # All layers are merged: fill in interpolations, then check, and add the defaults.
    resolve(tree)
    mindone.rename_targets(tree)  # those that interpolations have put together
    register_datasets(tree)
    idle_params = mindone.drop_idle_params(tree)
    sections: dict[str, Any] = {}
    for name, schema in SCHEMAS.items():
        sections[name] = _build(schema, tree[name], name, line)
        tree[name] = asdict(sections[name])
    plugins = [_configured(installed, cls, tree, line) for installed, cls in chosen]
    tree.plugins = {p.installed.name: asdict(p.options) if p.options else {} for p in plugins}
    _check_targets_are_given(tree)
    notices += no_effect_lines(layers, sections, as_written(tree))
    OmegaConf.set_readonly(tree, True)
    return RunConfig(
        tree=tree,
        **sections,
        plugins=tuple(plugins),
        notices=(*notices, *idle_params, *plugin_notices),
        explicit_config=path,
        origins=_all_origins(layers),
    )


def _build(schema: type, section: DictConfig, where: str, line: Arguments) -> Any:
    """The options of one section, checked."""
    values = {str(key): value for key, value in as_written(section).items()}
    hints = get_type_hints(schema)
    for key, text in line.overrides:
        name = key.removeprefix(f"{where}.")
        # On the command line, where a shell takes the quotes off, `plugins.x.word=5` is a word.
        if name in values and str in union_members(hints.get(name)):
            value = values[name]
            if isinstance(value, bool | int | float) and parse_yaml(text) == value:
                values[name] = text
    return build_options(schema, values, where)


def _configured(
    installed: Installed, cls: type, tree: DictConfig, line: Arguments
) -> SelectedPlugin:
    """A selected plugin with its options."""
    where = f"plugins.{installed.name}"
    section = tree.plugins[installed.name]
    schema = getattr(cls, "Options", None)
    if schema is not None and is_dataclass(schema):
        return SelectedPlugin(installed, cls, _build(schema, section, where, line))
    for key in section:
        raise ConfigError(f"{where}.{key}: the plugin {installed} has no options; remove it")
    return SelectedPlugin(installed, cls, None)


def _all_origins(layers: Layers) -> dict[Place, str]:
    """The origin of every value of the tree, defaults included, and of every plugin's selection."""
    origins: dict[Place, str] = {}
    for place in leaves(as_written(layers.tree)):
        section, *inside = place
        of_plugin = section == "plugins" and len(inside) > 1
        default = f"default of {inside[0]}" if of_plugin else "default"
        origins[place] = layers.origins.get(place, default)
    for name in layers.tree.plugins:
        origins["plugins", name] = layers.origins["plugins", name]
    return origins


# ---- checks of the tree


def _check_sections(tree: DictConfig, where: str) -> None:
    """Refuses what no layer may hold: resolvers, unknown sections, sections that are no mappings.

    Values are looked at as they are written, so that nothing is called or resolved before.
    """
    plain = as_written(tree)
    refuse_resolvers(plain)
    for key, section in plain.items():
        if key not in SECTIONS:
            raise ConfigError(
                f"{where}: {key}: there is no such section{did_you_mean(str(key), SECTIONS)} "
                f"(sections: {', '.join(SECTIONS)})"
            )
        if section is not None and not isinstance(section, dict):
            raise ConfigError(
                f"{where}: {key} must be a mapping, not {section!r}; write its keys below it"
            )
    for name, entry in (plain.get("plugins") or {}).items():
        if entry is not None and not isinstance(entry, dict):
            raise ConfigError(
                f"plugins.{name}: must be a mapping, not {entry!r}; write its options below it"
            )


def _normalize_plugins(tree: DictConfig, where: str) -> None:
    """Gives the entries of `plugins` the names that are compared, in the order written."""
    written: dict[str, Any] = {}
    entries = {}
    for name, entry in (as_written(tree.get("plugins")) or {}).items():
        plain = normalize(str(name))
        if plain in written:
            raise ConfigError(
                f"{where}: plugins.{written[plain]} and plugins.{name} are one plugin; keep one"
            )
        written[plain] = name
        entries[plain] = entry
    tree.plugins = entries


def _complete(tree: DictConfig, where: str) -> None:
    """Fills in the sections that may be left out and names those that may not."""
    for key in ("model", "optim", "data"):
        if tree.get(key) is None:
            raise ConfigError(
                f"{where}: has no section {key}; copy it from configs/{DEFAULT_CONFIG}"
            )
    if tree.get("train") is None:
        tree.train = {}


def _check_targets_are_given(tree: DictConfig) -> None:
    """Refuses a tree without the dataset or the optimizer, which have no defaults."""
    for key in ("data.dataset_config", "optim.optimizer_config"):
        if not OmegaConf.select(tree, key):
            raise ConfigError(f"{key}: needs a `target` and may have `params`; add it")
