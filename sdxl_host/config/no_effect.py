"""Settings that have no effect beside others: each is named at the start of a run, or refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sdxl_host.config.layers import Layers
from sdxl_host.errors import ConfigError
from sdxl_host.settings.declarations import SETTINGS, TrainSettings

__all__ = ["no_effect_lines"]

Tree = Mapping[str, Any]

_FIRST_STAGE_AMP = "model.params.disable_first_stage_amp"
_FIRST_STAGE = "model.params.first_stage_config.target"
_SCORE = "data.dataset_config.params.aesthetic_score"
_EMBEDDERS = "model.params.conditioner_config.params.emb_models"


def no_effect_lines(layers: Layers, sections: Mapping[str, Any], tree: Tree) -> list[str]:
    """A line for each setting that was given and has no effect.

    layers: who gave what. sections: by name, the sections that have a dataclass, as its instances.
    tree: all sections as plain values. A setting whose need has a remedy is refused where the
    command line gives it, by a ConfigError; a file may serve many runs, so it is never refused.
    """
    lines = []
    for key, setting in SETTINGS.items():
        section, _, name = key.partition(".")
        needs = setting.needs
        if needs is None or needs.met(sections[section]):
            continue
        on_command_line = layers.on_command_line(key)
        if on_command_line and needs.remedy:
            raise ConfigError(
                f"{key}: has no effect, {needs.otherwise}; {needs.remedy}, or leave it out"
            )
        is_default = getattr(sections[section], name) == setting.default
        # A run's own file has every key, so only another value than the default was meant there.
        is_written = layers.in_file(key) and not layers.file_is_a_runs
        if on_command_line or is_written or not is_default:
            lines.append(f"{key} has no effect: {needs.otherwise}")
    for rule in _OF_PARAMS:
        if _at(tree, rule.key) is not None and rule.is_idle(sections["train"], tree):
            lines.append(f"{rule.key} has no effect: {rule.why}")
    return lines


# ---- params of targets, which declare nothing of themselves


@dataclass(frozen=True)
class _IdleParam:
    """key: where the param stands. is_idle: whether it has no effect, by the section `train` and
    the whole tree. why: the reason."""

    key: str
    is_idle: Callable[[TrainSettings, Tree], bool]
    why: str


def _at(tree: Any, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _amp_is_on(tree: Tree) -> bool:
    return _at(tree, _FIRST_STAGE_AMP) is False


def _has_no_network(tree: Tree) -> bool:
    return str(_at(tree, _FIRST_STAGE)).rpartition(".")[2] == "IdentityFirstStage"


def _has_no_score(tree: Tree) -> bool:
    nodes = _at(tree, _EMBEDDERS)
    keys = [_at(node, "input_key") for node in nodes] if isinstance(nodes, list) else []
    return "aesthetic_score" not in keys


_OF_PARAMS = (
    _IdleParam(
        _FIRST_STAGE_AMP,
        lambda train, tree: _amp_is_on(tree) and train.ms_amp_level == "O0",
        "everything is float32 at ms_amp_level O0",
    ),
    _IdleParam(
        _FIRST_STAGE_AMP,
        lambda train, tree: (
            _amp_is_on(tree) and train.ms_amp_level != "O0" and _has_no_network(tree)
        ),
        "the first stage has no network",
    ),
    _IdleParam(
        _SCORE,
        lambda train, tree: _has_no_score(tree),
        "this model has no aesthetic_score among its embedders",
    ),
)
