"""Law 1: one denoiser has one loss, whatever parametrisation its network has."""

from __future__ import annotations

import numpy as np
import pytest
from mindspore import Tensor, nn, ops
from support.nano_step import CHANNELS, SCHEDULE, make_batch, make_step, tensors
from support.preconditioning import EDM

from sdxl_host.diffusion.objective import coefficients
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning

pytestmark = pytest.mark.usefixtures("device")


class OneDenoiser(nn.Cell):
    """F of a denoiser D that knows nothing of the parametrisation: (D - c_skip x) / c_out.

    D is a kernel on x / sqrt(sigma^2 + 1). The vector holds c_in, c_skip, c_out and sigma.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Conv2d(CHANNELS, CHANNELS, 3, pad_mode="pad", padding=1, has_bias=True)

    def construct(self, x, c_noise, context, vector, mask):
        c_in, c_skip, c_out, sigma = (vector[:, i].reshape(-1, 1, 1, 1) for i in range(4))
        noisy = x / c_in
        denoised = self.kernel(noisy / ops.sqrt(sigma * sigma + 1.0))
        return (denoised - c_skip * noisy) / c_out


def test_law_one_denoiser_one_loss():
    """The same D and lambda through eps, v and EDM coefficients: one loss, one gradient.

    Only float32 rounding tells them apart, and each sample's own error times c_out^2 is |D - z|^2.
    """
    sigma = np.array([0.2, 1.0, 6.0])
    weight = np.array([0.7, 1.3, 0.4])  # lambda, any
    batch = make_batch(4)
    x = batch["latents"] + sigma[:, None, None, None] * batch["noise"]
    network = OneDenoiser()
    generator = np.random.default_rng(8)
    for parameter in network.get_parameters():
        values = generator.standard_normal(parameter.shape) * 0.3
        parameter.set_data(Tensor(values.astype(np.float32)))
    step = make_step(network)
    scaled = x / np.sqrt(sigma**2 + 1)[:, None, None, None]
    denoised = network.kernel(Tensor(scaled.astype(np.float32))).asnumpy()
    errors = ((denoised - batch["latents"]) ** 2).mean(axis=(1, 2, 3))
    slopes = []
    for parametrisation in (EpsPreconditioning(SCHEDULE), VPreconditioning(SCHEDULE), EDM()):
        c_skip, c_out = parametrisation.c_skip(sigma), parametrisation.c_out(sigma)
        vector = np.stack([parametrisation.c_in(sigma), c_skip, c_out, sigma], axis=1)
        batch["coefficients"] = coefficients(parametrisation, sigma, weight).stacked()
        batch["vector"] = vector.astype(np.float32)
        (_, loss, losses), gradients = step.gradient(*tensors(batch))
        np.testing.assert_allclose(losses.asnumpy() * c_out**2, errors, rtol=2e-5)
        np.testing.assert_allclose(loss.asnumpy(), (weight * errors).mean(), rtol=2e-5)
        slopes.append(np.concatenate([g.asnumpy().ravel() for g in gradients]))
    for slope in slopes[1:]:
        assert np.abs(slope - slopes[0]).max() <= 2e-5 * np.abs(slopes[0]).max()
