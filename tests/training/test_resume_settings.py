"""Which settings a resumed run may have otherwise than the run had before."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_host.checkpoints.open import Checkpoint, open_checkpoint
from sdxl_host.checkpoints.write import Contents, save_checkpoint
from sdxl_host.config.load import load
from sdxl_host.errors import ConfigError
from sdxl_host.training.ema import ema_shares
from sdxl_host.training.lr_schedulers import LinearScheduler
from sdxl_host.training.resume import find_checkpoint
from sdxl_host.training.run_folder import settings_text
from sdxl_host.training.summary import plugin_list

TINY = str(Path(__file__).parents[2] / "configs" / "tiny.yaml")
ARGUMENTS = ["--config", TINY, "--save_path_with_time=False", "--per_batch_size=1"]

Saved = Callable[..., Checkpoint]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """A checkpoint of step 1 of a run with these arguments, without the run.

    edit: makes the settings file what another version would have written.
    """

    def save(*words: str, edit: Callable[[str], str] = str) -> Checkpoint:
        config = load([*ARGUMENTS, *words])
        arrays = {"a": np.zeros(1, np.float32)}
        contents = Contents(
            1, edit(settings_text(config, "")), arrays, arrays, {}, arrays, {}, {},
            plugin_list(config), {"samples": {}},
        )  # fmt: skip
        return open_checkpoint(save_checkpoint(tmp_path / "saved" / "checkpoints", contents))

    return save


def differences(checkpoint: Checkpoint, *words: str) -> list[str]:
    """Of a run with these arguments from the one of the checkpoint."""
    named = [*ARGUMENTS, *words, f"--resume={checkpoint.folder}", "--allow_changes=True"]
    return find_checkpoint(load(named), {}, 4)[1]


SCHEDULER = "optim.scheduler_config.target=sdxl_host."
WARM_UP = "optim.scheduler_config.params.warm_up_steps=2"
PARAMS = "optim.scheduler_config.params"
STEADY = {
    "none": ["optim.scheduler_config=null"],
    "warm-up": [WARM_UP],
    "multi-step": [f"{SCHEDULER}MultiStepScheduler", f"{PARAMS}.milestones=[3,6]"],
    "linear to a step": [f"{SCHEDULER}LinearScheduler", f"{PARAMS}.end_step=5"],
}


@pytest.mark.parametrize("words", STEADY.values(), ids=STEADY)
@pytest.mark.parametrize("total", [7, 30])
def test_a_run_may_have_another_length_where_its_rates_stay(
    saved: Saved, words: list[str], total: int
) -> None:
    checkpoint = saved(*words, "--total_step=10", "--plugins=none")
    assert differences(checkpoint, *words, f"--total_step={total}", "--plugins=none") == []


def test_a_run_may_not_have_another_length_where_that_changes_rates(
    saved: Saved, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of the steps that both make; they are looked at, whatever made them."""
    words = [f"{SCHEDULER}LinearScheduler", "optim.base_learning_rate=0.0009", WARM_UP]
    words.append("--plugins=none")
    checkpoint = saved(*words, "--total_step=10")
    longer = [*words, "--total_step=18"]
    told = (
        "data.total_step is 10 there and 18 here, so that the learning rate of update 10 is 0 "
        "there and 0.00045 here"
    )
    assert differences(checkpoint, *longer) == [told]
    with pytest.raises(ConfigError, match=f"this run's: {told}; go on .* --allow_changes True"):
        find_checkpoint(load([*ARGUMENTS, *longer, f"--resume={checkpoint.folder}"]), {}, 4)
    (shorter,) = differences(checkpoint, *words, "--total_step=4")
    assert "so that the learning rate of update 4 is 0.000675 there and 0 here" in shorter
    assert differences(checkpoint, *words, "--total_step=10") == []

    def falls_at_the_end(self: LinearScheduler, updates: int) -> np.ndarray:
        return np.where(np.arange(updates) < updates - 1, 1.0, 0.5)

    monkeypatch.setattr(LinearScheduler, "factors", falls_at_the_end)
    (other,) = differences(checkpoint, *longer)
    assert "so that the learning rate of update 10 is 0.00045 there and 0.0009 here" in other


def test_the_same_weights_may_be_written_otherwise(
    saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which they were given, because a later one goes before."""
    monkeypatch.chdir(tmp_path)
    words = ["--plugins=none", "--total_step=10"]

    def began(settings: str) -> str:
        return settings.replace("  weight: ''", "  weight: base,lora")

    checkpoint = saved(*words, edit=began)
    assert differences(checkpoint, *words, f"--weight=./base, {tmp_path}/x/../lora") == []
    for others in ("lora,base", "base", "base,lora,lora"):
        with pytest.raises(ConfigError, match="began with base,lora; leave --weight out"):
            differences(checkpoint, *words, f"--weight={others}")


def test_the_ema_of_a_run_does_not_follow_its_length() -> None:
    """So a longer run is the same run as far as both go."""
    shares = ema_shares(0.9999, 50)
    assert shares[:20].tolist() == ema_shares(0.9999, 20).tolist()


def test_settings_of_a_later_version_have_their_defaults_in_an_earlier_run(
    saved: Saved, site: Any
) -> None:
    """Where this run has others, they differ; so do settings that are gone."""
    site.add("sized", "size: int = 3\ncolour: str = 'red'")
    later = ("  scale_lr: ", "  shuffle: ", "  scheduler_config: ", "    size: ")

    def earlier(settings: str) -> str:
        lines = settings.splitlines(keepends=True)
        kept = [line for line in lines if not line.startswith(later)]
        assert len(lines) - len(kept) == len(later)
        return "".join(kept).replace("train:\n", "train:\n  gone: 3\n")

    words = ["--plugins=sized", "optim.scheduler_config=null"]
    checkpoint = saved(*words, edit=earlier)
    gone = "train.gone is 3 there and None here"
    assert differences(checkpoint, *words) == [gone]
    others = ["--scale_lr=True", "plugins.sized.size=4"]
    assert differences(checkpoint, *words, *others) == [
        gone,
        "train.scale_lr is False there and True here",
        "plugins.sized.size is 3 there and 4 here",
    ]


def test_rates_of_another_length_are_those_of_the_global_batch(saved: Saved) -> None:
    """`scale_lr` multiplies them by its 4 samples."""
    words = [f"{SCHEDULER}LinearScheduler", "optim.base_learning_rate=0.0009", WARM_UP]
    words += ["--plugins=none", "--scale_lr=True"]
    checkpoint = saved(*words, "--total_step=10")
    (found,) = differences(checkpoint, *words, "--total_step=18")
    assert "learning rate of update 10 is 0 there and 0.0018 here" in found


def test_a_setting_without_effect_may_differ(saved: Saved) -> None:
    """max_grad_norm has one beside clip_grad alone."""
    off = ["--plugins=none", "--clip_grad=False", "--max_grad_norm=2"]
    checkpoint = saved("--plugins=none", "--clip_grad=False")
    assert differences(checkpoint, *off) == []
    on = ["--plugins=none", "--clip_grad=True"]
    checkpoint = saved(*on)
    assert differences(checkpoint, *on, "--max_grad_norm=2") == [
        "train.max_grad_norm is 1.0 there and 2.0 here"
    ]
    assert differences(checkpoint, *off) == ["train.clip_grad is True there and False here"]


def test_more_differences_than_a_line_holds_are_counted(saved: Saved) -> None:
    checkpoint = saved("--plugins=none")
    words = ["--seed=1", "--clip_grad=False", "--use_ema=True", "--scale_lr=True", "--ms_mode=0"]
    resumed = [*ARGUMENTS, f"--resume={checkpoint.folder}", *words, "--plugins=none"]
    with pytest.raises(ConfigError, match=r"ms_mode is 1 there and 0 here; go on"):
        find_checkpoint(load(resumed), {}, 4)
    with pytest.raises(ConfigError, match=r"scale_lr is .*; and 1 more; go on"):
        find_checkpoint(load([*resumed, "data.shuffle=False"]), {}, 4)
