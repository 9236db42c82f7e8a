"""The names that EDM has in MindONE's configs, and the options they come to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sdxl_host import PluginError

__all__ = ["options"]

# What a slot holds that the config leaves out; the order is that of the combinations.
_HOST = {"scaling": "EpsScaling", "weighting": "EpsWeighting", "sigma_sampler": "DiscreteSampling"}
_COMBINATIONS = {  # parametrization and weighting
    ("EDMScaling", "EDMWeighting", "EDMSampling"): ("edm", "own"),
    ("EpsScaling", "EpsWeighting", "EDMSampling"): ("native", "own"),
    ("VScaling", "VWeighting", "EDMSampling"): ("native", "own"),
    ("EpsScaling", "EDMWeighting", "EDMSampling"): ("native", "edm"),
    ("VScaling", "EDMWeighting", "EDMSampling"): ("native", "edm"),
}
_PARAMS = {
    "EDMScaling": ["sigma_data"],
    "EDMWeighting": ["sigma_data"],
    "EDMSampling": ["p_mean", "p_std"],
}


def options(parts: Mapping[str, tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """The options of a config with these `parts`, (class name, params) by slot.

    Raises PluginError for parts that no options combine, and for two different sigma_data.
    """
    chosen = tuple(parts[slot][0] if slot in parts else host for slot, host in _HOST.items())
    combinations = "; ".join(" + ".join(names) for names in _COMBINATIONS)
    if "EDMDiscretization" in [name for name, _ in parts.values()]:
        raise PluginError(
            "EDMDiscretization: its 1000 fixed noise levels are not offered; use "
            f"LegacyDDPMDiscretization there, with one of: {combinations}"
        )
    if chosen not in _COMBINATIONS:
        raise PluginError(f"{' + '.join(chosen)}: nothing means this; use one of: {combinations}")
    parametrization, weighting = _COMBINATIONS[chosen]
    stated = {"parametrization": parametrization, "weighting": weighting}
    sigma_data: dict[str, float] = {}
    for name, params in parts.values():
        if name not in _PARAMS:
            continue
        for key in params:
            if key not in _PARAMS[name]:
                known = ", ".join(_PARAMS[name])
                raise PluginError(f"{name}.{key}: there is no such parameter; use {known}")
        if "sigma_data" in _PARAMS[name]:
            sigma_data[name] = params.get("sigma_data", 0.5)  # what MindONE's classes default to
        stated |= params
    if len(set(sigma_data.values())) > 1:
        told = ", ".join(f"{value} in {name}" for name, value in sigma_data.items())
        raise PluginError(f"sigma_data: {told}; give both one value")
    return stated
