"""One tree of settings from four layers: defaults < YAML file < dotted overrides < flags.

A key or flag that nobody claims is an error with a suggestion. Nothing here imports MindSpore.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdxl_host import plugins as plugin_packages
from sdxl_host.errors import ConfigError, PluginError, did_you_mean
from sdxl_host.options import build_options, type_name
from sdxl_host.plugins import KNOWN_DISTRIBUTIONS, Installed, normalize
from sdxl_host.settings import FLAG_HOMES, NOT_YET, DataSettings, OptimSettings, TrainSettings
from sdxl_host.targets import idle_params

__all__ = ["DEFAULT_CONFIG", "RunConfig", "SelectedPlugin", "load", "restore"]

DEFAULT_CONFIG = "default.yaml"
_SECTIONS: dict[str, type] = {"train": TrainSettings, "data": DataSettings, "optim": OptimSettings}
_TOP = ("model", "optim", "data", "train", "plugins")
_IDLE_TOP = {"version": "it named the old trainer's checkpoint files"}
_TRUTH = {"true": True, "false": False, "yes": True, "no": False, "on": True, "off": False}
_OVERRIDE = re.compile(r"(?P<top>[A-Za-z_]\w*)[.\[][^=]*=")  # section.key=value


@dataclass(frozen=True)
class SelectedPlugin:
    """A plugin of this run: its package, its class and its options (None if it has none)."""

    installed: Installed
    cls: type
    options: Any


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


@dataclass(frozen=True)
class _Flag:
    """One flag as it was written: where it goes, and its value or None where it stood bare."""

    name: str
    value: str | None


# ---- loading


def load(arguments: Sequence[str]) -> RunConfig:
    """The settings that the arguments of `sdxl-host train` describe. Raises ConfigError."""
    lines = _Arguments(arguments)
    path = lines.config
    tree = read_yaml(find_config(path) if path else packaged_configs() / DEFAULT_CONFIG)
    for key, value in lines.overrides:
        _override(tree, key, value)
    return _assemble(tree, lines, path)


def restore(path: Path) -> RunConfig:
    """The settings of the YAML file that a run or a checkpoint wrote."""
    return _assemble(read_yaml(path), _Arguments([]), str(path))


def _assemble(tree: DictConfig, lines: _Arguments, path: str) -> RunConfig:
    where = path or "the default config"
    notices = _check_top(tree, where)
    selection = _Selection(tree, lines.plugins)
    for flag in lines.flags():
        _apply_flag(tree, flag, selection, lines)
    chosen, plugin_notices = selection.finish(tree)
    _resolve(tree)
    settings = {}
    for name, schema in _SECTIONS.items():
        settings[name] = build_options(schema, _mapping(tree, name), name)
        tree[name] = asdict(settings[name])
    plain = OmegaConf.to_container(tree)
    assert isinstance(plain, dict)
    selected = []
    for installed, cls in chosen:
        schema = getattr(cls, "Options", None)
        section = _mapping(tree.plugins, installed.name)
        options = None
        if schema is not None and is_dataclass(schema):
            options = build_options(schema, section, f"plugins.{installed.name}")
        elif section:
            raise ConfigError(
                f"plugins.{installed.name}.{next(iter(section))}: the plugin {installed} has no "
                "options; remove it"
            )
        selected.append(SelectedPlugin(installed, cls, options))
    tree.plugins = {p.installed.name: asdict(p.options) if p.options else {} for p in selected}
    if settings["data"].python_multiprocessing:
        raise ConfigError(
            "data.python_multiprocessing: True is not supported; pictures are loaded by "
            "data.num_parallel_workers threads, set it to False"
        )
    for section, name in (("data", "dataset_config"), ("optim", "optimizer_config")):
        if not getattr(settings[section], name):
            raise ConfigError(f"{section}.{name}: needs a `target` and may have `params`; add it")
    notices += idle_params(plain.get("model"), "model") + idle_params(plain.get("data"), "data")
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


def packaged_configs() -> Path:
    """The folder of configs that travels with the package."""
    installed = Path(__file__).parent / "configs"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "configs"


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
        problem = getattr(error, "problem", None) or error
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}; mend the file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {str(error).splitlines()[0]}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: holds no mapping; it needs the keys model, optim and data")
    return tree


def _check_top(tree: DictConfig, where: str) -> list[str]:
    notices = []
    for key in list(tree):
        if key in _IDLE_TOP:
            notices.append(f"{key} has no effect: {_IDLE_TOP[str(key)]}")
            del tree[key]
        elif key not in _TOP:
            raise ConfigError(
                f"{where}: {key}: there is no such section{did_you_mean(str(key), _TOP)} "
                f"(sections: {', '.join(_TOP)})"
            )
    for key in ("model", "optim", "data"):
        if tree.get(key) is None:
            raise ConfigError(
                f"{where}: has no section {key}; copy it from configs/{DEFAULT_CONFIG}"
            )
    for key in ("train", "plugins"):
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], DictConfig):
            raise ConfigError(f"{where}: {key} must be a mapping, not {tree[key]!r}")
    return notices


def _mapping(tree: DictConfig, key: str) -> dict[str, Any]:
    value = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(value, dict)
    section = value.get(key)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise ConfigError(f"{key}: must be a mapping, not {section!r}")
    return {str(name): item for name, item in section.items()}


def _override(tree: DictConfig, key: str, text: str) -> None:
    top = re.split(r"[.\[]", key, maxsplit=1)[0]
    if top not in _TOP:
        raise ConfigError(
            f"{key}: there is no such section{did_you_mean(top, _TOP)} "
            f"(sections: {', '.join(_TOP)})"
        )
    try:
        # OmegaConf's own reading: to it 1e-5 is a number, to plain YAML it is a string.
        parsed = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
        assert isinstance(parsed, dict)
        if tree.get(top) is None:
            tree[top] = {}
        OmegaConf.update(tree, key, parsed["value"], force_add=True)
    except (yaml.YAMLError, OmegaConfBaseException, AttributeError, IndexError, ValueError) as e:
        raise ConfigError(f"{key}={text}: can't be set: {str(e).splitlines()[0]}") from e


def _resolve(tree: DictConfig) -> None:
    for key, value in _strings(OmegaConf.to_container(tree, resolve=False)):
        if re.search(r"\$\{[^}]*:", value):
            raise ConfigError(
                f"{key}: {value!r} calls a resolver, which a config may not; write the value, or "
                "refer to another key as ${section.key}"
            )
    try:
        OmegaConf.resolve(tree)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error


def _strings(node: Any, key: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(node, str):
        yield key, node
    elif isinstance(node, Mapping):
        for name, value in node.items():
            yield from _strings(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _strings(value, f"{key}[{index}]")


# ---- arguments


class _Arguments:
    """The command line, read word by word; what a flag means is decided by `_apply_flag`."""

    def __init__(self, words: Sequence[str]) -> None:
        self._words = list(words)
        self.overrides: list[tuple[str, str]] = []
        self.config = self._take("config") or ""
        chosen = self._take("plugins")
        self.plugins = None if chosen is None else _plugin_list(chosen)
        # Overrides are merged before flags, so they are taken out first, wherever they stand: a
        # bare switch may come right before one. What a flag takes as its value is no such key.
        kept = []
        for index, word in enumerate(self._words):
            before = self._words[index - 1] if index else ""
            may_be_value = before.startswith("--") and "=" not in before
            match = _OVERRIDE.match(word)
            if match and (match.group("top") in _TOP or not may_be_value):
                key, _, value = word.partition("=")
                self.overrides.append((key, value))
            else:
                kept.append(word)
        self._words = kept

    def _take(self, name: str) -> str | None:
        """Removes `--name VALUE` or `--name=VALUE` and gives the value."""
        found: str | None = None
        index = 0
        while index < len(self._words):
            word = self._words[index]
            if word == f"--{name}" or word.startswith(f"--{name}="):
                if found is not None:
                    raise ConfigError(f"--{name}: given twice; give it once")
                if "=" in word:
                    found = word.partition("=")[2]
                    del self._words[index]
                    continue
                if index + 1 >= len(self._words):
                    raise ConfigError(f"--{name}: needs a value")
                found = self._words[index + 1]
                del self._words[index : index + 2]
                continue
            index += 1
        return found

    def flags(self) -> Iterator[_Flag]:
        """The flags in order; `take_value` moves on past the value that one turns out to have."""
        self._place = 0
        seen: set[str] = set()
        while self._place < len(self._words):
            word = self._words[self._place]
            self._place += 1
            if not word.startswith("--"):
                raise ConfigError(
                    f"{word}: not understood; settings are --flag VALUE or section.key=value"
                )
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            if name in seen:
                raise ConfigError(f"--{name}: given twice; give it once")
            seen.add(name)
            yield _Flag(name, value if equals else None)

    def take_value(self, flag: _Flag, hint: Any) -> Any:
        """The flag's value, converted to the type `hint`; the next word where it stood bare."""
        text = flag.value
        following = self._words[self._place] if self._place < len(self._words) else None
        is_switch = bool in (get_args(hint) or (hint,))
        # A bare switch takes the next word only if that is a truth value.
        takes_next = following is not None and following.lower() in _TRUTH
        if text is None and is_switch and not takes_next:
            return True
        if text is None:
            if following is None or following.startswith("--"):
                raise ConfigError(f"--{flag.name}: needs a value ({type_name(hint)})")
            text = following
            self._place += 1
        return _convert(text, hint, f"--{flag.name}")


def _plugin_list(text: str) -> list[str]:
    names = [normalize(name) for name in text.split(",") if name.strip()]
    if names == ["none"]:
        return []
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"--plugins {text}: {name} is given twice; name each plugin once")
    if not names or "none" in names:
        raise ConfigError(f"--plugins {text!r}: give plugin names with commas between, or none")
    return names


def _convert(text: str, hint: Any, where: str) -> Any:
    """`text` as a value of the type `hint`. Raises ConfigError."""
    allowed = get_args(hint) or (hint,)
    if type(None) in allowed and text in ("None", "null"):
        return None
    try:
        if bool in allowed:
            return _TRUTH[text.lower()]
        if int in allowed:
            return int(text)
        if float in allowed:
            return float(text)
    except (KeyError, ValueError):
        raise ConfigError(f"{where} {text}: does not fit its type, {type_name(hint)}") from None
    if getattr(hint, "__origin__", None) in (list, dict):
        value = yaml.safe_load(text)
        return value if isinstance(value, list | dict) else [text]
    return text


def _apply_flag(tree: DictConfig, flag: _Flag, selection: _Selection, lines: _Arguments) -> None:
    """Gives a flag to whom it belongs: the host, a selected plugin, or the one it selects."""
    hints = get_type_hints(TrainSettings)
    if flag.name in FLAG_HOMES:
        section, _, rest = FLAG_HOMES[flag.name].partition(".")
        hint = get_type_hints(_SECTIONS[section]).get(rest, str)
        value = lines.take_value(flag, hint)
        OmegaConf.update(tree, FLAG_HOMES[flag.name], value, force_add=True)
    elif flag.name in hints:
        tree.train[flag.name] = lines.take_value(flag, hints[flag.name])
    elif flag.name in NOT_YET:
        allowed, what = NOT_YET[flag.name]
        hint = bool if set(allowed) & {"True", "False"} else str
        value = str(lines.take_value(flag, hint))
        if value not in allowed:
            only = f"; it can only be {' or '.join(allowed)}" if allowed else "; leave it out"
            raise ConfigError(f"--{flag.name} {value}: {what} is not part of this version{only}")
    elif selection.is_plugin(flag.name):
        selection.switch(flag.name, lines.take_value(flag, bool))
    else:
        owner, field, hint = selection.owner_of(flag.name)
        selection.use(owner, f"--{flag.name}")
        if tree.plugins.get(owner) is None:
            tree.plugins[owner] = {}
        tree.plugins[owner][field] = lines.take_value(flag, hint)


class _Selection:
    """Which plugins run, in order, and whose flags are whose."""

    def __init__(self, tree: DictConfig, chosen: list[str] | None) -> None:
        self.installed = plugin_packages.discover()
        self._configured = [normalize(str(name)) for name in tree.plugins]
        for name in list(tree.plugins):
            if normalize(str(name)) != name:
                tree.plugins[normalize(str(name))] = tree.plugins.pop(name)
        self._names = list(self._configured if chosen is None else chosen)
        self._used_by: dict[str, str] = {}
        self._removed: set[str] = set()
        self._classes: dict[str, type] = {}

    def is_plugin(self, name: str) -> bool:
        """Whether --NAME switches a plugin: an installed one, or one known by its name."""
        return name in KNOWN_DISTRIBUTIONS or any(p.name == name for p in self.installed)

    def switch(self, name: str, on: bool) -> None:
        """`--lpw True` appends, `--lpw False` removes."""
        if on and name not in self._names:
            self._names.append(name)
        if not on:
            self._removed.add(name)
            self._names = [other for other in self._names if other != name]

    def use(self, name: str, by: str) -> None:
        """A flag of the plugin was given: it runs."""
        self._used_by.setdefault(name, by)
        if name not in self._names:
            self._names.append(name)

    def owner_of(self, flag: str) -> tuple[str, str, Any]:
        """(plugin, option, type) that a flag such as snr_gamma means. Raises ConfigError."""
        selected = [p for p in self.installed if p.name in self._names]
        others = [p for p in self.installed if p.name not in self._names]
        prefixed: list[str] = []
        for group in (selected, others):
            owners = []
            for plugin in group:
                field = flag.removeprefix(f"{plugin.name}_")
                if field == flag or any(plugin.name == name for name, _, _ in owners):
                    continue
                prefixed.append(plugin.name)
                hints = self._option_types(plugin.name)
                if field in hints:
                    owners.append((plugin.name, field, hints[field]))
            if len(owners) > 1:
                ways = " or ".join(f"plugins.{name}.{field}=..." for name, field, _ in owners)
                names = " and ".join(name for name, _, _ in owners)
                raise ConfigError(
                    f"--{flag}: could belong to the plugins {names}; select one with --plugins, or "
                    f"write {ways}"
                )
            if owners:
                return owners[0]
        for name, distribution in KNOWN_DISTRIBUTIONS.items():
            if flag.startswith(f"{name}_") and name not in prefixed:
                raise PluginError(
                    f"--{flag}: the plugin {name} is not installed; pip install {distribution}"
                )
        known = [f.name for f in fields(TrainSettings)] + [
            *FLAG_HOMES,
            *NOT_YET,
            "plugins",
            "config",
        ]
        for name in prefixed:
            known += [f"{name}_{field}" for field in self._option_types(name)]
        raise ConfigError(
            f"--{flag}: there is no such flag{did_you_mean(flag, known)}; "
            "sdxl-host train --help lists them"
        )

    def _class(self, name: str) -> type:
        if name not in self._classes:
            found = plugin_packages.find(name, self.installed)
            self._classes[name] = plugin_packages.import_class(found)
        return self._classes[name]

    def _option_types(self, name: str) -> dict[str, Any]:
        schema = getattr(self._class(name), "Options", None)
        return get_type_hints(schema) if schema is not None and is_dataclass(schema) else {}

    def finish(self, tree: DictConfig) -> tuple[list[tuple[Installed, type]], list[str]]:
        """The selected plugins, imported, and notices about configured ones that are off."""
        for name in self._removed:
            if name in self._used_by:
                raise ConfigError(
                    f"--{name} False contradicts {self._used_by[name]}; remove one of them"
                )
        for name in list(tree.plugins):
            if name not in self._names and name not in self._configured:
                raise ConfigError(f"plugins.{name}: can't be set while {name} is switched off")
        chosen = [
            (plugin_packages.find(name, self.installed), self._class(name)) for name in self._names
        ]
        off = [name for name in tree.plugins if name not in self._names]
        notices = [f"plugins.{name} is configured but switched off" for name in off]
        for name in off:
            del tree.plugins[name]
        for name in self._names:
            if tree.plugins.get(name) is None:
                tree.plugins[name] = {}
        return chosen, notices
