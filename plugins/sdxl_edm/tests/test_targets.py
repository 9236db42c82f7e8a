"""The names of old configs: which options a combination of them means, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from sdxl_host import PluginError
from sdxl_host.testing import make_options

from sdxl_edm import EDM, Options
from sdxl_edm.targets import options as options_of

Part = tuple[str, dict[str, Any]]
EPS, V = ("EpsScaling", {}), ("VScaling", {})
SCALING: Part = ("EDMScaling", {"sigma_data": 0.7})
WEIGHTING: Part = ("EDMWeighting", {"sigma_data": 0.7})
SAMPLING: Part = ("EDMSampling", {"p_mean": -1.0, "p_std": 1.3})


def parts(
    scaling: Part | None = None, weighting: Part | None = None, sampler: Part | None = None
) -> dict[str, Part]:
    given = {"scaling": scaling, "weighting": weighting, "sigma_sampler": sampler}
    return {slot: part for slot, part in given.items() if part is not None}


NOISE = {"p_mean": -1.0, "p_std": 1.3}
MEANT = [
    (parts(SCALING, WEIGHTING, SAMPLING), ("edm", "own", {"sigma_data": 0.7, **NOISE})),
    (parts(EPS, ("EpsWeighting", {}), SAMPLING), ("native", "own", NOISE)),
    (parts(V, ("VWeighting", {}), SAMPLING), ("native", "own", NOISE)),
    (parts(EPS, WEIGHTING, SAMPLING), ("native", "edm", {"sigma_data": 0.7, **NOISE})),
    (parts(V, WEIGHTING, SAMPLING), ("native", "edm", {"sigma_data": 0.7, **NOISE})),
    # What the config leaves out is the host's own.
    (parts(None, None, SAMPLING), ("native", "own", NOISE)),
    (parts(None, WEIGHTING, SAMPLING), ("native", "edm", {"sigma_data": 0.7, **NOISE})),
    # Params that are not stated are the paper's, and so are the plugin's.
    (parts(("EDMScaling", {}), ("EDMWeighting", {}), ("EDMSampling", {})), ("edm", "own", {})),
    (
        parts(("EDMScaling", {"sigma_data": 0.5}), ("EDMWeighting", {}), ("EDMSampling", {})),
        ("edm", "own", {"sigma_data": 0.5}),
    ),
]


@pytest.mark.parametrize(("given", "meant"), MEANT)
def test_the_combinations_that_exist(
    given: dict[str, Part], meant: tuple[str, str, dict[str, float]]
) -> None:
    parametrization, weighting, constants = meant
    denoiser: Part = ("Denoiser", {"weighting": "the host's business"})
    for whole in (given, {"denoiser": denoiser, **given}):
        values = options_of(whole)
        assert values == {"parametrization": parametrization, "weighting": weighting, **constants}
    built = make_options(EDM, values)
    assert built.constants() == Options().constants() | constants


@pytest.mark.parametrize(
    "given",
    [
        parts(SCALING, ("EpsWeighting", {}), SAMPLING),
        parts(SCALING, ("UnitWeighting", {}), SAMPLING),
        parts(SCALING, WEIGHTING, ("DiscreteSampling", {})),
        parts(SCALING, WEIGHTING),
        parts(SCALING),
        parts(None, WEIGHTING),
        parts(V, ("EpsWeighting", {}), SAMPLING),
        parts(EPS, ("VWeighting", {}), SAMPLING),
        parts(EPS, ("UnitWeighting", {}), SAMPLING),
        parts(V, None, SAMPLING),
    ],
)
def test_other_combinations_are_refused_with_those_that_exist(given: dict[str, Part]) -> None:
    with pytest.raises(PluginError) as refused:
        options_of(given)
    told = str(refused.value)
    assert told.startswith(" + ".join([given.get("scaling", EPS)[0], ""]))
    for combination, _ in MEANT[:5]:
        assert " + ".join(name for name, _ in combination.values()) in told


def test_two_sigma_data_are_refused() -> None:
    other = ("EDMWeighting", {"sigma_data": 1.0})
    with pytest.raises(PluginError, match=r"sigma_data: 0\.7 in EDMScaling, 1\.0 in EDMWeighting"):
        options_of(parts(SCALING, other, SAMPLING))
    # One that is not stated is the paper's 0.5.
    with pytest.raises(PluginError, match=r"sigma_data: 0\.7 in EDMScaling, 0\.5 in EDMWeighting"):
        options_of(parts(SCALING, ("EDMWeighting", {}), SAMPLING))
    with pytest.raises(PluginError, match=r"sigma_data: 0\.5 in EDMScaling, 0\.7 in EDMWeighting"):
        options_of(parts(("EDMScaling", {}), WEIGHTING, SAMPLING))


def test_the_discrete_variant_is_refused_by_name() -> None:
    given = parts(SCALING, ("UnitWeighting", {}), ("DiscreteSampling", {}))
    given["discretization"] = ("EDMDiscretization", {})
    with pytest.raises(PluginError, match=r"^EDMDiscretization: .*use LegacyDDPMDiscretization"):
        options_of(given)
    given["discretization"] = ("LegacyDDPMDiscretization", {"num_timesteps": 1000})
    assert options_of({**given, **parts(SCALING, WEIGHTING, SAMPLING)})["sigma_data"] == 0.7


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            parts(("EDMScaling", {"sd": 1.0}), WEIGHTING, SAMPLING),
            r"EDMScaling\.sd: .* sigma_data$",
        ),
        (
            parts(SCALING, ("EDMWeighting", {"sigma_data": 0.7, "p_mean": 1.0}), SAMPLING),
            r"EDMWeighting\.p_mean: .* sigma_data$",
        ),
        (
            parts(SCALING, WEIGHTING, ("EDMSampling", {"num_idx": 1000})),
            r"EDMSampling\.num_idx: .* p_mean, p_std$",
        ),
    ],
)
def test_params_that_the_classes_do_not_have_are_refused(given: dict[str, Part], told: str) -> None:
    with pytest.raises(PluginError, match=told):
        options_of(given)


def test_the_names_are_declared() -> None:
    """Old and new, and each for the one function."""
    manifest = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    group = manifest.split('[project.entry-points."sdxl_host.targets"]')[1].split("[")[0]
    old = "gm.modules.diffusionmodules."
    expected = {f"sdxl_host.{name}": 0 for name in ("EDMScaling", "EDMWeighting", "EDMSampling")}
    expected |= {
        f"{old}{name}": 0
        for name in (
            "denoiser_scaling.EDMScaling",
            "denoiser_weighting.EDMWeighting",
            "sigma_sampling.EDMSampling",
            "discretizer.EDMDiscretization",
        )
    }
    expected["sdxl_host.EDMDiscretization"] = 0
    lines = [line for line in group.splitlines() if line.strip()]
    assert {line.split('"')[1] for line in lines} == set(expected)
    assert {line.split('"')[3] for line in lines} == {"sdxl_edm.targets:options"}
