"""Learning-rate schedules against their closed forms and torch's."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sdxl_host.training.lr_schedulers import (
    CosineScheduler,
    LambdaLinearScheduler,
    LambdaWarmUpCosineScheduler,
    LambdaWarmUpCosineScheduler2,
    LambdaWarmUpScheduler,
    LinearScheduler,
    MultiStepScheduler,
    learning_rates,
)

FALLING = pytest.mark.parametrize("falling", [LinearScheduler, CosineScheduler])
CYCLES = pytest.mark.parametrize("cycles", [LambdaLinearScheduler, LambdaWarmUpCosineScheduler2])


# ---- warm-up and constant


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        (4, [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]),
        (1, [2.0] * 6),
        (0, [2.0] * 6),
        (100, [0.02, 0.04, 0.06, 0.08, 0.10, 0.12]),
    ],
)
def test_warm_up(steps, expected):
    """Update k has base * min(1, k / warm_up_steps): never 0, and the base at k = warm_up_steps."""
    rates = learning_rates(2.0, LambdaWarmUpScheduler(steps), 6)
    assert rates.dtype == np.float64
    np.testing.assert_allclose(rates, expected, rtol=1e-12)


def test_without_a_schedule_the_rate_is_constant():
    assert learning_rates(3e-4, None, 5).tolist() == [3e-4] * 5


@pytest.mark.parametrize(
    "make",
    [
        lambda: LambdaWarmUpScheduler(-1),
        lambda: LinearScheduler(warm_up_steps=-1),
        lambda: CosineScheduler(warm_up_steps=-1),
        lambda: MultiStepScheduler([5], warm_up_steps=-1),
        lambda: LambdaWarmUpCosineScheduler(-1, 0.0, 1.0, 0.0, 10),
    ],
)
def test_a_negative_warm_up_is_refused(make):
    with pytest.raises(ValueError, match="Scheduler: warm_up_steps must be at least 0, not -1"):
        make()


# ---- linear and cosine


def left(kind: type, progress: float) -> float:
    """1 - p, or (1 + cos(pi p)) / 2."""
    return 1 - progress if kind is LinearScheduler else (1 + math.cos(math.pi * progress)) / 2


@FALLING
@pytest.mark.parametrize(
    ("end_factor", "warm_up", "end_step"),
    [(0.0, 0, None), (0.1, 1, 12), (0.3, 2, 25), (1.0, 7, 40), (0.3, 7, None), (0.0, 2, 40)],
)
def test_the_fall_from_1_to_end_factor(falling, end_factor, warm_up, end_step):
    """k / w up to update w (1 without a warm-up), then e + (1 - e) of what is left to end_step."""
    factors = falling(end_factor, warm_up, end_step).factors(25)
    assert factors.dtype == np.float64
    assert factors.shape == (25,)
    peak, end = max(warm_up, 1), 25 if end_step is None else end_step
    for k, factor in enumerate(factors, start=1):
        progress = min(1.0, (k - peak) / (end - peak))
        fallen = end_factor + (1 - end_factor) * left(falling, progress)
        assert factor == pytest.approx(k / peak if k <= peak else fallen, rel=1e-12), k


@FALLING
@pytest.mark.parametrize("end_factor", [0.0, 0.1, 0.3, 1 / 3, 0.7])
@pytest.mark.parametrize("updates", [9, 10, 1000])
def test_the_ends_of_the_fall_are_exact(falling, end_factor, updates):
    """1 at the last update of the warm-up, end_factor at the last of the run; without a warm-up 1
    at the first. Between them it only falls."""
    for warm_up in (0, 5):
        factors = falling(end_factor, warm_up).factors(updates)
        peak = max(warm_up, 1)
        assert factors[peak - 1] == 1.0
        assert factors[-1] == end_factor
        assert (np.diff(factors[peak - 1 :]) < 0).all()
    kept = falling(end_factor, 5, 8).factors(updates)
    assert kept[6] > end_factor
    assert (kept[7:] == end_factor).all()


def test_half_of_the_fall_is_in_the_middle():
    """Linear and cosine meet there; before it the cosine is above the line, after it below."""
    line, cosine = LinearScheduler(0.2).factors(21), CosineScheduler(0.2).factors(21)
    assert line[10] == pytest.approx(0.6)
    assert cosine[10] == pytest.approx(0.6)
    assert (cosine[1:10] > line[1:10]).all()
    assert (cosine[11:20] < line[11:20]).all()


@FALLING
def test_the_end_of_the_run_is_that_of_the_longer_run(falling):
    """Without end_step the curve is stretched to the run; with it the length changes nothing."""
    assert falling().factors(20)[9] < falling().factors(40)[9]
    fixed = falling(0.0, 3, 30)
    np.testing.assert_array_equal(fixed.factors(20), fixed.factors(40)[:20])


@FALLING
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-0.1,), r"end_factor must lie in \[0, 1\], not -0.1; it is a share of"),
        ((1.5,), r"end_factor must lie in \[0, 1\], not 1.5"),
        ((0.0, 5, 5), "end_step must be above warm_up_steps and 1, not 5"),
        ((0.0, 0, 1), "end_step must be above warm_up_steps and 1, not 1"),
        ((0.0, 0, -3), "end_step must be above warm_up_steps and 1, not -3"),
    ],
)
def test_a_fall_that_makes_no_sense_is_refused(falling, arguments, message):
    with pytest.raises(ValueError, match=f"^{falling.__name__}: {message}"):
        falling(*arguments)


@FALLING
@pytest.mark.parametrize(("warm_up", "updates"), [(10, 10), (12, 10), (0, 1), (1, 1)])
def test_a_warm_up_that_leaves_nothing_to_fall_is_refused(falling, warm_up, updates):
    message = (
        f"^{falling.__name__}: the rate is to fall from update {max(warm_up, 1)} to the run's "
        f"last, which is {updates}; lower warm_up_steps or raise data.total_step"
    )
    with pytest.raises(ValueError, match=message):
        falling(0.0, warm_up).factors(updates)


# ---- steps


def test_each_milestone_is_the_last_update_before_a_drop():
    factors = MultiStepScheduler([3, 5, 6], gamma=0.5).factors(8)
    assert factors.tolist() == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.125, 0.125]


def test_steps_after_a_warm_up():
    """The first milestone may be the last update of the warm-up."""
    factors = MultiStepScheduler([4, 6], gamma=0.1, warm_up_steps=4).factors(8)
    expected = [0.25, 0.5, 0.75, 1.0, 0.1, 0.1, 0.01, 0.01]
    np.testing.assert_allclose(factors, expected, rtol=1e-12)


def test_gamma_is_a_tenth_where_it_is_not_said():
    assert MultiStepScheduler([1]).factors(2).tolist() == [1.0, 0.1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([],), "milestones is empty; name one, or use LambdaWarmUpScheduler"),
        (([5, 3],), r"milestones must ascend, each once, not \[5, 3\]; sort them"),
        (([3, 3],), r"milestones must ascend, each once, not \[3, 3\]"),
        (([0, 3],), "milestone 0 must be at least 1 and not within the warm-up"),
        (([-2, 3],), "milestone -2 must be at least 1"),
        (([3, 9], 0.1, 4), "milestone 3 must be .* the warm-up; warm_up_steps is 4"),
        (([3], 0.0), "gamma must lie between 0 and 1, not 0.0"),
        (([3], -0.5), "gamma must lie between 0 and 1, not -0.5"),
        (([3], 1.0), "gamma must lie between 0 and 1, not 1.0"),
    ],
)
def test_steps_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ValueError, match=f"^MultiStepScheduler: {message}"):
        MultiStepScheduler(*arguments)


@pytest.mark.parametrize("last", [10, 11, 5000])
def test_a_milestone_beyond_the_run_is_refused(last):
    """A drop after the last update has no effect."""
    schedule = MultiStepScheduler([3, last])
    with pytest.raises(ValueError, match=f"milestone {last} has no update after it in a run of 10"):
        schedule.factors(10)
    assert schedule.factors(last + 1)[-1] == pytest.approx(0.01)


# ---- torch's


WARM = {"warm_up_steps": 8}


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        ("linear", LinearScheduler(0.1)),
        ("linear_warm_up", LinearScheduler(0.1, **WARM)),
        ("linear_to_20", LinearScheduler(0.1, end_step=20)),
        ("cosine", CosineScheduler(0.1)),
        ("cosine_warm_up", CosineScheduler(0.1, **WARM)),
        ("multi_step", MultiStepScheduler([12, 20, 21], 0.3)),
        ("multi_step_warm_up", MultiStepScheduler([12, 20, 21], 0.3, **WARM)),
    ],
)
def test_schedules_are_those_of_torch(golden: Path, name: str, schedule: Any):
    """LinearLR, CosineAnnealingLR and MultiStepLR over 30 updates; SequentialLR for the warm-up."""
    with np.load(golden / "learning_rates.npz") as file:
        theirs = file[name]
    np.testing.assert_allclose(schedule.factors(30), theirs, rtol=1e-12)


# ---- the schedules of old configs


def old_cosine(n: int, warm_up: int, low: float, high: float, start: float, end: int) -> float:
    """The original's `schedule(n)`."""
    if n < warm_up:
        return (high - start) / warm_up * n + start
    t = min((n - warm_up) / (end - warm_up), 1.0)
    return low + 0.5 * (high - low) * (1 + math.cos(t * math.pi))


@pytest.mark.parametrize(
    "arguments",
    [(5, 0.1, 0.9, 0.3, 20), (0, 0.0, 1.0, 0.5, 12), (3, 0.5, 0.5, 1.0, 100), (5, 1.0, 0.1, 0, 8)],
)
def test_the_old_cosine(arguments):
    """Updates are n = 0, 1, ...; lr_min is kept after max_decay_steps, and may be above lr_max."""
    warm_up, low, high, start, end = arguments
    factors = LambdaWarmUpCosineScheduler(*arguments).factors(30)
    expected = [old_cosine(n, warm_up, low, high, start, end) for n in range(30)]
    np.testing.assert_allclose(factors, expected, rtol=1e-12)


def test_the_old_cosine_over_the_whole_run():
    """max_decay_steps -1 is the run's length, as the old trainer filled it in."""
    whole = LambdaWarmUpCosineScheduler(4, 0.1, 1.0, 0.2, -1).factors(24)
    np.testing.assert_array_equal(
        whole, LambdaWarmUpCosineScheduler(4, 0.1, 1.0, 0.2, 24).factors(24)
    )
    assert whole[-1] > 0.1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((4, -0.1, 1.0, 0.0, 9), "lr_min, lr_max and lr_start must be at least 0"),
        ((4, 0.0, 1.0, -1.0, 9), "lr_min, lr_max and lr_start must be at least 0"),
        ((4, 0.0, -1.0, 0.0, 9), "lr_min, lr_max and lr_start must be at least 0"),
        ((4, 0.0, 1.0, 0.0, 4), "max_decay_steps must be above warm_up_steps, or -1 .* not 4"),
        ((0, 0.0, 1.0, 0.0, -2), "max_decay_steps must be above warm_up_steps, or -1 .* not -2"),
    ],
)
def test_the_old_cosine_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"^LambdaWarmUpCosineScheduler: {message}"):
        LambdaWarmUpCosineScheduler(*arguments)


def test_the_old_cosine_refuses_a_run_of_warm_up():
    schedule = LambdaWarmUpCosineScheduler(9, 0.0, 1.0, 0.0, -1)
    with pytest.raises(ValueError, match="the warm-up of 9 updates fills the run of 9; lower"):
        schedule.factors(9)


TWO_CYCLES: dict[str, Any] = {
    "warm_up_steps": [4, 0], "cycle_lengths": [10, 8],
    "f_start": [0.1, 0.5], "f_max": [1.0, 0.6], "f_min": [0.2, 0.0],
}  # fmt: skip


def test_old_lines_rise_to_f_max_and_fall_to_f_min_in_each_cycle():
    """By hand: 0.1 + 0.9 n / 4, then 0.2 + 0.8 (10 - n) / 10, whose n = 10 is still the first
    cycle's; the second has no warm-up and begins with its n = 1."""
    factors = LambdaLinearScheduler(**TWO_CYCLES).factors(19)
    np.testing.assert_allclose(factors[:4], [0.1, 0.325, 0.55, 0.775])
    np.testing.assert_allclose(factors[4:11], [0.68, 0.6, 0.52, 0.44, 0.36, 0.28, 0.2])
    np.testing.assert_allclose(factors[11:], 0.6 * (8 - np.arange(1, 9)) / 8, atol=1e-15)


def test_old_cosines_in_cycles():
    """Each cycle is the single one's curve, up to its n = cycle_lengths."""
    factors = LambdaWarmUpCosineScheduler2(**TWO_CYCLES).factors(19)
    first = [old_cosine(n, 4, 0.2, 1.0, 0.1, 10) for n in range(11)]
    second = [old_cosine(n, 0, 0.0, 0.6, 0.5, 8) for n in range(1, 9)]
    np.testing.assert_allclose(factors, first + second, atol=1e-15)


def test_old_lines_as_the_old_configs_have_them_are_a_warm_up():
    """From 1e-6 to 1 over 10,000 updates, and 1 to the end of 1e13."""
    factors = LambdaLinearScheduler([10000], [1.0], [1.0], [1e-6], [1e13]).factors(10002)
    assert factors[0] == 1e-6
    assert factors[5000] == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_array_equal(factors[10000:], 1.0)


@CYCLES
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f_max": [1.0]}, "warm_up_steps, .* must be lists of one length"),
        ({key: [] for key in TWO_CYCLES}, "warm_up_steps, .* must be lists of one length"),
        ({"warm_up_steps": [-1, 0]}, "warm_up_steps must be at least 0"),
        ({"cycle_lengths": [10, 0]}, "warm_up_steps .* and cycle_lengths above 0"),
        ({"f_min": [-0.1, 0.0]}, "f_min, f_max and f_start must be at least 0"),
        ({"cycle_lengths": [10, 7]}, "the cycles end after 18 updates, and the run has 19"),
    ],
)
def test_cycles_refuse(cycles, changes, message):
    with pytest.raises(ValueError, match=f"^{cycles.__name__}: {message}"):
        cycles(**(TWO_CYCLES | changes)).factors(19)


def test_a_cosine_needs_room_after_its_warm_up():
    with pytest.raises(ValueError, match="each of warm_up_steps must be below its cycle_length"):
        LambdaWarmUpCosineScheduler2(**(TWO_CYCLES | {"warm_up_steps": [4, 8]}))
