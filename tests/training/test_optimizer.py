"""The table of numbers that makes the kernel an optimizer, against closed forms."""

from __future__ import annotations

import numpy as np
import pytest

from sdxl_host.training.optimizer import AdamW, AdamWeightDecay

UPDATES = 40
RATES = np.geomspace(1e-3, 1e-5, UPDATES)
K = np.arange(1, UPDATES + 1)
BOTH = pytest.mark.parametrize("optimizer", [AdamW, AdamWeightDecay])


def kernel_betas(*betas: float) -> list[float]:
    """Betas as the step gives them to the kernel: in float32."""
    return np.float32(betas).astype(float).tolist()


def kernel(table: np.ndarray, gradients: np.ndarray, beta1: float, beta2: float) -> list[float]:
    """The parameter after each update of the fused kernel, from 1.0, in float64."""
    parameter, m, v, path = 1.0, 0.0, 0.0, []
    beta1, beta2 = kernel_betas(beta1, beta2)
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
    """rate_k sqrt(1 - b2^k) / (1 - b1^k), eps sqrt(1 - b2^k); rate times decay is rate_k decay.

    The betas are those of the kernel, in float32.
    """
    table = AdamW(beta1=0.8, beta2=0.95, eps=1e-6, weight_decay=0.1).table(RATES)
    beta1, beta2 = kernel_betas(0.8, 0.95)
    second = np.sqrt(1 - beta2**K)
    assert table.shape == (UPDATES, 4)
    assert table.dtype == np.float32
    np.testing.assert_allclose(table[:, 0], RATES, rtol=1e-7)
    np.testing.assert_allclose(table[:, 1], RATES * second / (1 - beta1**K), rtol=1e-7)
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
        ({"beta1": 1.0}, r"beta1 must lie in \[0, 1\) in float32, not 1.0"),
        ({"beta1": -0.1}, r"beta1 must lie in \[0, 1\) in float32, not -0.1"),
        ({"beta2": 1.5}, r"beta2 must lie in \[0, 1\) in float32, not 1.5"),
        ({"beta2": 0.99999999}, r"beta2 must lie in \[0, 1\) in float32, not 0.99999999"),
        ({"eps": 0.0}, "eps must be above 0"),
        ({"eps": -1e-8}, "eps must be above 0"),
        ({"eps": float("nan")}, "eps must be at least"),
        ({"eps": 1e-42}, "eps must be at least 1.18e-38 in float32 at every update, and 1e-42 is"),
        ({"weight_decay": -0.01}, "weight_decay at least 0"),
    ],
)
def test_refused(optimizer, settings, message):
    with pytest.raises(ValueError, match=message):
        optimizer(**settings)


def test_eps_may_not_be_subnormal_where_the_correction_makes_it_least():
    """AdamW's of the first update is eps * sqrt(1 - b2); the least that is taken is in the table
    as a normal number."""
    with pytest.raises(ValueError, match=r"every update, and 2e-38 is 6\.32e-39 at the first"):
        AdamW(beta2=0.9, eps=2e-38)
    for optimizer in (AdamW(beta2=0.9, eps=4e-38), AdamWeightDecay(beta2=0.9, eps=1.2e-38)):
        assert (optimizer.table(RATES)[:, 2] >= np.finfo(np.float32).tiny).all()


def test_notes():
    """AdamWeightDecay says that it corrects no bias; AdamW has nothing to say."""
    assert AdamW().notes() == []
    (note,) = AdamWeightDecay().notes()
    assert "corrects no bias" in note
