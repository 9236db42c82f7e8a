"""One tree of settings from four layers: defaults < YAML file < dotted overrides < flags.

A key or flag that nobody claims is an error with a suggestion. Nothing here imports MindSpore.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdxl_host.config.flags import (
    SECTIONS,
    Arguments,
    apply_flag,
    read_value,
    refuse_empty,
    set_key,
)
from sdxl_host.config.no_effect import unused_lines, written_in
from sdxl_host.config.plugin_targets import adopt
from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.plugins.discovery import Installed, normalize
from sdxl_host.plugins.selection import SelectedPlugin, Selection
from sdxl_host.settings.options import build_options, first_line, union_members
from sdxl_host.settings.schema import (
    FLAG_HOMES,
    SCHEMAS,
    DataSettings,
    OptimSettings,
    TrainSettings,
)
from sdxl_host.settings.targets import idle_params

__all__ = [
    "DEFAULT_CONFIG",
    "RunConfig",
    "find_config",
    "image_size",
    "load",
    "load_model",
    "packaged_configs",
    "read_yaml",
    "restore",
]

DEFAULT_CONFIG = "default.yaml"
SDXL_CONFIG = "training/sd_xl_base_finetune_910b.yaml"
_IDLE_TOP = {"version": "it named the old trainer's checkpoint files"}


@dataclass(frozen=True)
class RunConfig:
    """The resolved settings of a run.

    tree: all of them, read-only; writing it as YAML and loading that repeats the run. notices:
    lines to show at the start. explicit_config: the --config that was given, or "".
    """

    tree: DictConfig
    train: TrainSettings
    data: DataSettings
    optim: OptimSettings
    plugins: tuple[SelectedPlugin, ...]
    notices: tuple[str, ...]
    explicit_config: str = ""


# ---- loading


def load(arguments: Sequence[str]) -> RunConfig:
    """The settings that the arguments of `sdxl-host train` describe. Raises HostError."""
    lines = Arguments(arguments)
    path = lines.config
    tree = read_yaml(find_config(path) if path else packaged_configs() / DEFAULT_CONFIG)
    return _assemble(tree, lines, path)


def load_model(arguments: Sequence[str]) -> RunConfig:
    """The same for a config that need not say how to train: what it lacks is SDXL's."""
    lines = Arguments(arguments)
    tree = read_yaml(find_config(lines.config))
    usual = read_yaml(packaged_configs() / SDXL_CONFIG)
    for section in ("optim", "data"):
        if tree.get(section) is None:
            tree[section] = usual[section]
    return _assemble(tree, lines, lines.config)


def image_size(config: RunConfig) -> tuple[int, int]:
    """(height, width) in pixels of the images that the config's model is trained on."""
    side = config.data.dataset_config.get("params", {}).get("target_size", 1024)
    return side, side


def restore(path: Path) -> RunConfig:
    """The settings of the YAML file that a run or a checkpoint wrote."""
    return _assemble(read_yaml(path), Arguments([]), str(path))


def _assemble(tree: DictConfig, lines: Arguments, path: str) -> RunConfig:
    where = path or "the default config"
    notices = _drop_idle(tree)
    _check_sections(tree, where)
    _normalize_plugins(tree, where)
    written = written_in(tree)
    commanded = {key for key, _ in lines.overrides}
    for key, text in lines.overrides:
        _override(tree, key, text)
    _check_sections(tree, where)
    _complete(tree, where)
    selection = Selection([str(name) for name in tree.plugins], lines.plugins)
    adopt(tree, selection, commanded)
    for flag in lines.flags():
        apply_flag(tree, flag, selection, lines)
        commanded.add(FLAG_HOMES.get(flag.name, f"train.{flag.name}"))
    chosen, plugin_notices = selection.finish(tree)
    _resolve(tree)
    settings: dict[str, Any] = {}
    for name, schema in SCHEMAS.items():
        settings[name] = _build(schema, tree[name], name, lines)
        tree[name] = asdict(settings[name])
    selected = [_configured(installed, cls, tree, lines) for installed, cls in chosen]
    tree.plugins = {p.installed.name: asdict(p.options) if p.options else {} for p in selected}
    _check_parts(settings["train"], settings["data"], settings["optim"])
    plain = _plain(tree)
    notices += unused_lines(plain, written, commanded)
    for section in ("model", "data", "optim"):
        notices += idle_params(plain[section], section)
    OmegaConf.set_readonly(tree, True)
    return RunConfig(
        tree,
        settings["train"],
        settings["data"],
        settings["optim"],
        tuple(selected),
        tuple(notices + plugin_notices),
        path,
    )


def _configured(
    installed: Installed, cls: type, tree: DictConfig, lines: Arguments
) -> SelectedPlugin:
    """A selected plugin with its options."""
    where = f"plugins.{installed.name}"
    section = tree.plugins[installed.name]
    schema = getattr(cls, "Options", None)
    if schema is not None and is_dataclass(schema):
        return SelectedPlugin(installed, cls, _build(schema, section, where, lines))
    for key in section:
        raise ConfigError(f"{where}.{key}: the plugin {installed} has no options; remove it")
    return SelectedPlugin(installed, cls, None)


def _build(schema: type, section: DictConfig, where: str, lines: Arguments) -> Any:
    """The options of one section, checked."""
    values = {str(key): value for key, value in _plain(section).items()}
    hints = get_type_hints(schema)
    for key, text in lines.overrides:
        name = key.removeprefix(f"{where}.")
        # On the command line, where a shell takes the quotes off, `plugins.x.word=5` is a word.
        if name in values and str in union_members(hints.get(name)):
            value = values[name]
            if isinstance(value, bool | int | float) and read_value(text) == value:
                values[name] = text
    return build_options(schema, values, where)


def _check_parts(train: TrainSettings, data: DataSettings, optim: OptimSettings) -> None:
    """Refuses what the sections' types allow and no run can have."""
    if data.python_multiprocessing:
        raise ConfigError(
            "data.python_multiprocessing: True is not supported; images are loaded by "
            "data.num_parallel_workers threads, set it to False"
        )
    if train.sink_queue_size == 0:
        raise ConfigError(
            "train.sink_queue_size: a queue of 0 steps holds nothing; give at least 1, or -1 for "
            "MindSpore's own size"
        )
    for key, node in (
        ("data.dataset_config", data.dataset_config),
        ("optim.optimizer_config", optim.optimizer_config),
    ):
        if not node:
            raise ConfigError(f"{key}: needs a `target` and may have `params`; add it")


# ---- files


def packaged_configs() -> Path:
    """The folder of configs that travels with the package."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file `name` on disk, or of that name among the packaged configs."""
    if Path(name).is_file():
        return Path(name)
    packaged = packaged_configs()
    inside = packaged / name.removeprefix("./").removeprefix("configs/")
    if inside.is_file():
        return inside
    known = sorted(f"configs/{p.relative_to(packaged)}" for p in packaged.rglob("*.yaml"))
    raise ConfigError(
        f"--config {name}: there is no such file{did_you_mean(name, known)} "
        f"(packaged: {', '.join(known)})"
    )


def read_yaml(path: Path) -> DictConfig:
    """The mapping in a YAML file. Raises ConfigError with file and line."""
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}; mend the file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: holds no mapping; it needs the keys model, optim and data")
    return tree


# ---- the tree


def _drop_idle(tree: DictConfig) -> list[str]:
    """Takes out the top keys of old files that have no effect here; a notice for each."""
    dropped = [str(key) for key in tree if key in _IDLE_TOP]
    for key in dropped:
        del tree[key]
    return [f"{key} has no effect: {_IDLE_TOP[key]}" for key in dropped]


def _check_sections(tree: DictConfig, where: str) -> None:
    """Refuses what no layer may hold: resolvers, unknown sections, sections that are no mappings.

    Values are looked at as they are written, so that nothing is called or resolved before.
    """
    plain = _plain(tree)
    _refuse_resolvers(plain)
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
    for name, entry in _plain(tree.get("plugins") or OmegaConf.create({})).items():
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


def _override(tree: DictConfig, key: str, text: str) -> None:
    top = re.split(r"[.\[]", key, maxsplit=1)[0]
    if top not in SECTIONS:
        raise ConfigError(
            f"{key}: there is no such section{did_you_mean(top, SECTIONS)} "
            f"(sections: {', '.join(SECTIONS)})"
        )
    refuse_empty(key, text, key)
    try:
        value = read_value(text)
    except (yaml.YAMLError, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"{key}={text}: can't be set: {first_line(error)}") from error
    _refuse_resolvers(value, key)
    if tree.get(top) is None:
        tree[top] = {}
    set_key(tree, key, value, f"{key}={text}")


def _resolve(tree: DictConfig) -> None:
    """Fills in the interpolations, after which no text may look like one."""
    _refuse_resolvers(_plain(tree))
    try:
        OmegaConf.resolve(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {first_line(error)}") from error
    # Two texts put together can make a call that neither of them is.
    for key, value in _strings(_plain(tree)):
        if "${" in value:
            raise ConfigError(
                f"{key}: {value!r} would be filled in once more, which a config may not; write the "
                "value"
            )


def _refuse_resolvers(node: Any, key: str = "") -> None:
    for place, value in _strings(node, key):
        if _calls_resolver(value):
            raise ConfigError(
                f"{place}: {value!r} calls a resolver, which a config may not; write the value, or "
                "refer to another key as ${section.key}"
            )


def _calls_resolver(text: str) -> bool:
    """Whether a colon stands inside ${...}; the name before it may be made of ${...} as well."""
    depth = 0
    for part in re.findall(r"\$\{|[}:]", text):
        if part == ":" and depth:
            return True
        depth = depth + 1 if part == "${" else max(0, depth - (part == "}"))
    return False


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _strings(value, f"{key}[{index}]")


def _plain(section: DictConfig) -> dict[Any, Any]:
    """The section as it is written, interpolations and all."""
    plain = OmegaConf.to_container(section, resolve=False)
    assert isinstance(plain, dict)
    return plain
