"""Targets: what a config may name, and which parameters each takes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import sdxl_host
from sdxl_host.config.model_section import DiffusionEngine
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.errors import ConfigError
from sdxl_host.settings.targets import TARGETS, build

RESIZE = {"target": "sdxl_host.Resize", "params": {"size": 64}}
SIGMA = np.array([0.05, 0.5, 1.0, 7.0])
ABSENT = {"target": "sdxl_host.NotBuiltYet"}  # networks are built when first used


def refuse(node: Any, message: str, slot: str = "transform") -> str:
    with pytest.raises(ConfigError, match=message) as refused:
        build(node, slot, "here")
    assert "\n" not in str(refused.value)
    return str(refused.value)


# ---- look-up


@pytest.mark.parametrize("params", [{}, {"params": None}, {"params": {}}])
def test_params_may_be_left_out(params):
    assert build({"target": "sdxl_host.Transpose", **params}, "transform", "here") is not None


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"target": "sdxl_host.Resise"},
            r"^here\.target: .*no such target \(did you mean sdxl_host\.Resize\?\)",
        ),
        ({"target": "Resize"}, r"^here\.target: Resize: there is no such target"),
        ({"target": "sdxl_host.UNetModel"}, r"^here\.target: .*is a network; a transform must"),
        ({"target": None}, r"^here\.target: None: there is no such target"),
        ({"target": 5}, r"^here\.target: 5: "),
        ({"target": ["sdxl_host.Resize"]}, r"^here\.target: "),
        ({}, r"^here: needs a `target`"),
        ({"params": {"size": 1}}, r"^here: needs a `target`"),
        ("sdxl_host.Resize", r"^here: needs a `target`"),
        (None, r"^here: needs a `target`"),
        ([RESIZE], r"^here: needs a `target`"),
        ({**RESIZE, "param": {}}, r"^here\.param: only .* stand here \(did you mean params\?\)"),
        ({**RESIZE, "size": 1}, r"^here\.size: only `target` and `params` stand here"),
        ({**RESIZE, 5: 1}, r"^here\.5: only `target` and `params` stand here"),
        ({**RESIZE, "params": [1]}, r"^here\.params: "),
        ({**RESIZE, "params": "size"}, r"^here\.params: "),
        ({**RESIZE, "params": 5}, r"^here\.params: "),
    ],
)
def test_a_node_that_names_nothing_that_fits_is_refused_with_its_place(node, message):
    refuse(node, message)


def test_the_known_targets_of_the_slot_are_listed():
    said = refuse({"target": "zzz"}, "no such target")
    assert "sdxl_host.Resize" in said
    assert "sdxl_host.Transpose" in said
    assert "UNetModel" not in said


@pytest.mark.parametrize(
    "target",
    [
        "trap.Trap",
        "trap:Trap",
        "trap",
        "os.system",
        "builtins.eval",
        "subprocess.Popen",
        "sdxl_host.cli.main",
        "sdxl_host.cli:main",
        "sdxl_host.config.model_section.DiffusionEngine",
        "sdxl_host.data.transforms.Resize",
        "sdxl_host.data.transforms:Resize",
        "sdxl_host.hookimpl",
        "sdxl_host.Resize.__init__",
        "sdxl_host.config.model_section.importlib.import_module",
        "mindspore.nn.Cell",
        "mindspore.load",
        " sdxl_host.Resize",
        "",
    ],
)
def test_no_other_path_is_a_target_and_nothing_is_imported_for_it(tmp_path, monkeypatch, target):
    """A config can't run code: names are looked up in a table, never walked."""
    mark = tmp_path / "was imported"
    (tmp_path / "trap.py").write_text(
        f"open({str(mark)!r}, 'w').close()\nclass Trap:\n    def __init__(self, **_): pass\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(os, "system", lambda command: mark.touch())
    before = set(sys.modules)
    refuse({"target": target, "params": {"command": "true"}}, r"^here\.target: ")
    assert set(sys.modules) == before
    assert not mark.exists()


# ---- the table

CHILD = """
import importlib, inspect, json, warnings
warnings.simplefilter("ignore")
from sdxl_host.settings.targets import TARGETS
found = {}
for target in TARGETS:
    module, _, name = target.path.partition(":")
    cls = getattr(importlib.import_module(module), name)
    parameters = list(inspect.signature(cls).parameters)
    found[target.name] = [isinstance(cls, type), cls.__module__, parameters]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def resolved() -> dict[str, Any]:
    """[is a class, its module, its parameters] of every target; in a process of its own, because
    some of them import MindSpore."""
    environment = {**os.environ, "PYTHONPATH": str(Path(sdxl_host.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_every_target_is_a_class_of_the_host_under_its_own_name(resolved, target):
    is_class, module, parameters = resolved[target.name]
    assert is_class
    assert module.startswith("sdxl_host.")
    assert target.path.partition(":")[2] in (target.name, f"{target.name}InferenceWrapper")
    assert set(target.provided) <= set(parameters)


def test_names_are_unique():
    names = [target.name for target in TARGETS]
    assert len(set(names)) == len(names)


# ---- params


@pytest.mark.parametrize(
    ("target", "params", "message"),
    [
        ("Resize", {"sise": 1}, r"^here\.params\.sise: Resize has no such parameter.*mean size\?"),
        ("Resize", {}, r"^here\.params\.size: Resize needs it; add it"),
        ("Resize", {"size": "64"}, r"^here\.params\.size: '64' does not fit its type, int"),
        ("Resize", {"size": 64.0}, r"^here\.params\.size: 64\.0 does not fit its type, int"),
        ("Resize", {"size": True}, r"^here\.params\.size: True does not fit its type, int"),
        ("Resize", {"size": None}, r"^here\.params\.size: None does not fit its type, int"),
        ("Resize", {"size": [64]}, r"^here\.params\.size: \[64\] does not fit its type, int"),
        ("Resize", {"size": 0}, r"^here\.params: Resize: size must be at least 1, not 0"),
        ("Resize", {"size": 8, "interpolation": 7}, r"^here\.params: .*interpolation must be"),
        ("Rescaler", {"isfloat": 1}, r"^here\.params\.isfloat: 1 does not fit its type, bool"),
        ("Transpose", {"type": 3}, r"^here\.params\.type: 3 does not fit its type, str"),
        ("Transpose", {"type": "chw2hwc"}, r"^here\.params: Transpose: type must be hwc2chw"),
        (
            "AddOriginalImageSizeAsTupleAndCropToSquare",
            {"size": 1},
            r"^here\.params\.size: .*no such parameter.*parameters: none",
        ),
    ],
)
def test_params_are_checked_against_the_class(target, params, message):
    """Unknown, missing, of a wrong type, and what the class itself refuses."""
    refuse({"target": f"sdxl_host.{target}", "params": params}, message)


def dataset(**params: Any) -> dict[str, Any]:
    return {
        "target": "sdxl_host.Text2ImageDataset",
        "params": {"target_size": 8, "transforms": [RESIZE], **params},
    }


@pytest.mark.parametrize(
    ("params", "key"),
    [
        ({"transforms": RESIZE}, "transforms"),
        ({"transforms": ["Resize"]}, "transforms"),
        ({"only": "anchor.png"}, "only"),
        ({"only": [1]}, "only"),
        ({"data_path": None}, "data_path"),
        ({"data_path": 5}, "data_path"),
    ],
)
def test_lists_and_what_is_in_them_are_checked(params, key):
    refuse(dataset(**params), rf"^here\.params\.{key}: .* does not fit its type", "dataset")


def test_a_wrong_transform_is_named_by_its_place_in_the_list():
    broken = {"target": "sdxl_host.Resize", "params": {"size": -1}}
    refuse(
        dataset(transforms=[RESIZE, broken]),
        r"^data\.dataset_config\.params\.transforms\[1\]\.params: Resize: size",
        "dataset",
    )


def test_an_error_deep_inside_keeps_its_own_place():
    node = {
        "target": "sdxl_host.DiscreteDenoiser",
        "params": {"scaling_config": {"target": "sdxl_host.EpsScalin"}},
    }
    refuse(
        node,
        r"^model\.params\.denoiser_config\.params\.scaling_config\.target: .*EpsScaling\?",
        "denoiser",
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    ("slot", "target", "key"),
    [
        ("loss", "StandardDiffusionLoss", "offset_noise_level"),
        ("optimizer", "AdamW", "weight_decay"),
        ("optimizer", "AdamW", "beta1"),
        ("discretization", "LegacyDDPMDiscretization", "linear_start"),
        ("model", "DiffusionEngine", "scale_factor"),
    ],
)
def test_a_param_that_is_not_finite_is_refused(slot, target, key, value):
    others = {}
    if target == "DiffusionEngine":
        others = dict.fromkeys(
            ("network_config", "conditioner_config", "first_stage_config"), ABSENT
        )
    refuse(
        {"target": f"sdxl_host.{target}", "params": {**others, key: value}}, r"^here\.params", slot
    )


@pytest.mark.parametrize("value", [1, 1.0])
def test_a_whole_number_fits_a_float(value):
    node = {"target": "sdxl_host.StandardDiffusionLoss", "params": {"offset_noise_level": value}}
    assert build(node, "loss", "here").offset_noise_level == 1.0


def test_what_the_host_provides_is_not_the_configs_to_give():
    node = {"target": "sdxl_host.IdentityFirstStage"}
    assert build(node, "first_stage", "here", scale_factor=0.5).scale_factor == 0.5
    with pytest.raises(ConfigError, match=r"^here\.params\.scale_factor: .*no such parameter"):
        build({**node, "params": {"scale_factor": 1.0}}, "first_stage", "here", scale_factor=0.5)


# ---- the model section


def engine(**params: Any) -> Any:
    parts = dict.fromkeys(("network_config", "conditioner_config", "first_stage_config"), ABSENT)
    node = {"target": "sdxl_host.DiffusionEngine", "params": {**parts, **params}}
    return build(node, "model", "model")


def denoiser(scaling: str = "Eps", weighting: str = "Eps", **discretization: Any) -> dict[str, Any]:
    return {
        "target": "sdxl_host.DiscreteDenoiser",
        "params": {
            "scaling_config": {"target": f"sdxl_host.{scaling}Scaling"},
            "weighting_config": {"target": f"sdxl_host.{weighting}Weighting"},
            "discretization_config": ddpm(**discretization),
        },
    }


def ddpm(**params: Any) -> dict[str, Any]:
    return {"target": "sdxl_host.LegacyDDPMDiscretization", "params": params}


def sampler(**discretization: Any) -> dict[str, Any]:
    return {
        "target": "sdxl_host.DiscreteSampling",
        "params": {"discretization_config": ddpm(**discretization)},
    }


def test_the_default_is_eps_over_sdxls_schedule():
    model = engine().model
    assert isinstance(engine(), DiffusionEngine)
    assert model.preconditioning.name == "eps"
    assert np.array_equal(model.schedule.sigmas, NoiseSchedule.scaled_linear().sigmas)
    assert model.offset_noise_level == 0.0
    assert model.sampling.sigma_min == model.schedule.sigmas[0]
    assert model.sampling.sigma_max == model.schedule.sigmas[-1]


C_SKIP = {"Eps": lambda s: np.ones_like(s), "V": lambda s: 1 / (s**2 + 1)}
C_OUT = {"Eps": lambda s: -s, "V": lambda s: -s / np.sqrt(s**2 + 1)}
LAMBDA = {
    "Eps": lambda s: 1 / s**2,
    "V": lambda s: (s**2 + 1) / s**2,
    "Unit": lambda s: np.ones_like(s),
}


@pytest.mark.parametrize("scaling", C_SKIP)
@pytest.mark.parametrize("weighting", LAMBDA)
def test_scaling_and_weighting_make_the_preconditioning(scaling, weighting):
    """The scaling gives c_skip and c_out, the weighting lambda on |D - z|^2, independently."""
    found = engine(denoiser_config=denoiser(scaling, weighting)).model.preconditioning
    np.testing.assert_allclose(found.c_skip(SIGMA), C_SKIP[scaling](SIGMA), rtol=1e-12)
    np.testing.assert_allclose(found.c_out(SIGMA), C_OUT[scaling](SIGMA), rtol=1e-12)
    np.testing.assert_allclose(found.c_in(SIGMA), 1 / np.sqrt(SIGMA**2 + 1), rtol=1e-12)
    np.testing.assert_allclose(found.loss_weight(SIGMA), LAMBDA[weighting](SIGMA), rtol=1e-12)
    assert found.name == scaling.lower()


def test_a_schedule_of_ones_own():
    other = {"linear_start": 0.001, "linear_end": 0.02}
    model = engine(denoiser_config=denoiser(**other), sigma_sampler_config=sampler(**other)).model
    expected = NoiseSchedule.scaled_linear(0.001, 0.02).sigmas
    assert np.array_equal(model.schedule.sigmas, expected)
    assert model.sampling.sigma_max == expected[-1]


@pytest.mark.parametrize("other", [{"linear_end": 0.02}, {"num_timesteps": 500}])
@pytest.mark.parametrize("which", ["denoiser_config", "sigma_sampler_config"])
def test_two_different_schedules_are_refused(other, which):
    node = denoiser(**other) if which == "denoiser_config" else sampler(**other)
    with pytest.raises(ConfigError, match=r"^model\.params: .*two different schedules.*the same"):
        engine(**{which: node})


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"type": "l1"}, r"loss_fn_config\.params: .*type 'l1' is not supported; it must be l2"),
        ({"type": "lpips"}, r"'lpips' is not supported"),
        ({"offset_noise_level": -0.1}, r"offset_noise_level must be at least 0, not -0\.1"),
        (
            {"offset_noise_level": "big"},
            r"^model\.params\.loss_fn_config\.params\.offset_noise_level",
        ),
        ({"offset": 0.1}, r"no such parameter"),
    ],
)
def test_a_loss_that_is_not_served_is_refused_by_name(params, message):
    with pytest.raises(ConfigError, match=message):
        engine(loss_fn_config={"target": "sdxl_host.StandardDiffusionLoss", "params": params})


def test_noise_offset_reaches_the_model():
    loss = {"target": "sdxl_host.StandardDiffusionLoss", "params": {"offset_noise_level": 0.05}}
    assert engine(loss_fn_config=loss).model.offset_noise_level == 0.05


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"scale_factor": 0}, r"^model\.params: scale_factor must be above 0, not 0"),
        (
            {"denoiser_config": denoiser(num_timesteps=1)},
            r"num_timesteps must be at least 2, not 1",
        ),
        ({"denoiser_config": denoiser(linear_start=-1.0)}, r"linear_start"),
        ({"latents_mean": [0.0]}, r"^model\.params\.latents_mean: DiffusionEngine has no such"),
    ],
)
def test_what_the_model_section_refuses(params, message):
    with pytest.raises(ConfigError, match=message):
        engine(**params)


def test_networks_are_built_when_first_used():
    """So that hooks and plugins can be planned without them; an error in them comes then."""
    model = engine().model
    with pytest.raises(ConfigError, match=r"^model\.params\.network_config\.target: "):
        _ = model.network


def test_the_first_stage_gets_the_scale_factor():
    first_stage = {"target": "sdxl_host.IdentityFirstStage"}
    model = engine(first_stage_config=first_stage, scale_factor=0.13025).model
    pixels = np.full((1, 3, 2, 2), 0.5, np.float32)
    np.testing.assert_allclose(model.first_stage.encode(pixels), 0.5 * 0.13025, rtol=1e-6)
    np.testing.assert_allclose(
        model.first_stage.decode(model.first_stage.encode(pixels)), pixels, rtol=1e-6
    )
