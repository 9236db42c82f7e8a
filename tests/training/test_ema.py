"""EMA: its formula, and drawing from it. The compiled update is in test_optimizer_parity.py."""

from __future__ import annotations

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor, nn

from sdxl_host.training.ema import EMA, ema_shares

pytestmark = pytest.mark.usefixtures("device")


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9999, 1.0])
def test_shares(decay: float) -> None:
    """1 - min(decay, (1 + k) / (10 + k)), k updates made before: 0.9 at first."""
    shares = ema_shares(decay, 40)
    assert shares.dtype == np.float64
    expected = [1 - min(decay, (1 + k) / (10 + k)) for k in range(40)]
    np.testing.assert_allclose(shares, expected, rtol=1e-12)


def make() -> tuple[nn.Dense, EMA]:
    """A layer with weights in 16 bits, whose values in float32 are the ones in the EMA."""
    layer = nn.Dense(2, 2, has_bias=False)
    layer.weight.set_data(Tensor(np.full((2, 2), 3.0, np.float32)))
    layer.weight.set_dtype(ms.float16)
    exact = ms.Parameter(Tensor(np.full((2, 2), 1.25, np.float32)), name="exact")
    return layer, EMA([layer.weight], [exact])


def test_it_begins_with_the_weights_in_float32_and_is_named_after_them() -> None:
    layer, ema = make()
    (parameter,) = ema.ema
    assert parameter.name == f"ema.{layer.weight.name}"
    assert parameter.dtype == ms.float32
    assert not parameter.requires_grad
    assert (parameter.asnumpy() == 1.25).all()
    assert ema.values() == {id(layer.weight): parameter}


def test_inside_the_network_computes_with_it_and_afterwards_with_its_weights() -> None:
    """Also where a compiled graph was there before, and where drawing fails."""
    layer, ema = make()
    x = Tensor(np.ones((1, 2), np.float16))
    compiled = ms.jit(layer.construct)
    assert (compiled(x).asnumpy() == 6.0).all()
    with pytest.raises(OSError), ema.swapped_in():  # noqa: PT011, PT012
        assert (compiled(x).asnumpy() == 2.5).all()
        raise OSError
    assert (compiled(x).asnumpy() == 6.0).all()
    assert layer.weight.dtype == ms.float16
