"""Prompts to images: guidance, what the network is told, and the grid to look at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image
from support.preconditioning import EDM

from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.diffusion.model import DiffusionModel, Lazy, SamplingDefaults
from sdxl_host.diffusion.objective import denoise
from sdxl_host.diffusion.preconditioning import EpsPreconditioning, Preconditioning
from sdxl_host.diffusion.schedule import NoiseSchedule
from sdxl_host.models.first_stage import IdentityFirstStage
from sdxl_host.randomness import Stream, normals
from sdxl_host.sampling.grid import save_grid, to_bytes
from sdxl_host.sampling.pipeline import Conditions, ImageSampler
from sdxl_host.sampling.samplers import SAMPLERS, noise_levels, sample

SCHEDULE = NoiseSchedule.scaled_linear()
EPS = EpsPreconditioning(SCHEDULE)
TRAINED = SamplingDefaults("trailing", float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1]))


# ---- images to look at


def test_to_bytes_clips_and_rounds():
    """-1 is 0, 1 is 255, 0 lies between 127 and 128, and beyond is clipped, not wrapped."""
    row = np.array([-5.0, -1.01, -1.0, 0.0, 0.999, 1.0, 1.01, 300.0], np.float32)
    pixels = np.broadcast_to(row, (1, 3, 1, 8))
    assert to_bytes(pixels)[0, 0, :, 0].tolist() == [0, 0, 0, 128, 255, 255, 255, 255]


def test_to_bytes_undoes_the_scaling_of_the_data():
    """Each of the 256 values, through [-1, 1] and back, with channels last."""
    values = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    values[..., 1] = values[..., 1][:, ::-1]
    pixels = (values.astype(np.float32) / 127.5 - 1.0).transpose(0, 3, 1, 2)
    assert np.array_equal(to_bytes(pixels), values)


@pytest.mark.parametrize(
    ("count", "size", "caption", "expected"),
    [
        (1, (32, 32), "", (144, 144)),
        (1, (32, 32), "a cat", (144, 156)),
        (5, (32, 32), "a cat", (4 * 136 + 8, 2 * 148 + 8)),
        (17, (64, 64), "a cat", (8 * 136 + 8, 3 * 148 + 8)),
        (2, (32, 64), "a cat", (2 * 136 + 8, 64 + 20 + 8)),
        (1, (200, 150), "", (150 + 16, 200 + 16)),
        (1, (32, 32), "word " * 60, (144, 144 + 3 * 12)),
    ],
)
def test_save_grid_size(tmp_path, count, size, caption, expected):
    """Four columns, eight from 17 images on; small ones enlarged by a whole factor to 128 and
    more; at most three lines of caption."""
    path = tmp_path / "samples" / "step_00000001.png"
    save_grid(path, np.zeros((count, 3, *size), np.float32), [caption] * count)
    with Image.open(path) as image:
        assert image.size == expected
        assert image.mode == "RGB"


def test_save_grid_places_images_in_rows(tmp_path):
    """Five plain colours: four in the first row, the fifth below the first."""
    levels = np.linspace(-1, 0.9, 5, dtype=np.float32)
    pixels = np.broadcast_to(levels[:, None, None, None], (5, 3, 128, 128))
    save_grid(tmp_path / "grid.png", pixels, [""] * 5)
    with Image.open(tmp_path / "grid.png") as file:
        grid = np.asarray(file)
    expected = to_bytes(pixels)[:, 0, 0, 0].tolist()
    corners = [(8 + index // 4 * 136, 8 + index % 4 * 136) for index in range(5)]
    for (top, left), level in zip(corners, expected, strict=True):
        assert (grid[top : top + 128, left : left + 128] == level).all()
    assert (grid[:8] == 255).all()
    assert (grid[144:, 144:] == 255).all()


# ---- prompts to images

WIDTH = 5
SIDE = (4, 6)
CONDITIONS = Conditions(SIDE, (40, 60))


class StubNetwork:
    """F in numpy: every row a function of all it is given of its own row."""

    downsampling = 2

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, ...]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        x, c_noise, context, vector, mask = given = tuple(i.asnumpy() for i in inputs)
        self.calls.append(given)
        text = (context.mean(axis=2) * mask).sum(axis=1) + vector.sum(axis=1) * 1e-3
        level = (text + 1e-3 * c_noise)[:, None, None, None]
        return Tensor((0.3 * x + np.tanh(level)).astype(np.float32))


class StubConditioner:
    """A vector of the pooled text, the six numbers and the score, all as they come."""

    def vector(self, embedding: PromptEmbedding, sizes: dict[str, np.ndarray]) -> np.ndarray:
        return np.concatenate([embedding.pooled, *sizes.values()], axis=1).astype(np.float32)


class StubHooks:
    """Embeds a prompt as numbers seeded by its letters, over 80 positions."""

    def __init__(self, masked: bool = False) -> None:
        self.masked = masked

    def encode_prompt(self, prompts: Sequence[str], encoders: Any) -> PromptEmbedding:
        context = np.empty((len(prompts), 80, WIDTH), np.float32)
        for row, prompt in zip(context, prompts, strict=True):
            row[:] = np.random.default_rng(list(prompt.encode())).standard_normal((80, WIDTH))
        mask = np.tile(np.arange(80) < 79, (len(prompts), 1)) if self.masked else None
        return PromptEmbedding(context, context[:, 0, :3] + 2, mask)


def make_sampler(
    network: Any = None,
    preconditioning: Preconditioning = EPS,
    eager: bool = True,
    conditions: Conditions = CONDITIONS,
    **hooks: Any,
) -> ImageSampler:
    model = DiffusionModel(
        preconditioning=preconditioning,
        schedule=SCHEDULE,
        sampling=TRAINED,
        distribution=DiscreteDistribution(SCHEDULE),
        offset_noise_level=0.0,
        conditioner_part=Lazy(StubConditioner),
        network_part=Lazy(lambda: network or StubNetwork()),
        first_stage_part=Lazy(lambda: IdentityFirstStage(0.5)),
        encoders_part=Lazy(lambda: SimpleNamespace()),
    )
    return ImageSampler(StubHooks(**hooks), model, conditions, eager)


@pytest.fixture(scope="module")
def draw(device: str) -> Callable[..., np.ndarray]:
    """Images of a fresh sampler: `draw(prompts, scale=3.0, seed=1, steps=3)`; `options` are
    keywords of its own `draw`."""

    def images(
        prompts: Sequence[str],
        scale: float = 3.0,
        seed: int = 1,
        steps: int = 3,
        options: Mapping[str, Any] = MappingProxyType({}),
        **changes: Any,
    ) -> np.ndarray:
        return make_sampler(**changes).draw(prompts, steps, scale, seed, **options)

    return images


def test_a_image_is_a_function_of_its_prompt_the_seed_and_its_place(draw):
    """The same bits with other neighbours and in another batch; others at another place or seed."""
    prompts = [f"image {index}" for index in range(10)]
    whole = draw(prompts)
    assert whole.shape == (10, 3, *SIDE)
    assert whole.dtype == np.float32
    assert np.array_equal(draw(prompts[:3]), whole[:3])
    others = ["something else"] * 9 + [prompts[9]]
    assert np.array_equal(draw(others)[9], whole[9])
    assert not np.array_equal(draw(others)[0], whole[0])
    assert not np.array_equal(draw([prompts[0], prompts[0]])[1], whole[0])
    assert not np.array_equal(draw(prompts[:1], seed=2)[0], whole[0])


def test_places_have_noise_of_their_own(draw):
    """One prompt ten times: ten images, across the border between two batches too."""
    images = draw(["a cat"] * 10).reshape(10, -1)
    assert len(np.unique(images, axis=0)) == 10


@pytest.mark.parametrize(("count", "batches", "size"), [(1, 1, 1), (8, 1, 8), (11, 2, 8)])
def test_the_batches_of_a_call_have_one_shape(device, count, batches, size):
    """The network is compiled once: the last batch is filled up, and none is larger than needed."""
    network = StubNetwork()
    make_sampler(network).draw(["a"] * count, 2, 3.0, 0)
    assert len(network.calls) == 2 * 2 * batches
    assert {tuple(array.shape for array in call) for call in network.calls} == {
        ((size, 3, *SIDE), (size,), (size, 80, WIDTH), (size, 10), (size, 80))
    }


def test_guidance_1_asks_for_the_condition_only(device):
    """One call a step, with the prompt's own embedding."""
    network = StubNetwork()
    make_sampler(network).draw(["a cat"], 4, 1.0, 0)
    assert len(network.calls) == 4
    expected = StubHooks().encode_prompt(["a cat"], None).context[0]
    assert all(np.array_equal(call[2][0], expected) for call in network.calls)


def test_guidance_1_is_continuous(draw):
    """Leaving the unconditional answer out changes nothing but time."""
    np.testing.assert_allclose(draw(["a cat"], 1.0), draw(["a cat"], 1.0 + 1e-9), atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 7.5])
def test_guidance(draw, scale):
    """After one step: D_0 + scale * (D_text - D_0), where D_0 is that of the zero embedding."""
    text, zero = draw(["a cat"], 1.0, steps=1), draw(["a cat"], 0.0, steps=1)
    assert np.abs(text - zero).max() > 1
    guided = draw(["a cat"], scale, steps=1)
    np.testing.assert_allclose(guided, zero + scale * (text - zero), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_the_unconditional_row(device, masked):
    """Zeros in context and pooled text, sizes kept; attends all, or the first 77 of a mask."""
    network = StubNetwork()
    make_sampler(network, masked=masked).draw(["a cat"], 1, 3.0, 0)
    (_, _, context, vector, mask), (_, _, zeros, zero_vector, zero_mask) = network.calls
    assert context.any()
    assert not zeros.any()
    assert vector[0, :3].all()
    assert zero_vector[0].tolist() == [0, 0, 0, 40, 60, 0, 0, *SIDE, 2.5]
    assert np.array_equal(vector[:, 3:-1], zero_vector[:, 3:-1])
    assert (vector[:, -1] == 6.0).all()
    assert (mask[0].sum(), zero_mask[0].sum()) == ((79, 77) if masked else (80, 80))
    assert zero_mask[0, :77].all()


@pytest.mark.parametrize("preconditioning", [EPS, EDM()], ids=["eps", "edm"])
def test_one_step_is_the_denoised_noise(device, preconditioning):
    """c_in * s * n and c_noise enter, D / scale factor comes out; n is of the stream SAMPLING."""
    network = StubNetwork()
    images = make_sampler(network, preconditioning).draw(["a cat"], 1, 1.0, 3)
    sigma = SCHEDULE.sigmas[-1]
    x = sigma * normals(3, Stream.SAMPLING, 0, [0], (3, *SIDE))
    scaled, c_noise, *rest = network.calls[0]
    np.testing.assert_allclose(scaled, preconditioning.c_in(sigma) * x, rtol=1e-5)
    np.testing.assert_allclose(c_noise, preconditioning.c_noise(sigma), rtol=1e-6)
    output = network(*(Tensor(array) for array in (scaled, c_noise, *rest))).asnumpy()
    expected = denoise(preconditioning, x, sigma, output) / 0.5
    np.testing.assert_allclose(images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_every_sampler_draws(device, name):
    """From the noise of step 0 of the stream SAMPLING; step i of a sampler that takes noise draws
    that of step i + 1."""
    network = StubNetwork()
    images = make_sampler(network).draw(["a cat"], 4, 1.0, 3, sampler=name)
    context, vector, mask = (Tensor(array) for array in network.calls[0][2:])

    def noise(step: int) -> np.ndarray:
        return normals(3, Stream.SAMPLING, step, range(8), (3, *SIDE))

    def model(x: np.ndarray, sigma: float) -> np.ndarray:
        scaled = Tensor((EPS.c_in(np.float64(sigma)) * x).astype(np.float32))
        level = Tensor(np.full(8, EPS.c_noise(np.float64(sigma)), np.float32))
        return denoise(EPS, x, sigma, network(scaled, level, context, vector, mask).asnumpy())

    sigmas = noise_levels(TRAINED, SCHEDULE, 4)
    x = sample(name, model, noise(0) * np.float32(sigmas[0]), sigmas, lambda i: noise(i + 1))
    np.testing.assert_allclose(images, x[:1] / 0.5, rtol=1e-5, atol=1e-5)


def test_sampler_and_spacing_are_the_models_own_unless_told(draw):
    own = draw(["a cat"])
    same = {"sampler": TRAINED.sampler, "spacing": TRAINED.spacing}
    assert np.array_equal(own, draw(["a cat"], options=same))
    for changed in ({"sampler": "heun"}, {"spacing": "karras"}):
        assert not np.array_equal(own, draw(["a cat"], options=changed))


def test_a_negative_prompt_stands_for_the_unconditional_row(device):
    """Its own embedding, context and pooled, in every row, with the same sizes."""
    network = StubNetwork()
    make_sampler(network).draw(["a cat", "a dog"], 1, 3.0, 0, negative_prompt="blurred")
    (_, _, _, vector, _), (_, _, context, negative, _) = network.calls
    expected = StubHooks().encode_prompt(["blurred"] * 2, None)
    assert np.array_equal(context, expected.context)
    assert np.array_equal(negative[:, :3], expected.pooled)
    assert np.array_equal(negative[:, 3:-1], vector[:, 3:-1])


def test_the_network_is_told_the_conditions(device):
    """Sizes height first, crop top first, the target size other than the image's, the scores."""
    conditions = Conditions(SIDE, (40, 60), (7, 9), (32, 64), 5.5, 1.5)
    network = StubNetwork()
    make_sampler(network, conditions=conditions).draw(["a cat"], 1, 3.0, 0)
    rows = [call[3][0, 3:].tolist() for call in network.calls]
    assert rows == [[40, 60, 7, 9, 32, 64, score] for score in (5.5, 1.5)]


class Shift(nn.Cell):
    """F = one number."""

    downsampling = 1

    def __init__(self) -> None:
        super().__init__()
        self.number = Parameter(Tensor(np.zeros(1, np.float32)), name="number")

    def construct(self, x, c_noise, context, vector, mask):
        return x * 0.5 + self.number


def test_a_compiled_network_sees_later_updates(draw):
    """What training writes into the parameters after the first image is in the next one."""
    network, twin = Shift(), Shift()
    sampler = make_sampler(network, eager=False)
    for value in (0.25, -0.5):
        for parameter in (network.number, twin.number):
            ops.assign(parameter, Tensor(np.full(1, value, np.float32)))
        expected = draw(["a cat"], 1.0, network=twin)
        np.testing.assert_allclose(sampler.draw(["a cat"], 3, 1.0, 1), expected, atol=1e-5)


def test_a_grid_of_drawn_images(draw, tmp_path: Path):
    """What the sampler gives is what the grid takes."""
    save_grid(tmp_path / "grid.png", draw(["a", "b"]), ["a", "b"])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.width == 2 * (132 + 8) + 8  # 22 times the 6 pixels
