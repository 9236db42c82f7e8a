"""Settings that have no effect beside others: each is named at the start of a run, or refused."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sdxl_host.errors import ConfigError
from sdxl_host.settings.schema import TrainSettings

__all__ = ["unused_lines", "written_in"]

Tree = Mapping[str, Any]

_USUAL = asdict(TrainSettings())


@dataclass(frozen=True)
class _Unused:
    """key: the setting. where: whether it has no effect, by the resolved tree; why: the reason.
    remedy: what to do where it was meant; with one it is refused on the command line."""

    key: str
    where: Callable[[Tree], bool]
    why: str
    remedy: str = ""


def unused_lines(tree: Tree, written: Collection[str], commanded: Collection[str]) -> list[str]:
    """A line for each setting that was given and has no effect.

    tree: the resolved sections. written: keys that the config file sets, which may serve many runs;
    commanded: those that the command line sets. Raises ConfigError for one of these that has a
    remedy. The guide's own have none, because it calls them effective only beside their switch.
    """
    lines = []
    for row in _ROWS:
        if not _is_given(row.key, tree, {*written, *commanded}) or not row.where(tree):
            continue
        if row.remedy and row.key in commanded:
            raise ConfigError(f"{row.key}: has no effect, {row.why}; {row.remedy}, or leave it out")
        lines.append(f"{row.key} has no effect: {row.why}")
    return lines


def written_in(tree: Tree) -> set[str]:
    """The keys of `train` that a file sets; none where it sets them all, as a run's own does."""
    section = set(tree.get("train") or ())
    return set() if section >= set(_USUAL) else {f"train.{name}" for name in section}


def _is_given(key: str, tree: Tree, named: Collection[str]) -> bool:
    """Whether someone wrote it; of `train`, which is filled up, that or a value of its own."""
    section, _, name = key.rpartition(".")
    if section != "train":
        return _at(tree, key) is not None
    return key in named or tree["train"][name] != _USUAL[name]


def _at(tree: Tree, key: str) -> Any:
    """What stands at a dotted key; None where nothing does."""
    node: Any = tree
    for part in key.split("."):
        node = node.get(part) if isinstance(node, Mapping) else None
    return node


# ---- where a setting has no effect


def _off(switch: str) -> Callable[[Tree], bool]:
    return lambda tree: not tree["train"][switch]


def _is_eager(tree: Tree) -> bool:
    return tree["train"]["ms_mode"] == 1


def _is_float32(tree: Tree) -> bool:
    return tree["train"]["ms_amp_level"] == "O0"


def _continues(tree: Tree) -> bool:
    train = tree["train"]
    return bool(train["resume"] or train["resume_step"] or train["optimizer_weight"])


def _goes_on_elsewhere(tree: Tree) -> bool:
    """Whether the run that a checkpoint belongs to lies outside `save_path`."""
    train = tree["train"]
    if not _continues(tree) or train["resume"] == "latest":
        return False
    folder = Path(train["resume"] or train["weight"]).expanduser().resolve()
    return Path(train["save_path"]).expanduser().resolve() not in folder.parents


_FIRST_STAGE_AMP = "model.params.disable_first_stage_amp"
_FIRST_STAGE = "model.params.first_stage_config.target"
_SCORE = "data.dataset_config.params.aesthetic_score"
_EMBEDDERS = "model.params.conditioner_config.params.emb_models"


def _has_no_network(tree: Tree) -> bool:
    return str(_at(tree, _FIRST_STAGE)).rpartition(".")[2] == "IdentityFirstStage"


def _hears_no_score(tree: Tree) -> bool:
    nodes = _at(tree, _EMBEDDERS)
    heard = [_at(node, "input_key") for node in nodes] if isinstance(nodes, list) else []
    return "aesthetic_score" not in heard


_ROWS = (
    _Unused("train.max_grad_norm", _off("clip_grad"), "clip_grad is off"),
    _Unused("train.sink_size", _off("data_sink"), "data_sink is off"),
    _Unused("train.sink_queue_size", _off("data_sink"), "data_sink is off"),
    _Unused("train.ema_decay", _off("use_ema"), "use_ema is off", "use --use_ema True"),
    _Unused("train.jit_level", _is_eager, "ms_mode 1 compiles nothing", "use --ms_mode 0"),
    _Unused("train.compile_cache", _is_eager, "ms_mode 1 compiles nothing", "use --ms_mode 0"),
    _Unused(
        "train.sample_count",
        lambda tree: bool(tree["train"]["sample_prompts"]),
        "a grid shows the sample_prompts",
        "give as many prompts as images",
    ),
    _Unused(
        "train.negative_prompt",
        lambda tree: tree["train"]["negative_prompt"] and tree["train"]["guidance_scale"] == 1,
        "guidance_scale 1 is no guidance",
        "use --guidance_scale 3",
    ),
    _Unused(
        "train.allow_changes",
        lambda tree: tree["train"]["allow_changes"] and not _continues(tree),
        "no run is resumed",
        "use --resume latest",
    ),
    _Unused("train.save_path", _goes_on_elsewhere, "a resumed run goes on in its own folder"),
    _Unused(
        "train.ms_amp_dtype",
        # bfloat16 is refused there: see `check_precision`.
        lambda tree: _is_float32(tree) and tree["train"]["ms_amp_dtype"] == "float16",
        "everything is float32 at ms_amp_level O0",
    ),
    _Unused(
        _FIRST_STAGE_AMP,
        lambda tree: _at(tree, _FIRST_STAGE_AMP) is False and _is_float32(tree),
        "everything is float32 at ms_amp_level O0",
    ),
    _Unused(
        _FIRST_STAGE_AMP,
        lambda tree: (
            _at(tree, _FIRST_STAGE_AMP) is False and not _is_float32(tree) and _has_no_network(tree)
        ),
        "the first stage has no network",
    ),
    _Unused(_SCORE, _hears_no_score, "this model has no aesthetic_score among its embedders"),
)
