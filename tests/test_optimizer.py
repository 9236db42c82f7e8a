"""The table of numbers that makes the kernel an optimizer, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_host.training.optimizer import (
    AdamW,
    AdamWeightDecay,
    LambdaLinearScheduler,
    LambdaWarmUpScheduler,
    learning_rates,
)

UPDATES = 40
RATES = np.geomspace(1e-3, 1e-5, UPDATES)
K = np.arange(1, UPDATES + 1)
BOTH = pytest.mark.parametrize("optimizer", [AdamW, AdamWeightDecay])


def kernel(table: np.ndarray, gradients: np.ndarray, beta1: float, beta2: float) -> list[float]:
    """The parameter after each update of the fused kernel, from 1.0, in float64."""
    parameter, m, v, path = 1.0, 0.0, 0.0, []
    for (_, rate, epsilon, decay), g in zip(table.astype(float), gradients, strict=True):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        parameter -= rate * (m / (np.sqrt(v) + epsilon) + decay * parameter)
        path.append(parameter)
    return path


def adamw(gradients: np.ndarray, beta1: float, beta2: float, eps: float, decay: float) -> list:
    """Loshchilov and Hutter 2019, algorithm 2, line by line."""
    parameter, m, v, path = 1.0, 0.0, 0.0, []
    for k, (rate, g) in enumerate(zip(RATES, gradients, strict=True), start=1):
        m, v = beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        m_hat, v_hat = m / (1 - beta1**k), v / (1 - beta2**k)
        parameter = parameter - rate * m_hat / (np.sqrt(v_hat) + eps) - rate * decay * parameter
        path.append(parameter)
    return path


def test_adamw_table():
    """rate_k sqrt(1 - b2^k) / (1 - b1^k), eps sqrt(1 - b2^k); rate times decay is rate_k decay."""
    table = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1).table(RATES)
    second = np.sqrt(1 - 0.95**K)
    assert table.shape == (UPDATES, 4)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[:, 0], RATES, rtol=1e-7)
    np.testing.assert_allclose(table[:, 1], RATES * second / (1 - 0.8**K), rtol=1e-7)
    np.testing.assert_allclose(table[:, 2], 1e-6 * second, rtol=1e-7)
    np.testing.assert_allclose(table[:, 1].astype(float) * table[:, 3], RATES * 0.1, rtol=2e-7)


@pytest.mark.parametrize("eps", [1e-8, 1e-2])
@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_the_kernel_with_adamw_s_table_is_adamw(eps, decay):
    """An epsilon that counts shows that it is corrected with the moments."""
    gradients = np.random.default_rng(0).standard_normal(UPDATES) * 0.01
    optimizer = AdamW(beta1=0.9, beta2=0.99, eps=eps, weight_decay=decay)
    path = kernel(optimizer.table(RATES), gradients, 0.9, 0.99)
    np.testing.assert_allclose(path, adamw(gradients, 0.9, 0.99, eps, decay), rtol=1e-6)


def test_the_first_adamw_update_has_the_size_of_the_rate():
    """m_hat / sqrt(v_hat) is the sign of the first gradient, whatever its size."""
    for gradient in (1e-3, -50.0):
        table = AdamW(weight_decay=0.0).table(np.array([0.01]))
        (after,) = kernel(table, np.array([gradient]), 0.9, 0.999)
        assert 1.0 - after == pytest.approx(0.01 * np.sign(gradient), rel=1e-4)


def test_adamw_tends_to_the_uncorrected_kernel():
    """Corrections fade: after 20,000 updates they are below float32's rounding."""
    table = AdamW(weight_decay=0.25).table(np.full(20_000, 1e-4))
    np.testing.assert_allclose(table[-1], [1e-4, 1e-4, 1e-8, 0.25], rtol=1e-6)


def test_adam_weight_decay_table_corrects_nothing():
    """The kernel as it is: (rate, rate, eps, decay) at every update."""
    table = AdamWeightDecay(eps=1e-5, weight_decay=0.1).table(RATES)
    expected = np.stack([RATES, RATES, np.full(UPDATES, 1e-5), np.full(UPDATES, 0.1)], axis=1)
    np.testing.assert_allclose(table, expected, rtol=1e-7)


def test_table_is_finite_for_every_update_of_a_long_run():
    """1 - beta^k is computed in float64 and never 0."""
    table = AdamW(beta1=0.0, beta2=0.9999).table(np.full(100_000, 1e-4))
    assert np.isfinite(table).all()
    assert (table[:, 1:] > 0).all()


def test_defaults_are_those_of_the_originals():
    """AdamW: 0.9, 0.999, 1e-8, 0.01. MindSpore's AdamWeightDecay: 0.9, 0.999, 1e-6, 0."""
    for optimizer, numbers in (
        (AdamW(), (0.9, 0.999, 1e-8, 0.01)),
        (AdamWeightDecay(), (0.9, 0.999, 1e-6, 0.0)),
    ):
        kept = (optimizer.beta1, optimizer.beta2, optimizer.eps, optimizer.weight_decay)
        assert kept == numbers


@BOTH
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\), not 1.0"),
        ({"beta1": -0.1}, r"beta1 must lie in \[0, 1\), not -0.1"),
        ({"beta2": 1.5}, r"beta2 must lie in \[0, 1\), not 1.5"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": -1e-8}, "eps must be above 0"),
        ({"weight_decay": -0.01}, "weight_decay at least 0"),
    ],
)
def test_refused(optimizer, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer(**settings)


def test_notes():
    """AdamWeightDecay says that it corrects no bias; AdamW has nothing to say."""
    assert AdamW().notes() == []
    (note,) = AdamWeightDecay().notes()
    assert "corrects no bias" in note


# ---- learning rates


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


def test_a_negative_warm_up_is_refused():
    with pytest.raises(ValueError, match="warm_up_steps must be at least 0, not -1"):
        LambdaWarmUpScheduler(-1)


def linear(updates: int, **changes: object) -> np.ndarray:
    """Two cycles of 10 and 8 updates, warming up over 4 and 0 of them."""
    arguments = {
        "warm_up_steps": [4, 0], "cycle_lengths": [10, 8],
        "f_start": [0.1, 0.5], "f_max": [1.0, 0.6], "f_min": [0.2, 0.0],
    }  # fmt: skip
    return LambdaLinearScheduler(**(arguments | changes)).factors(updates)


def test_linear_rises_to_f_max_and_falls_to_f_min_in_each_cycle():
    """By hand: 0.1 + 0.9 n / 4, then 0.2 + 0.8 (10 - n) / 10; the second has no warm-up."""
    factors = linear(18)
    np.testing.assert_allclose(factors[:4], [0.1, 0.325, 0.55, 0.775])
    np.testing.assert_allclose(factors[4:10], [0.68, 0.6, 0.52, 0.44, 0.36, 0.28])
    np.testing.assert_allclose(factors[10:], 0.6 * (8 - np.arange(8)) / 8)


def test_a_run_longer_than_its_cycles_is_refused_at_its_place(tmp_path, device):
    from sdxl_host.config import load
    from sdxl_host.errors import ConfigError
    from sdxl_host.training.trainer import Trainer

    params = "{warm_up_steps: [1], cycle_lengths: [2], f_start: [0], f_max: [1], f_min: [0]}"
    words = ["--config", "tiny.yaml", "--save_path", str(tmp_path)]
    words += ["optim.scheduler_config.target=sdxl_host.LambdaLinearScheduler"]
    with pytest.raises(ConfigError, match=r"^optim\.scheduler_config\.params: .*after 2 updates"):
        Trainer(load([*words, f"optim.scheduler_config.params={params}"]))


def test_linear_as_the_old_configs_have_it_is_a_warm_up():
    """From 1e-6 to 1 over 10,000 updates, and 1 to the end of 1e13."""
    factors = linear(
        10002, warm_up_steps=[10000], cycle_lengths=[1e13], f_start=[1e-6], f_max=[1.0], f_min=[1.0]
    )
    assert factors[0] == 1e-6
    assert factors[5000] == pytest.approx(0.5, abs=1e-6)
    np.testing.assert_array_equal(factors[10000:], 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"f_max": [1.0]}, "lists of one length"),
        ({"warm_up_steps": [-1, 0]}, "warm_up_steps must be at least 0"),
        ({"cycle_lengths": [10, 0]}, "cycle_lengths above 0"),
        ({"f_min": [-0.1, 0.0]}, "f_min, f_max and f_start must be at least 0"),
        ({"cycle_lengths": [10, 7]}, "the cycles end after 17 updates, and the run has 18"),
    ],
)
def test_linear_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        linear(18, **changes)
