"""Another parametrisation than the host's own."""

from __future__ import annotations

import numpy as np

from sdxl_host.diffusion.preconditioning import Preconditioning


class EDM(Preconditioning):
    """Karras et al. 2022, table 1, sigma_data 0.5."""

    name = "edm"

    def c_skip(self, sigma):
        return 0.25 / (sigma**2 + 0.25)

    def c_out(self, sigma):
        return 0.5 * sigma / np.sqrt(sigma**2 + 0.25)

    def c_in(self, sigma):
        return 1 / np.sqrt(sigma**2 + 0.25)

    def c_noise(self, sigma):
        return 0.25 * np.log(sigma)
