"""The numpy parts of a model, small: for tests of hooks that need no network. No MindSpore."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np

from sdxl_host.diffusion.conditioning import TextEncoders
from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.diffusion.model import DiffusionModel, Lazy, SamplingDefaults
from sdxl_host.diffusion.objective import NoiseLevels
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, VPreconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.errors import HostError
from sdxl_host.sampling import samplers

__all__ = ["TinyEncoder", "noise_levels", "sampling_sigmas", "tiny_encoders", "tiny_model"]

_VOCABULARY = 900  # ids of words; the special tokens lie above


class TinyEncoder:
    """A text encoder that is a formula: a word is a token, and no weights stand behind it.

    Its hidden states are causal, as CLIP's are: a position depends on the tokens up to it.
    """

    begin, end = _VOCABULARY, _VOCABULARY + 1

    def __init__(self, pad: int, width: int, pooled_width: int, length: int = 77) -> None:
        self.pad, self.width, self.pooled_width, self.length = pad, width, pooled_width, length

    def tokenize(self, text: str) -> list[int]:
        """One id a word, from its letters and their order."""
        return [
            1 + sum((place + 1) * ord(letter) for place, letter in enumerate(word)) % 898
            for word in text.split()
        ]

    def encode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        """ids (N, length) -> hidden (N, length, width) and pooled (N, pooled_width), float32."""
        place = np.arange(1, self.length + 1)
        past = np.cumsum(ids * place, axis=1) / np.cumsum(place)
        channel = np.arange(1, self.width + 1)
        hidden = np.sin(0.7 * ids[..., None] * channel + 0.01 * past[..., None])
        hidden = hidden.astype(np.float32)
        if not self.pooled_width:
            return hidden, None
        at_end = (ids == self.end).argmax(axis=1)
        return hidden, hidden[np.arange(len(ids)), at_end, : self.pooled_width]


def tiny_encoders() -> TextEncoders:
    """Two encoders as SDXL has: the first pads with its end token and has no pooled output."""
    return TextEncoders(
        [TinyEncoder(TinyEncoder.end, 3, 0), TinyEncoder(pad=0, width=5, pooled_width=4)]
    )


def tiny_model(prediction: Literal["eps", "v"] = "eps") -> DiffusionModel:
    """SDXL's own objective (1000 timesteps drawn evenly) with `tiny_encoders` and no network.

    prediction: what the network predicts, SDXL's "eps" or "v". Reading a part that would be a
    MindSpore cell raises HostError.
    """
    kind = {"eps": EpsPreconditioning, "v": VPreconditioning}[prediction]
    schedule = NoiseSchedule.scaled_linear()
    low, high = schedule.sigmas[[0, -1]]
    return DiffusionModel(
        preconditioning=kind(schedule),
        schedule=schedule,
        sampling=SamplingDefaults("trailing", float(low), float(high)),
        distribution=DiscreteDistribution(schedule),
        offset_noise_level=0.0,
        conditioner_part=_missing("conditioner"),
        network_part=_missing("network"),
        first_stage_part=_missing("first stage"),
        encoders_part=Lazy(tiny_encoders),
    )


def _missing(name: str) -> Lazy[Any]:
    def refuse() -> Any:
        raise HostError(f"tiny_model: has no {name}; where one is needed, use tiny_run")

    return Lazy(refuse)


def noise_levels(count: int = 161) -> NoiseLevels:
    """`count` noise levels from SNR 1e4 down to 1e-4, evenly in the logarithm: fields (count,)."""
    model = tiny_model()
    sigma = np.logspace(-2.0, 2.0, count)  # SNR = 1 / sigma^2
    return NoiseLevels.at(sigma, model.schedule, model.distribution)


def sampling_sigmas(model: DiffusionModel, steps: int) -> np.ndarray:
    """(steps + 1,): the noise levels that `model` is sampled at in `steps` steps, then 0."""
    return samplers.noise_levels(model.sampling, model.schedule, steps)
