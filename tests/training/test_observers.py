"""What the host does at the end of a step, where whole runs do not show it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sdxl_host.errors import HostError
from sdxl_host.training import observers
from sdxl_host.training.distributed import Ranks
from sdxl_host.training.observers import FiniteGuard, Progress, SharedStop
from sdxl_host.training.signals import Interruption
from sdxl_host.training.state import RunState
from sdxl_host.training.summary import end_facts


class OfTwo(Ranks):
    """Rank 0 of two; `answers` are the other's flags, in the order in which it is asked."""

    def __init__(self, *answers: bool) -> None:
        super().__init__(0, 2)
        self.answers = list(answers)

    def any(self, flag: bool) -> bool:
        return self.answers.pop(0) or flag


class Run:
    """The part of a trainer that a stop concerns."""

    def __init__(self, stop_reason: str | None = None) -> None:
        self.stop_reason = stop_reason
        self.is_interrupted = False

    def stop(self, reason: str, is_interruption: bool = False) -> None:
        self.stop_reason, self.is_interrupted = reason, is_interruption


@pytest.mark.parametrize(
    ("stop_reason", "signal", "others", "expected"),
    [
        (None, None, [False], (None, False)),
        (None, None, [True, False], ("as another rank asked", False)),
        (None, None, [True, True], ("interrupted by a signal to another rank", True)),
        (None, 15, [False, False], ("interrupted by SIGTERM", True)),
        ("enough", None, [False, False], ("enough", False)),
        ("enough", None, [True, True], ("interrupted by a signal to another rank", True)),
    ],
)
def test_ranks_stop_after_the_same_step(
    stop_reason: str | None,
    signal: int | None,
    others: list[bool],
    expected: tuple[str | None, bool],
) -> None:
    """others: whether the other rank is to stop, and whether it got a signal."""
    interruption = Interruption([].append)
    interruption.number = signal
    run: Any = Run(stop_reason)
    SharedStop(OfTwo(*others), interruption).on_step_end(run, SimpleNamespace())  # type: ignore[arg-type]
    assert (run.stop_reason, run.is_interrupted) == expected


@pytest.mark.parametrize(("is_scaled", "last"), [(False, 1), (True, 25)])
def test_skipped_updates_are_counted_and_too_many_in_a_row_end_the_run(
    is_scaled: bool, last: int
) -> None:
    state = RunState(networks=None, cell=None, hooks=None)  # type: ignore[arg-type]
    logged: dict[str, float] = {}
    run: Any = SimpleNamespace(log=logged.__setitem__)
    guard = FiniteGuard(state, is_scaled)
    result: Any = SimpleNamespace(
        step=1,
        skipped=True,
        loss_scale=8.0,
        per_sample_loss=[float("nan"), 1.0],
        sample_ids=["a.png", "b.png"],
        noise=SimpleNamespace(sigma=SimpleNamespace(min=lambda: 1.0, max=lambda: 2.0)),
    )
    for _ in range(last - 1):
        guard.on_step_end(run, result)
    result.skipped = False
    guard.on_step_end(run, result)
    assert (state.skipped, state.skipped_in_a_row) == (last - 1, 0)
    assert logged == ({"loss_scale": 8.0, "skipped": False} if is_scaled else {})
    result.skipped = True
    for _ in range(last - 1):
        guard.on_step_end(run, result)
    with pytest.raises(HostError, match=r"^step 1: .* images a\.png\)"):
        guard.on_step_end(run, result)


def test_a_run_can_go_on_only_where_steps_are_left(tmp_path: Path) -> None:
    train = SimpleNamespace(save_optimizer=True)
    config = SimpleNamespace(train=train, data=SimpleNamespace(total_step=5))
    state = SimpleNamespace(step=5, skipped=3)
    run: Any = SimpleNamespace(
        state=state, config=config, save_path=tmp_path, is_interrupted=True, skipped=None
    )

    def lines() -> str:
        return str(end_facts(run, 7.6, Path("c"), Path("p")))

    assert "3 updates, whose gradients were not finite" in lines()
    assert "--resume" not in lines()
    state.step, state.skipped = 4, 0
    assert "--resume c" in lines()
    assert "not finite" not in lines()
    train.save_optimizer = False
    assert "--weight c" in lines()
    run.is_interrupted = False
    assert "--weight" not in lines()


def test_the_speed_is_that_of_whole_calls_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three calls of four steps, which end at 100, 108 and 116 s: 4 steps of 3 images in 8 s."""
    clock, lines = [0.0], []
    monkeypatch.setattr(observers.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(observers.sys.stderr, "isatty", lambda: False)
    progress = Progress(5, 16, 3, True, lines.append, call=4)
    for step in range(5, 17):
        clock[0] = 100 + (step - 5) // 4 * 8.0
        result: Any = SimpleNamespace(step=step, loss=1.0, learning_rate=1e-3)
        progress.on_step_end(Run(), result)  # type: ignore[arg-type]
    assert [line.endswith("compiled") for line in lines] == [True] * 4 + [False] * 8
    assert all("  1.5 images/s, " in line for line in lines[4:])
