"""The autoencoder against the original's arithmetic and names, and the posterior's sampling."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from mindspore import Parameter, Tensor

from sdxl_host.models.first_stage import AutoencoderKLInferenceWrapper
from sdxl_host.settings.targets import build

PREFIX = "first_stage_model."
PARITY = 2e-5  # of the largest value; the contract is 1e-4
CASES = ("a", "b")  # 3 levels, batch 2, 16 by 24; 4 levels as SDXL, 40 by 24


@dataclass
class Case:
    """An autoencoder with the golden weights, and the file's inputs and outputs."""

    first_stage: AutoencoderKLInferenceWrapper
    parameters: dict[str, Parameter]
    arrays: dict[str, np.ndarray]


@pytest.fixture(scope="module")
def make_case(golden: Path, fill: Callable) -> Callable[[str], Case]:
    """`make_case("a")`: a new autoencoder of that name in the golden file."""
    with np.load(golden / "autoencoder.npz") as file:
        everything = dict(file)

    def make(name: str) -> Case:
        arrays = {
            key.removeprefix(f"{name}_"): values
            for key, values in everything.items()
            if key.startswith(f"{name}_")
        }
        ddconfig = json.loads(str(arrays["ddconfig"]))
        del ddconfig["resolution"]  # see `config.mindone`
        params = {"ddconfig": ddconfig, "embed_dim": int(everything["embed_dim"])}
        first_stage = build(
            {"target": "sdxl_host.AutoencoderKL", "params": params},
            "first_stage",
            "here",
            scale_factor=float(everything["scale_factor"]),
        )
        return Case(first_stage, fill(first_stage.cell, PREFIX), arrays)

    return make


@pytest.fixture(scope="module")
def case(make_case: Callable[[str], Case]) -> Callable[[str], Case]:
    """`case("a")`: the same, built once; its weights are not to be changed."""
    built: dict[str, Case] = {}

    def get(name: str) -> Case:
        if name not in built:
            built[name] = make_case(name)
        return built[name]

    return get


def close(actual: np.ndarray, expected: np.ndarray) -> None:
    """The worst difference as a share of the largest value."""
    assert actual.shape == expected.shape
    assert actual.dtype == np.float32
    assert np.abs(actual - expected).max() <= PARITY * np.abs(expected).max()


# ---- the original's arithmetic


@pytest.mark.parametrize("name", CASES)
def test_golden_moments(case, name):
    """Mean and log variance of the posterior; the mean stands first."""
    made = case(name)
    moments = made.first_stage.cell.moments(Tensor(made.arrays["pixels"])).asnumpy()
    close(moments, made.arrays["moments"])
    close(moments[:, :4], made.arrays["mean"])


@pytest.mark.parametrize("name", CASES)
def test_golden_decoded(case, name):
    """Pixels of an unscaled latent."""
    made = case(name)
    close(
        made.first_stage.cell.decode_latents(Tensor(made.arrays["z"])).asnumpy(),
        made.arrays["decoded"],
    )


@pytest.mark.parametrize("name", CASES)
def test_golden_names(case, name):
    """Parameters carry the single file's names, each of them and no other."""
    made = case(name)
    assert sorted(made.parameters) == made.arrays["names"].tolist()


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("encoder.conv_in.weight", (32, 3, 3, 3)),
        ("encoder.down.0.downsample.conv.weight", (32, 32, 3, 3)),
        ("encoder.down.1.block.0.nin_shortcut.weight", (64, 32, 1, 1)),
        ("encoder.mid.attn_1.q.weight", (64, 64, 1, 1)),
        ("encoder.conv_out.weight", (8, 64, 3, 3)),
        ("quant_conv.weight", (8, 8, 1, 1)),
        ("post_quant_conv.bias", (4,)),
        ("decoder.up.0.block.0.nin_shortcut.weight", (32, 64, 1, 1)),
        ("decoder.up.2.block.2.norm1.weight", (64,)),
        ("decoder.up.3.upsample.conv.bias", (64,)),
        ("decoder.mid.attn_1.proj_out.weight", (64, 64, 1, 1)),
    ],
)
def test_shapes(case, name, shape):
    """Shapes are the single file's: the attention's projections are kernels there."""
    assert tuple(case("b").parameters[PREFIX + name].shape) == shape


def test_what_the_first_stage_says_of_itself(case):
    """Channels of a latent, and how many pixels one of its places stands for."""
    stages = [case(name).first_stage for name in CASES]
    assert [(stage.channels, stage.downsampling) for stage in stages] == [(4, 4), (4, 8)]


# ---- latents


@pytest.mark.parametrize("name", CASES)
def test_golden_latent(case, name):
    """0.13025 * (mean + std * noise): the posterior is sampled."""
    made = case(name)
    close(
        made.first_stage.encode(made.arrays["pixels"], made.arrays["noise"]), made.arrays["latent"]
    )


def test_without_noise_the_latent_is_the_mean(case):
    made = case("a")
    expected = np.float32(0.13025) * made.arrays["mean"]
    close(made.first_stage.encode(made.arrays["pixels"], None), expected)
    close(made.first_stage.encode(made.arrays["pixels"], made.arrays["noise"] * 0), expected)


@pytest.mark.parametrize("name", CASES)
def test_golden_pixels(case, name):
    """A latent is divided by the scale factor before it is decoded."""
    made = case(name)
    latents = np.float32(0.13025) * made.arrays["z"]
    close(made.first_stage.decode(latents), made.arrays["decoded"])


def test_a_image_does_not_depend_on_its_neighbours(case):
    """Bit for bit the same alone and in a batch, there and back."""
    made = case("a")
    pixels, noise, z = (made.arrays[key] for key in ("pixels", "noise", "z"))
    encode, decode = made.first_stage.encode, made.first_stage.decode
    assert np.array_equal(encode(pixels[1:], noise[1:]), encode(pixels, noise)[1:])
    assert np.array_equal(decode(z[1:]), decode(z)[1:])


def test_the_log_variance_is_clipped(make_case):
    """latent = 0.13025 * (mean + exp(0.5 * clip(logvar, -30, 20)) * noise), at both edges and
    beyond: with its weights at 0 the last convolution's bias is the moments."""
    made = make_case("a")
    mean, log_variance = [0.5, -1.0, 2.0, 0.25], [-60.0, -30.0, 20.0, 35.0]
    kernel, bias = (made.parameters[f"{PREFIX}quant_conv.{key}"] for key in ("weight", "bias"))
    kernel.set_data(Tensor(np.zeros(kernel.shape, np.float32)))
    bias.set_data(Tensor(np.array([*mean, *log_variance], np.float32)))
    shape = made.arrays["noise"].shape
    noise = np.full(shape, 1e6, np.float32)  # makes exp(-15) as large as the means
    noise[:, 2:] = made.arrays["noise"][:, 2:]
    std = np.exp(0.5 * np.array([-30.0, -30.0, 20.0, 20.0]))[:, None, None]
    expected = 0.13025 * (np.array(mean)[:, None, None] + std * noise)
    latent = made.first_stage.encode(made.arrays["pixels"], noise)
    assert latent.dtype == np.float32
    np.testing.assert_allclose(latent, expected, rtol=1e-5)
