"""What a run trains: the model as the hooks see it.

The numpy parts (preconditioning, schedule, sampling) are there at once; the network, the first
stage and the text encoders are built when first used, so hooks can be called without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

from sdxl_host.diffusion.conditioning import TextEncoders
from sdxl_host.diffusion.distributions import NoiseDistribution
from sdxl_host.diffusion.preconditioning import Preconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule

__all__ = ["DiffusionModel", "Lazy", "NetworkChange", "SamplingDefaults"]

T = TypeVar("T")


class Lazy(Generic[T]):
    """A part that is built when first asked for, and once, however often the model is copied."""

    def __init__(self, build: Callable[[], T]) -> None:
        self._build = build
        self._parts: list[T] = []

    def get(self) -> T:
        """The part, built now if it was not yet."""
        if not self._parts:
            self._parts.append(self._build())
        return self._parts[0]


@dataclass(frozen=True)
class SamplingDefaults:
    """How images are drawn from this model unless the user says otherwise.

    spacing: "trailing", evenly spaced timesteps from the noisiest down, as SDXL; "karras",
        Karras et al. 2022 eq. 5 between sigma_max and sigma_min with rho 7; or "edm", the same
        between their own 80 and 0.002, which the model's range must hold.
    sigma_min, sigma_max: the range of noise levels the model was trained on.
    sampler: "euler", "euler_a" (ancestral), "heun" or "dpmpp_2m".
    """

    spacing: str
    sigma_min: float
    sigma_max: float
    sampler: str = "euler"


@dataclass(frozen=True)
class NetworkChange:
    """One `with_network` of a plugin; see there."""

    change: Callable[[Any], None]
    trainable: Callable[[str], bool] | None
    export: Callable[[Mapping[str, np.ndarray], Path], None] | None


@dataclass(frozen=True)
class DiffusionModel:
    """A model and its objective. Adapters return a changed copy; a copy shares the networks.

    preconditioning: how the network's output becomes a denoised latent. schedule: the 1000
    timesteps. sampling: the defaults of sampling. offset_noise_level: share of per-channel noise.
    distribution: what the config's sigma sampler draws from. changes: see `with_network`.
    """

    preconditioning: Preconditioning
    schedule: NoiseSchedule
    sampling: SamplingDefaults
    distribution: NoiseDistribution
    offset_noise_level: float
    conditioner_part: Lazy[Any]
    network_part: Lazy[Any]
    first_stage_part: Lazy[Any]
    encoders_part: Lazy[TextEncoders]
    changes: tuple[NetworkChange, ...] = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> DiffusionModel:
        """The model itself: it is frozen, and a copy of a plugin that keeps it shares the
        networks."""
        return self

    @property
    def network(self) -> Any:
        """The U-Net, a MindSpore cell."""
        return self.network_part.get()

    @property
    def first_stage(self) -> Any:
        """Pixels to latents and back."""
        return self.first_stage_part.get()

    @property
    def conditioner(self) -> Any:
        """What an image's sizes and its prompt's pooled embedding become: the vector."""
        return self.conditioner_part.get()

    @property
    def encoders(self) -> TextEncoders:
        """The frozen text encoders."""
        return self.encoders_part.get()

    def with_preconditioning(
        self, preconditioning: Preconditioning, sampling: SamplingDefaults | None = None
    ) -> DiffusionModel:
        """A copy with another preconditioning, and the sampling defaults that belong to it.

        One plugin in a run may do this; the host refuses a second one, naming both.
        """
        return replace(self, preconditioning=preconditioning, sampling=sampling or self.sampling)

    def with_network(
        self,
        change: Callable[[Any], None],
        trainable: Callable[[str], bool] | None = None,
        export: Callable[[Mapping[str, np.ndarray], Path], None] | None = None,
    ) -> DiffusionModel:
        """A copy whose network is changed in place by `change(network)`.

        change: runs once, after the base weights are loaded and before a checkpoint is restored;
            it keeps the names of existing parameters. New ones are named by where they stand.
        trainable: given a parameter's name, whether it is trained (default: all are).
        export: `export(parameters, folder)` writes extra files into every checkpoint, from the
            network's parameters by name.

        Names are those of the original single file, `model.diffusion_model.input_blocks. ...`.
        """
        return replace(self, changes=(*self.changes, NetworkChange(change, trainable, export)))
