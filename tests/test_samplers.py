"""From noise to pictures: Euler, noise levels, guidance, and the grid to look at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from mindspore import Parameter, Tensor, nn, ops
from PIL import Image

from sdxl_host.diffusion.distributions import DiscreteDistribution
from sdxl_host.diffusion.objective import denoise
from sdxl_host.diffusion.preconditioning import (
    EpsPreconditioning,
    Preconditioning,
    VPreconditioning,
)
from sdxl_host.diffusion.schedule import Schedule
from sdxl_host.model import DiffusionModel, Lazy, Sampling
from sdxl_host.models.first_stage import IdentityFirstStage
from sdxl_host.prompts import PromptEmbedding
from sdxl_host.randomness import Stream, normals
from sdxl_host.sampling.grid import save_grid, to_bytes
from sdxl_host.sampling.sampler import PictureSampler
from sdxl_host.sampling.samplers import euler, karras_sigmas, noise_levels, trailing_sigmas

SCHEDULE = Schedule.scaled_linear()


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


EPS = EpsPreconditioning(SCHEDULE)


# ---- Euler


@pytest.mark.parametrize(
    ("key", "preconditioning", "slope"),
    [
        ("epsilon", EPS, 0.001),
        ("v_prediction", VPreconditioning(SCHEDULE), 0.001),
        ("edm", EDM(), 1),
    ],
    ids=["eps", "v", "edm"],
)
def test_golden_euler(golden, key, preconditioning, slope):
    """Six steps at the stored noise levels, every state: F = tanh(0.7 c_in x + slope * c_noise)."""
    with np.load(golden / "euler.npz") as file:
        noise, states = file["noise"], file[f"{key}_x"]
        sigmas, timesteps = file[f"{key}_sigmas"], file[f"{key}_timesteps"]
    told = dict(zip(sigmas.tolist(), timesteps.tolist(), strict=False))

    def model(x: np.ndarray, sigma: float) -> np.ndarray:
        assert preconditioning.c_noise(sigma) == pytest.approx(told[sigma], rel=1e-4)
        output = np.tanh(0.7 * preconditioning.c_in(sigma) * x + slope * told[sigma])
        return denoise(preconditioning, x, sigma, output)

    start = noise * np.float32(sigmas[0])
    for count in range(len(sigmas)):
        x = euler(model, start, sigmas[: count + 1])
        assert x.dtype == np.float32
        assert np.abs(x - states[count]).max() <= 2e-6 * np.abs(states[count]).max()


def test_one_step_gives_the_denoised_latent():
    """x + (x - D) / s * (0 - s) = D."""
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
    answer = np.random.default_rng(1).standard_normal(x.shape)
    result = euler(lambda _, sigma: answer * sigma, x * 9, np.array([9.0, 0.0]))
    np.testing.assert_allclose(result, answer * 9, rtol=1e-5, atol=1e-5)


def test_the_model_is_never_asked_at_sigma_0():
    """It is asked once at each noise level but the last, from the noisiest down."""
    asked = []

    def model(x: np.ndarray, sigma: float) -> np.ndarray:
        asked.append(sigma)
        return x * 0

    euler(model, np.ones((1, 1, 1, 1), np.float32), np.array([3.0, 2.0, 0.5, 0.0]))
    assert asked == [3.0, 2.0, 0.5]


MEAN, SPREAD = 0.8, 0.5


def gaussian_denoiser(x: np.ndarray, sigma: float) -> np.ndarray:
    """D of data from N(MEAN, SPREAD^2): the mean of what is known of z, given x."""
    return (SPREAD**2 * x + sigma**2 * MEAN) / (SPREAD**2 + sigma**2)


def exact_end(x: np.ndarray, sigma: float) -> np.ndarray:
    """Where the flow of that D takes x from noise level sigma to 0."""
    return MEAN + (x - MEAN) * SPREAD / np.sqrt(SPREAD**2 + sigma**2)


def test_euler_lands_on_the_data():
    """With many steps, noise becomes samples of N(MEAN, SPREAD^2), each at the flow's own end."""
    noise = np.random.default_rng(2).standard_normal((1, 1, 200, 200)).astype(np.float32)
    sigmas = karras_sigmas(0.002, 80.0, 400)
    x = euler(gaussian_denoiser, noise * np.float32(80.0), sigmas)
    np.testing.assert_allclose(x, exact_end(noise * 80.0, 80.0), atol=0.04)
    assert x.mean() == pytest.approx(MEAN, abs=0.02)
    assert x.std() == pytest.approx(SPREAD, rel=0.02)


def test_euler_is_of_first_order():
    """Twice the steps leave half the error."""
    x = np.full((1, 1, 1, 1), 30.0, np.float32)
    errors = []
    for steps in (50, 100, 200):
        end = euler(gaussian_denoiser, x, karras_sigmas(0.002, 20.0, steps))
        errors.append(abs(float(end[0, 0, 0, 0]) - float(exact_end(x, 20.0)[0, 0, 0, 0])))
    ratios = np.divide(errors[:-1], errors[1:])
    np.testing.assert_allclose(ratios, 2.0, atol=0.2)


# ---- noise levels


@pytest.mark.parametrize("steps", [10, 25])
def test_golden_trailing_sigmas(golden, steps):
    """The reference computes in float32; its first sigmas have lost digits."""
    with np.load(golden / "schedule.npz") as file:
        expected, timesteps = file[f"trailing_{steps}"], file[f"timesteps_{steps}"]
    actual = trailing_sigmas(SCHEDULE, steps)
    np.testing.assert_allclose(actual, expected, rtol=2e-5)
    assert np.array_equal(SCHEDULE.nearest(actual[:-1]), timesteps)


def test_golden_karras_sigmas(golden):
    with np.load(golden / "euler.npz") as file:
        np.testing.assert_allclose(karras_sigmas(0.002, 80.0, 6), file["edm_sigmas"], rtol=2e-6)


@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_noise_levels_descend_from_the_noisiest_to_0(steps):
    """Whatever the spacing: steps + 1 levels, the first the largest trained on, the last 0."""
    for spacing, low, high in (("trailing", 0.0, SCHEDULE.sigmas[-1]), ("karras", 0.002, 80.0)):
        levels = noise_levels(Sampling(spacing, low, high), SCHEDULE, steps)
        assert levels.shape == (steps + 1,)
        assert levels[0] == pytest.approx(high, rel=1e-12)
        assert levels[-1] == 0
        assert (np.diff(levels) < 0).all()


def test_karras_ends_at_sigma_min_before_0():
    """Eq. 5: the seventh roots are evenly spaced from sigma_max to sigma_min."""
    roots = karras_sigmas(0.01, 50.0, 9)[:-1] ** (1 / 7)
    np.testing.assert_allclose(np.diff(roots), (0.01 ** (1 / 7) - 50 ** (1 / 7)) / 8, rtol=1e-10)
    assert roots[-1] ** 7 == pytest.approx(0.01)


# ---- pictures to look at


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
    """Four columns, eight from 17 pictures on; small ones enlarged by a whole factor to 128 and
    more; at most three lines of caption."""
    path = tmp_path / "samples" / "step_00000001.png"
    save_grid(path, np.zeros((count, 3, *size), np.float32), [caption] * count)
    with Image.open(path) as picture:
        assert picture.size == expected
        assert picture.mode == "RGB"


def test_save_grid_places_pictures_in_rows(tmp_path):
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


# ---- prompts to pictures

WIDTH = 5
SIDE = (4, 6)


class StubNetwork:
    """F in numpy: every row a function of all it is given of its own row."""

    def __init__(self) -> None:
        self.calls: list[tuple[np.ndarray, ...]] = []

    def __call__(self, *inputs: Tensor) -> Tensor:
        x, c_noise, context, vector, mask = given = tuple(i.asnumpy() for i in inputs)
        self.calls.append(given)
        text = (context.mean(axis=2) * mask).sum(axis=1) + vector.sum(axis=1) * 1e-3
        level = (text + 1e-3 * c_noise)[:, None, None, None]
        return Tensor((0.3 * x + np.tanh(level)).astype(np.float32))


class StubConditioner:
    """A vector of the pooled text and the six numbers."""

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
    network: Any = None, preconditioning: Preconditioning = EPS, eager: bool = True, **hooks: Any
) -> PictureSampler:
    model = DiffusionModel(
        preconditioning=preconditioning,
        schedule=SCHEDULE,
        sampling=Sampling("trailing", float(SCHEDULE.sigmas[0]), float(SCHEDULE.sigmas[-1])),
        distribution=DiscreteDistribution(SCHEDULE),
        offset_noise_level=0.0,
        conditioner_part=Lazy(StubConditioner),
        network_part=Lazy(lambda: network or StubNetwork()),
        first_stage_part=Lazy(lambda: IdentityFirstStage(0.5)),
        encoders_part=Lazy(lambda: SimpleNamespace()),
    )
    return PictureSampler(StubHooks(**hooks), model, SIDE, (40, 60), eager)


@pytest.fixture(scope="module")
def draw(device: str) -> Callable[..., np.ndarray]:
    """Pictures of a fresh sampler: `draw(prompts, scale=3.0, seed=1, steps=3)`."""

    def pictures(
        prompts: Sequence[str], scale: float = 3.0, seed: int = 1, steps: int = 3, **changes: Any
    ) -> np.ndarray:
        return make_sampler(**changes).draw(prompts, steps, scale, seed)

    return pictures


def test_a_picture_is_a_function_of_its_prompt_the_seed_and_its_place(draw):
    """The same bits with other neighbours and in another batch; others at another place or seed."""
    prompts = [f"picture {index}" for index in range(10)]
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
    """One prompt ten times: ten pictures, across the border between two batches too."""
    pictures = draw(["a cat"] * 10).reshape(10, -1)
    assert len(np.unique(pictures, axis=0)) == 10


def test_every_call_has_one_shape(device):
    """The network is compiled once: a batch is filled up, whatever the number of prompts."""
    network = StubNetwork()
    sampler = make_sampler(network)
    for count in (1, 8, 11):
        sampler.draw(["a"] * count, 2, 3.0, 0)
    assert len(network.calls) == 2 * 2 * (1 + 1 + 2)
    assert {tuple(array.shape for array in call) for call in network.calls} == {
        ((8, 3, *SIDE), (8,), (8, 80, WIDTH), (8, 9), (8, 80))
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
    assert zero_vector[0].tolist() == [0, 0, 0, 40, 60, 0, 0, *SIDE]
    assert np.array_equal(vector[:, 3:], zero_vector[:, 3:])
    assert (mask[0].sum(), zero_mask[0].sum()) == ((79, 77) if masked else (80, 80))
    assert zero_mask[0, :77].all()


@pytest.mark.parametrize("preconditioning", [EPS, EDM()], ids=["eps", "edm"])
def test_one_step_is_the_denoised_noise(device, preconditioning):
    """c_in * s * n and c_noise enter, D / scale factor comes out; n is of the stream SAMPLING."""
    network = StubNetwork()
    pictures = make_sampler(network, preconditioning).draw(["a cat"], 1, 1.0, 3)
    sigma = SCHEDULE.sigmas[-1]
    x = sigma * normals(3, Stream.SAMPLING, 0, range(8), (3, *SIDE))
    scaled, c_noise, *rest = network.calls[0]
    np.testing.assert_allclose(scaled, preconditioning.c_in(sigma) * x, rtol=1e-5)
    np.testing.assert_allclose(c_noise, preconditioning.c_noise(sigma), rtol=1e-6)
    output = network(*(Tensor(array) for array in (scaled, c_noise, *rest))).asnumpy()
    expected = denoise(preconditioning, x, sigma, output)[:1] / 0.5
    np.testing.assert_allclose(pictures, expected, rtol=1e-4, atol=1e-4)


class Shift(nn.Cell):
    """F = one number."""

    def __init__(self) -> None:
        super().__init__()
        self.number = Parameter(Tensor(np.zeros(1, np.float32)), name="number")

    def construct(self, x, c_noise, context, vector, mask):
        return x * 0.5 + self.number


def test_a_compiled_network_sees_later_updates(draw):
    """What training writes into the parameters after the first picture is in the next one."""
    network, twin = Shift(), Shift()
    sampler = make_sampler(network, eager=False)
    for value in (0.25, -0.5):
        for parameter in (network.number, twin.number):
            ops.assign(parameter, Tensor(np.full(1, value, np.float32)))
        expected = draw(["a cat"], 1.0, network=twin)
        np.testing.assert_allclose(sampler.draw(["a cat"], 3, 1.0, 1), expected, atol=1e-5)


def test_a_grid_of_drawn_pictures(draw, tmp_path: Path):
    """What the sampler gives is what the grid takes."""
    save_grid(tmp_path / "grid.png", draw(["a", "b"]), ["a", "b"])
    with Image.open(tmp_path / "grid.png") as picture:
        assert picture.width == 2 * (132 + 8) + 8  # 22 times the 6 pixels
