"""What plugins may rely on, frozen by name; and who may import what."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import sdxl_host
from sdxl_host import hookspecs, testing
from sdxl_host.settings.options import option

ROOT = Path(sdxl_host.__file__).parents[1]
HOST = Path(sdxl_host.__file__).parent

PUBLIC_NAMES = [
    "Captioned",
    "DataError",
    "DiffusionModel",
    "DiscreteDistribution",
    "Listing",
    "NoiseDistribution",
    "NoiseLevels",
    "NoiseSchedule",
    "PluginError",
    "Preconditioning",
    "Problem",
    "PromptEmbedding",
    "SamplingDefaults",
    "StepResult",
    "Text2ImageDataset",
    "TextEncoders",
    "TrainerView",
    "encode_truncated",
    "hookimpl",
    "option",
]

TESTING_NAMES = [
    "SAMPLERS",
    "HostError",
    "PluginContract",
    "TinyHooks",
    "TinyRun",
    "coefficients",
    "denoise",
    "make_options",
    "noise_levels",
    "sample",
    "sampling_sigmas",
    "tiny_encoders",
    "tiny_hooks",
    "tiny_model",
    "tiny_run",
]
CONTRACT_ATTRIBUTES = ["plugin", "options", "steps", "pairings"]

# Arguments may be added at the end, never removed or renamed.
HOOK_ARGUMENTS = {
    "build_model": ["config"],
    "sample_timesteps": ["model", "step"],
    "weight_loss": ["model", "noise", "step"],
    "encode_prompt": ["prompts", "encoders"],
    "on_step_end": ["trainer", "result"],
}

FIELDS = {
    "NoiseLevels": ["sigma", "snr", "timestep", "distribution"],
    "PromptEmbedding": ["context", "pooled", "mask"],
    "SamplingDefaults": ["spacing", "sigma_min", "sigma_max", "sampler"],
    "Captioned": ["name", "file", "text", "span", "repeats"],
    "Problem": ["kind", "name", "detail"],
}

# The methods and parameters plugins call or override.
SIGNATURES = {
    "DiffusionModel.with_preconditioning": ["self", "preconditioning", "sampling"],
    "DiffusionModel.with_network": ["self", "change", "trainable", "export"],
    "NoiseDistribution.quantile": ["self", "u"],
    "NoiseDistribution.cdf": ["self", "sigma"],
    "NoiseDistribution.expect": ["self", "f"],
    "NoiseDistribution.reweighted": ["self", "weights"],
    "NoiseDistribution.density_ratio": ["self", "sigma"],
    "DiscreteDistribution.__init__": ["self", "schedule", "probabilities"],
    "TextEncoders.join": ["self", "hidden", "pooled", "mask"],
    "Preconditioning.c_skip": ["self", "sigma"],
    "Preconditioning.c_out": ["self", "sigma"],
    "Preconditioning.c_in": ["self", "sigma"],
    "Preconditioning.c_noise": ["self", "sigma"],
    "Preconditioning.one_minus_c_skip": ["self", "sigma"],
    "Preconditioning.loss_weight": ["self", "sigma"],
    "NoiseSchedule.sigma": ["self", "timestep"],
    "NoiseSchedule.timestep": ["self", "sigma"],
    "NoiseSchedule.nearest": ["self", "sigma"],
    "encode_truncated": ["prompts", "encoders"],
    "Text2ImageDataset.list_images": ["self", "source"],
}
MODEL_ATTRIBUTES = [
    "preconditioning",
    "schedule",
    "sampling",
    "distribution",
    "network",
    "first_stage",
    "encoders",
]
RESULT_ATTRIBUTES = [
    "step",
    "loss",
    "per_sample_loss",
    "loss_weight",
    "noise",
    "learning_rate",
    "gradient_norm",
    "skipped",
    "sample_ids",
]
TRAINER_ATTRIBUTES = ["step", "total_steps", "save_path", "is_main_process", "model", "log", "stop"]


# ---- names


def test_the_public_names_are_these():
    assert sdxl_host.__all__ == PUBLIC_NAMES


def test_every_public_name_resolves_alone():
    """No name needs another one imported first."""
    loaded_after(
        f"""
import sys
for name in {PUBLIC_NAMES}:
    for module in [module for module in sys.modules if module.startswith("sdxl_host")]:
        del sys.modules[module]
    exec(f"from sdxl_host import {{name}}")
    assert globals()[name] is not None
"""
    )


def test_every_public_name_is_listed_and_kept():
    assert set(PUBLIC_NAMES) <= set(dir(sdxl_host))
    assert all(getattr(sdxl_host, name) is getattr(sdxl_host, name) for name in PUBLIC_NAMES)


def test_any_other_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'sdxl_host' has no attribute 'nothing'"):
        _ = sdxl_host.nothing
    with pytest.raises(AttributeError, match=r"module 'sdxl_host\.testing' has no attribute 'no'"):
        _ = testing.no


def test_the_public_names_for_tests_are_these():
    assert testing.__all__ == TESTING_NAMES
    assert set(TESTING_NAMES) <= set(dir(testing))
    assert all(getattr(testing, name) is getattr(testing, name) for name in TESTING_NAMES)


def test_what_a_contract_states_and_tiny_run_takes():
    assert set(CONTRACT_ATTRIBUTES) <= set(vars(testing.PluginContract))
    assert list(inspect.signature(testing.tiny_run).parameters)[:6] == [
        "plugins",
        "folder",
        "steps",
        "seed",
        "options",
        "resume",
    ]
    names = [field.name for field in dataclasses.fields(testing.TinyRun)]
    assert names == ["losses", "metrics", "checkpoint", "save_path", "lines"]


# ---- what an import costs


def loaded_after(code: str) -> set[str]:
    """Top-level modules in sys.modules after `code` in a process of its own."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nimport sys\nprint(*sys.modules)"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return {module.partition(".")[0] for module in done.stdout.split()}


@pytest.mark.parametrize(
    "code",
    [
        "from sdxl_host import hookimpl, option, PluginError",
        "import sdxl_host.testing.fixtures",
        "import sdxl_host.hookspecs, sdxl_host.settings.options",
    ],
)
def test_declaring_a_plugin_loads_neither_numpy_nor_mindspore(code: str):
    assert not loaded_after(code) & {"numpy", "mindspore", "omegaconf", "transformers"}


@pytest.mark.parametrize(
    "code",
    [
        "from sdxl_host import *",
        "from sdxl_host.testing import *",
    ],
)
def test_the_public_interface_loads_no_mindspore(code: str):
    loaded = loaded_after(code)
    assert "numpy" in loaded
    assert "mindspore" not in loaded


# ---- what crosses the hooks


def test_the_hooks_are_these_with_these_arguments():
    assert list(hookspecs.HOOKS) == list(HOOK_ARGUMENTS)
    for hook, arguments in HOOK_ARGUMENTS.items():
        parameters = inspect.signature(getattr(hookspecs, hook)).parameters
        assert list(parameters) == arguments


def test_no_other_hook_is_specified():
    marked = [
        name for name in dir(hookspecs) if hasattr(getattr(hookspecs, name), "sdxl_host_spec")
    ]
    assert sorted(marked) == sorted(HOOK_ARGUMENTS)


def test_all_hooks_but_the_observed_one_take_one_answer():
    first = {
        hook: getattr(hookspecs, hook).sdxl_host_spec["firstresult"] for hook in HOOK_ARGUMENTS
    }
    assert first == {hook: hook != "on_step_end" for hook in HOOK_ARGUMENTS}


@pytest.mark.parametrize("hook", HOOK_ARGUMENTS)
def test_each_hook_is_documented_with_its_arguments_and_an_example(hook: str):
    text = inspect.getdoc(getattr(hookspecs, hook)) or ""
    assert "@hookimpl" in text
    for argument in HOOK_ARGUMENTS[hook]:
        assert argument in text or argument == "model"


@pytest.mark.parametrize("name", FIELDS)
def test_fields_that_cross_the_hooks(name: str):
    """In this order, because plugins build PromptEmbedding and SamplingDefaults by position too."""
    kind = getattr(sdxl_host, name)
    assert [field.name for field in dataclasses.fields(kind)] == FIELDS[name]
    assert kind.__dataclass_params__.frozen
    for field in FIELDS[name]:
        assert field in (kind.__doc__ or "")


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures_that_plugins_call(name: str):
    found = sdxl_host
    for part in name.split("."):
        found = getattr(found, part)
    assert list(inspect.signature(found).parameters) == SIGNATURES[name]


def test_signature_of_option():
    """`help` and the bounds are keywords, so that more can be added."""
    parameters = inspect.signature(option).parameters
    assert list(parameters) == ["default", "help", "minimum", "maximum", "above"]
    assert all(
        parameter.kind is inspect.Parameter.KEYWORD_ONLY
        for name, parameter in parameters.items()
        if name != "default"
    )


def attributes_of(module: str, name: str) -> set[str]:
    """Names that a class of the host defines, read from its source: annotated fields, methods,
    and what `__init__` sets on self."""
    found: set[str] = set()
    for node in ast.walk(parsed(HOST / module)):
        if isinstance(node, ast.ClassDef) and node.name == name:
            for inner in ast.walk(node):
                if isinstance(inner, ast.FunctionDef):
                    found.add(inner.name)
                elif isinstance(inner, ast.AnnAssign) and isinstance(inner.target, ast.Name):
                    found.add(inner.target.id)
                elif isinstance(inner, ast.Attribute) and isinstance(inner.ctx, ast.Store):
                    found.add(inner.attr)
    return found


@pytest.mark.parametrize(
    ("module", "name", "attributes"),
    [
        ("diffusion/model.py", "DiffusionModel", MODEL_ATTRIBUTES),
        ("plugins/step_result.py", "StepResult", RESULT_ATTRIBUTES),
        ("plugins/step_result.py", "TrainerView", TRAINER_ATTRIBUTES),
    ],
)
def test_attributes_that_plugins_read(module: str, name: str, attributes: list[str]):
    """DESIGN's list of what `model`, `result` and `trainer` have; more may be added."""
    assert set(attributes) <= attributes_of(module, name)


# ---- what is imported: the floors are checked by import-linter, see pyproject.toml


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"), str(path))


def modules(folder: Path) -> list[Path]:
    """The Python files of a folder, tests and caches excepted."""
    skipped = {"tests", "__pycache__", "build", "dist"}
    files = sorted(folder.rglob("*.py"))
    return [path for path in files if not skipped & set(path.relative_to(folder).parts)]


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(tree: ast.AST, *, top: bool = False, run: bool = False) -> Iterator[ast.AST]:
    """All nodes; with `top` not those inside functions, with `run` not those only for types."""
    for child in ast.iter_child_nodes(tree):
        if run and type_checking(child):
            continue
        yield child
        if not (top and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)):
            yield from nodes(child, top=top, run=run)


def imports(tree: ast.AST, **which: bool) -> Iterator[tuple[str, list[str]]]:
    """(module, names) of every import statement; names is empty for `import module`."""
    for node in nodes(tree, **which):
        if isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield module, [alias.name for alias in node.names]


def imports_of(tree: ast.AST, prefix: str, **which: bool) -> list[str]:
    """Modules under `prefix` that are imported, `from a import b` counted as a.b."""
    found = []
    for module, names in imports(tree, **which):
        whole = [module, *(f"{module}.{name}" for name in names)]
        found += [one for one in whole if one == prefix or one.startswith(f"{prefix}.")]
    return found


def private_imports(tree: ast.AST) -> list[str]:
    """What is imported of sdxl_host beyond its public names."""
    found = []
    for module, names in imports(tree):
        if module.startswith("sdxl_host."):
            found.append(module)
        elif module == "sdxl_host":
            found += [name for name in names if name not in PUBLIC_NAMES]
    return found


UNPICKLING = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def unpickles(tree: ast.AST) -> list[str]:
    """Imports of what runs code when it loads, and `allow_pickle=True`."""
    found = [module for module, _ in imports(tree) if module.partition(".")[0] in UNPICKLING]
    return found + [
        "allow_pickle"
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword)
        and node.arg == "allow_pickle"
        and not (isinstance(node.value, ast.Constant) and node.value.value is False)
    ]


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize(
    "module",
    [
        "sdxl_host.config.load",
        "sdxl_host.data.dataset",
        "sdxl_host.planning.curves",
        "sdxl_host.plugins.inspection",
        "sdxl_host.commands.train",
    ],
)
def test_settings_data_plugins_and_curves_need_no_mindspore(module: str):
    assert "mindspore" not in loaded_after(f"import {module}")


@pytest.mark.parametrize(
    "path",
    [path for path in modules(ROOT / "plugins") if path.parent.name != "plugins"],
    ids=relative,
)
def test_plugins_import_the_public_names_and_no_mindspore(path: Path):
    tree = parsed(path)
    assert private_imports(tree) == []
    assert imports_of(tree, "mindspore", top=True, run=True) == []


def test_nothing_is_pickled():
    found = {
        relative(path): unpickles(parsed(path))
        for folder in (HOST, ROOT / "plugins", ROOT / "scripts")
        for path in modules(folder)
    }
    assert not any(found.values()), found
