"""The noise schedule: its figures, its inverse and the borders between timesteps."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sdxl_host.diffusion.arrays import floats
from sdxl_host.diffusion.schedule import NoiseSchedule

GOLDEN = Path(__file__).parents[1] / "golden"
EXACT = 1e-10


@pytest.fixture(scope="module")
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear()


def test_sdxl_figures(schedule):
    """s_0 = 0.02917, s_999 = 14.6146, SNR_0 = 1175.5, SNR_999 = 0.00468, to the digits given."""
    snr = 1.0 / schedule.sigmas**2
    assert len(schedule) == 1000
    assert schedule.sigmas.dtype == np.float64
    assert schedule.sigmas[0] == pytest.approx(0.02917, abs=5e-6)
    assert schedule.sigmas[999] == pytest.approx(14.6146, abs=5e-5)
    assert snr[0] == pytest.approx(1175.5, abs=0.1)
    assert snr[999] == pytest.approx(0.00468, abs=5e-6)


def test_snr_falls_under_5_at_timestep_147(schedule):
    snr = 1.0 / schedule.sigmas**2
    assert snr[146] >= 5 > snr[147]


def test_moments_and_shares_of_log_sigma(schedule):
    """Mean and deviation of ln s_t, P(s < 0.3) and P(s > 1), which EDM's `sdxl` preset is for."""
    assert schedule.log_sigmas.mean() == pytest.approx(0.4833, abs=5e-5)
    assert schedule.log_sigmas.std() == pytest.approx(1.1943, abs=5e-5)
    assert (schedule.sigmas < 0.3).mean() == pytest.approx(0.081, abs=5e-4)
    assert (schedule.sigmas > 1).mean() == pytest.approx(0.646, abs=5e-4)


@pytest.mark.parametrize(
    ("start", "end", "count"),
    [(0.00085, 0.012, 1000), (0.0001, 0.02, 500), (0.001, 0.001, 20), (0.00085, 0.012, 2)],
)
def test_sigma_is_sqrt_of_one_minus_abar_over_abar(start, end, count):
    """s_t = sqrt((1 - abar_t) / abar_t) with abar = cumprod(1 - beta), beta linear in its root."""
    beta = np.linspace(np.sqrt(start), np.sqrt(end), count) ** 2
    abar = np.cumprod(1.0 - beta)
    schedule = NoiseSchedule.scaled_linear(start, end, count)
    assert len(schedule) == count
    np.testing.assert_allclose(schedule.sigmas, np.sqrt((1 - abar) / abar), rtol=EXACT)


def test_golden_sigmas(schedule):
    """The sigmas of diffusers' EulerDiscreteScheduler, which computes in float32."""
    with np.load(GOLDEN / "schedule.npz") as golden:
        np.testing.assert_allclose(schedule.sigmas, golden["sigmas"], rtol=2e-5)
        for count in (10, 25):
            expected = golden[f"trailing_{count}"][:-1]
            actual = schedule.sigma(golden[f"timesteps_{count}"])
            np.testing.assert_allclose(actual, expected, rtol=2e-5)


# ---- timestep and sigma are each other's inverse


def test_whole_timesteps_have_the_schedules_own_sigmas(schedule):
    np.testing.assert_allclose(schedule.sigma(np.arange(1000)), schedule.sigmas, rtol=1e-14)
    np.testing.assert_allclose(schedule.timestep(schedule.sigmas), np.arange(1000), atol=EXACT)


@pytest.mark.parametrize("offset", [1e-6, 0.25, 0.5, 1 / 3, 0.999])
def test_timestep_of_sigma_is_the_fractional_timestep(schedule, offset):
    """t(s(t)) = t between the timesteps as well."""
    t = np.arange(999) + offset
    np.testing.assert_allclose(schedule.timestep(schedule.sigma(t)), t, atol=EXACT, rtol=0)


def test_sigma_of_timestep_is_sigma(schedule):
    """s(t(s)) = s for every sigma in the schedule's range."""
    sigma = np.geomspace(schedule.sigmas[0], schedule.sigmas[-1], 4001)
    np.testing.assert_allclose(schedule.sigma(schedule.timestep(sigma)), sigma, rtol=EXACT)


def test_interpolation_is_linear_in_log_sigma(schedule):
    """ln s(t + r) = (1 - r) ln s_t + r ln s_{t+1}."""
    logs = np.log(schedule.sigmas)
    expected = 0.7 * logs[:-1] + 0.3 * logs[1:]
    np.testing.assert_allclose(np.log(schedule.sigma(np.arange(999) + 0.3)), expected, atol=EXACT)


@pytest.mark.parametrize(
    ("sigma", "timestep"), [(1e-8, 0.0), (0.02, 0.0), (14.7, 999.0), (80.0, 999.0), (1e8, 999.0)]
)
def test_timestep_is_clamped_outside_the_schedule(schedule, sigma, timestep):
    assert schedule.timestep(sigma) == timestep


@pytest.mark.parametrize(("timestep", "index"), [(-3.0, 0), (1234.5, 999)])
def test_sigma_is_clamped_outside_the_schedule(schedule, timestep, index):
    assert schedule.sigma(timestep) == pytest.approx(schedule.sigmas[index], rel=1e-14)


@pytest.mark.parametrize("shape", [(), (7,), (2, 3)])
def test_shapes_are_kept(schedule, shape):
    sigma = np.full(shape, 0.7)
    assert np.shape(schedule.timestep(sigma)) == shape
    assert np.shape(schedule.sigma(sigma)) == shape
    assert np.shape(schedule.nearest(sigma)) == shape


# ---- edges


def test_edges_lie_half_way_in_log_sigma(schedule):
    """e_0 = 0, e_j = sqrt(s_{j-1} s_j), e_1000 = infinity."""
    middle = np.sqrt(schedule.sigmas[:-1] * schedule.sigmas[1:])
    assert schedule.edges.shape == (1001,)
    assert schedule.edges[0] == 0
    assert schedule.edges[-1] == np.inf
    np.testing.assert_allclose(schedule.edges[1:-1], middle, rtol=EXACT)


def test_each_timestep_is_nearest_to_itself(schedule):
    """All 1000, in float64 and after a round trip through float32."""
    np.testing.assert_array_equal(schedule.nearest(schedule.sigmas), np.arange(1000))
    single = schedule.sigmas.astype(np.float32)
    np.testing.assert_array_equal(schedule.nearest(single), np.arange(1000))


@pytest.mark.parametrize("share", [1e-9, 0.5, 0.999999])
def test_a_timestep_stays_nearest_until_its_edges(schedule, share):
    """Moved by any share of the way to either edge, each sigma still belongs to its timestep."""
    logs = schedule.log_sigmas
    edges = np.log(schedule.edges[1:-1])
    up = np.exp(logs[:-1] + share * (edges - logs[:-1]))
    down = np.exp(logs[1:] - share * (logs[1:] - edges))
    np.testing.assert_array_equal(schedule.nearest(up), np.arange(999))
    np.testing.assert_array_equal(schedule.nearest(down), np.arange(1, 1000))


def test_an_edge_belongs_to_the_later_timestep(schedule):
    """nearest(s) = j where e_j <= s < e_{j+1}."""
    inner = schedule.edges[1:-1]
    np.testing.assert_array_equal(schedule.nearest(inner), np.arange(1, 1000))
    np.testing.assert_array_equal(schedule.nearest(np.nextafter(inner, 0)), np.arange(999))


def test_nearest_is_the_rounded_timestep(schedule):
    """nearest(s) = round(t(s)) away from the edges."""
    sigma = np.random.default_rng(1).uniform(0.03, 14.6, 5000)
    t = schedule.timestep(sigma)
    away = np.abs(t - np.floor(t) - 0.5) > 1e-6
    np.testing.assert_array_equal(schedule.nearest(sigma)[away], np.rint(t)[away])


@pytest.mark.parametrize(("sigma", "index"), [(1e-8, 0), (1e8, 999), (np.inf, 999)])
def test_nearest_outside_the_schedule_is_its_end(schedule, sigma, index):
    assert schedule.nearest(sigma) == index


# ---- what is refused


def zero_terminal_snr() -> np.ndarray:
    """SDXL's sigmas with sqrt(abar) shifted and scaled so that the last one is 0."""
    beta = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    root = np.sqrt(np.cumprod(1 - beta))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    with np.errstate(divide="ignore"):
        return np.sqrt(1 - root**2) / root


@pytest.mark.parametrize(
    ("sigmas", "reason"),
    [
        (zero_terminal_snr(), "finite"),
        ([0.1, np.nan, 1.0], "finite"),
        ([np.nan, 0.5, 1.0], "finite"),
        ([0.0, 0.5, 1.0], "greater than 0"),
        ([-0.5, 0.5, 1.0], "greater than 0"),
        ([0.1, 0.5, 0.4], "increase"),
        ([0.1, 0.5, 0.5], "increase"),
        ([1.0], "shape"),
        ([], "shape"),
        ([[0.1, 0.2], [0.3, 0.4]], "shape"),
        (0.5, "shape"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_sigmas(sigmas, reason):
    with pytest.raises(ValueError, match=f"^schedule: .*{reason}"):
        NoiseSchedule(np.asarray(sigmas, float))


@pytest.mark.parametrize(
    ("start", "end"),
    [(0.0, 0.012), (-0.1, 0.012), (0.02, 0.01), (0.001, 1.0), (np.nan, 0.1), (0.001, np.nan)],
)
def test_refused_betas(start, end):
    with pytest.raises(ValueError, match="0 < linear_start <= linear_end < 1"):
        NoiseSchedule.scaled_linear(start, end)


def test_a_list_of_sigmas_becomes_float64():
    schedule = NoiseSchedule([1, 2, 4])  # type: ignore[arg-type]
    assert schedule.sigmas.dtype == np.float64
    np.testing.assert_allclose(schedule.edges, [0, 2**0.5, 2 * 2**0.5, np.inf], rtol=1e-14)


def test_floats_copies_only_where_needed():
    array = np.ones(3)
    assert floats(array) is array
    assert floats(np.ones(3, np.float32)).dtype == np.float64
