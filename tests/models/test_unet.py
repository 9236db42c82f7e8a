"""The U-Net against the original's arithmetic, names and refusals."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import mindspore as ms
import numpy as np
import pytest
from mindspore import Parameter, Tensor, ops

from sdxl_host.models.initialization import initialize_network
from sdxl_host.models.unet import UNetModel
from sdxl_host.weights.architecture import NETWORK_PREFIX
from sdxl_host.weights.names import single_file_parameters

PARITY = 2e-5  # of the output's peak; the contract is 1e-4
GRADIENT_PARITY = 1e-4

# A tiny valid network; each refusal below changes one thing of it.
VALID: dict[str, Any] = {
    "in_channels": 4,
    "out_channels": 3,
    "model_channels": 32,
    "channel_mult": [1, 2],
    "num_res_blocks": 1,
    "attention_resolutions": [2],
    "transformer_depth": [0, 1],
    "num_head_channels": 32,
    "context_dim": 24,
    "adm_in_channels": 20,
}


@dataclass
class Case:
    """A network with the golden weights, and the file's inputs and outputs."""

    unet: UNetModel
    parameters: dict[str, Parameter]
    arrays: dict[str, np.ndarray]
    inputs: tuple[Tensor, ...]

    @cached_property
    def plain(self) -> np.ndarray:
        """The output for the file's own inputs."""
        return self.output()

    def output(self, **changes: np.ndarray) -> np.ndarray:
        names = ("x", "c_noise", "context", "vector", "mask")
        given = dict(zip(names, self.inputs, strict=True))
        given |= {name: Tensor(values.astype(np.float32)) for name, values in changes.items()}
        return self.unet(*given.values()).asnumpy()


@pytest.fixture(scope="module")
def case(golden: Path, fill: Callable) -> Callable[[str], Case]:
    """`case("unet_a")`: the network of that golden file, built once."""
    built: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in built:
            with np.load(golden / f"{name}.npz") as file:
                arrays = dict(file)
            unet = UNetModel(**json.loads(str(arrays["config"]))).set_train(False)
            mask = arrays.get("mask", np.ones(arrays["context"].shape[:2]))
            inputs = (
                arrays["x"],
                arrays["timesteps"],
                arrays["context"],
                arrays["vector"],
                mask,
            )
            tensors = tuple(Tensor(values.astype(np.float32)) for values in inputs)
            built[name] = Case(unet, fill(unet, NETWORK_PREFIX), arrays, tensors)
        return built[name]

    return get


@dataclass(frozen=True)
class Gradients:
    """Of mean(F^2): by parameter name, by x and by context."""

    parameters: dict[str, np.ndarray]
    x: np.ndarray
    context: np.ndarray


@pytest.fixture(scope="module")
def gradients(case: Callable[[str], Case]) -> Callable[[str], Gradients]:
    """`gradients("unet_a")`: those of that network, computed once."""
    computed: dict[str, Gradients] = {}

    def get(name: str) -> Gradients:
        if name not in computed:
            made = case(name)
            x, c_noise, context, vector, mask = made.inputs

            def loss(x, context):
                return ops.square(made.unet(x, c_noise, context, vector, mask)).mean()

            wanted = ms.ParameterTuple(made.parameters.values())
            by_input, by_parameter = ms.grad(loss, (0, 1), wanted)(x, context)
            named = {n: g.asnumpy() for n, g in zip(made.parameters, by_parameter, strict=True)}
            computed[name] = Gradients(named, by_input[0].asnumpy(), by_input[1].asnumpy())
        return computed[name]

    return get


def close(actual: np.ndarray, expected: np.ndarray, relative: float) -> None:
    """The worst difference as a share of the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= relative * np.abs(expected).max()


# ---- the original's arithmetic


@pytest.mark.parametrize("name", ["unet_a", "unet_b", "unet_c", "unet_d"])
def test_golden_output(case, name):
    """The output is the original's; b has two widths, sides of 8 and 12, and a mask, c is built
    like the refiner, d attends on its first level and has sides of 8 and 24."""
    made = case(name)
    close(made.plain, made.arrays["out"], PARITY)


@pytest.mark.parametrize("name", ["unet_a", "unet_b", "unet_c", "unet_d"])
def test_golden_gradients_of_the_inputs(case, gradients, name):
    arrays = case(name).arrays
    close(gradients(name).x, arrays["x_grad"], GRADIENT_PARITY)
    close(gradients(name).context, arrays["context_grad"], GRADIENT_PARITY)


@pytest.mark.parametrize(("name", "vanish"), [("unet_a", 17), ("unet_c", 17), ("unet_d", 0)])
def test_golden_gradients_of_every_parameter(case, deterministic, gradients, name, vanish):
    """Sum, norm and dot product with a random probe of each gradient are the original's.

    The scale is the gradient's own norm: of a sum over n entries sqrt(n) times it, as both sides'
    roundings add up. Gradients that vanish in exact arithmetic stay below 1e-6; how many do is in
    tests/golden/README.md.
    """
    arrays = case(name).arrays
    named = gradients(name).parameters
    vanishing = 0
    for key, (total, norm, dot) in zip(arrays["grad_names"], arrays["grad_values"], strict=True):
        gradient = named[str(key)].astype(np.float64)
        if norm < 1e-6:
            vanishing += 1
            assert np.linalg.norm(gradient) < 1e-6, key
            continue
        probe = deterministic.array(f"probe:{key}", gradient.shape)
        allowed = GRADIENT_PARITY * norm
        assert np.linalg.norm(gradient) == pytest.approx(norm, abs=allowed), key
        assert gradient.sum() == pytest.approx(total, abs=allowed * gradient.size**0.5), key
        assert (gradient * probe).sum() == pytest.approx(dot, abs=4 * allowed), key
    assert vanishing == vanish


@pytest.mark.parametrize("name", ["unet_a", "unet_c", "unet_d"])
def test_golden_names(case, name):
    """Parameters carry the single file's names, each of them and no other."""
    made = case(name)
    assert sorted(made.parameters) == made.arrays["grad_names"].tolist()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("input_blocks.0.0.weight", (32, 4, 3, 3)),
        ("time_embed.2.bias", (128,)),
        ("label_emb.0.0.weight", (128, 128)),
        ("input_blocks.3.0.op.weight", (32, 32, 3, 3)),
        ("input_blocks.4.0.skip_connection.weight", (64, 32, 1, 1)),
        ("input_blocks.4.1.proj_in.weight", (64, 64)),
        ("input_blocks.7.1.transformer_blocks.2.attn2.to_k.weight", (128, 48)),
        ("middle_block.1.transformer_blocks.0.ff.net.0.proj.weight", (1024, 128)),
        ("output_blocks.0.0.in_layers.0.weight", (256,)),
        ("output_blocks.2.2.conv.bias", (128,)),
        ("output_blocks.8.0.skip_connection.weight", (32, 64, 1, 1)),
        ("out.2.weight", (4, 32, 3, 3)),
    ],
)
def test_shapes(case, name, shape):
    """Shapes are the single file's; a linear projection is (C, C) and has no kernel axes."""
    assert tuple(case("unet_a").parameters[NETWORK_PREFIX + name].shape) == shape


# ---- what each input does


def test_masked_context_has_no_influence(case):
    """What the mask leaves out can be anything: not one bit of the output changes."""
    made = case("unet_b")
    context = made.arrays["context"].copy()
    context[~made.arrays["mask"]] = 7.0
    assert np.array_equal(made.output(context=context), made.plain)


def test_attended_context_has_influence(case):
    """Row by row: changing one attended position changes its own row and no other."""
    made = case("unet_b")
    context = made.arrays["context"].copy()
    context[1, 4] += 1.0
    changed = np.abs(made.output(context=context) - made.plain).max(axis=(1, 2, 3))
    assert changed[1] > 1e-3
    assert changed[0] == changed[2] == 0


@pytest.mark.parametrize("name", ["c_noise", "vector"])
def test_noise_level_and_vector_have_influence(case, name):
    made = case("unet_b")
    values = made.arrays["timesteps" if name == "c_noise" else "vector"]
    changed = made.output(**{name: values + 0.5})
    assert np.abs(changed - made.plain).max(axis=(1, 2, 3)).min() > 1e-4


def test_a_fractional_noise_level_is_not_rounded(case):
    """c_noise enters as a float: EDM's lie between -1.6 and 1.1."""
    made = case("unet_b")
    first = made.output(c_noise=np.array([0.10, 0.10, 0.10]))
    second = made.output(c_noise=np.array([0.35, 0.35, 0.35]))
    assert np.abs(first - second).max() > 1e-5


# ---- initial weights


def test_an_initialised_network_answers_0(device):
    """The last layer starts at 0, so the first prediction is 0 for every input."""
    unet = UNetModel(**VALID)
    zeros = {id(parameter) for parameter in unet.zero_initialized()}
    initialize_network(single_file_parameters(unet, NETWORK_PREFIX), zeros, seed=3)
    generator = np.random.default_rng(0)
    shapes = [(2, 4, 4, 6), (2,), (2, 5, 24), (2, 20)]
    inputs = [Tensor(generator.standard_normal(s).astype(np.float32)) for s in shapes]
    output = unet(*inputs, Tensor(np.ones((2, 5), np.float32))).asnumpy()
    assert output.shape == (2, 3, 4, 6)
    assert (output == 0).all()


def test_each_residual_starts_at_its_identity(device):
    """The zeros are the last layer of every residual block, of every transformer, and of all."""
    unet = UNetModel(**VALID)
    zeros = {id(parameter) for parameter in unet.zero_initialized()}
    named = single_file_parameters(unet)
    names = {name for name, parameter in named.items() if id(parameter) in zeros}
    ends = ("out_layers.3.weight", "out_layers.3.bias", "proj_out.weight", "proj_out.bias")
    expected = {name for name in named if name.endswith(ends)}
    assert names == expected | {"out.2.weight", "out.2.bias"}
    assert len(names) == len(zeros) == 26  # of 8 blocks, 4 transformers and the output


# ---- refusals


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_classes", 1000),
        ("use_spatial_transformer", False),
        ("use_linear_in_transformer", False),
        ("legacy", True),
        ("spatial_transformer_attn_type", "softmax-xformers"),
        ("transformer_depth", [0, 1, 2]),
        ("model_channels", 48),
        ("num_head_channels", 48),
    ],
)
def test_refused(device, key, value):
    """A structure that is not SDXL's is refused by its key."""
    with pytest.raises(ValueError, match=f"UNetModel: {key} must be "):
        UNetModel(**(VALID | {key: value}))


def test_one_depth_serves_all_levels(device):
    """transformer_depth 1 means [1, 1]."""
    one, each = (
        single_file_parameters(UNetModel(**(VALID | {"transformer_depth": depth})))
        for depth in (1, [1, 1])
    )
    assert {n: p.shape for n, p in one.items()} == {n: p.shape for n, p in each.items()}
