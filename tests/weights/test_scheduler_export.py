"""How a trained objective is told to diffusers: the scheduler that samples the network."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from sdxl_host.cli import main
from sdxl_host.diffusion.preconditioning import (
    EpsPreconditioning,
    Preconditioning,
    VPreconditioning,
)
from sdxl_host.diffusion.schedule import NoiseSchedule

SDXL = NoiseSchedule.scaled_linear()


@pytest.mark.parametrize(
    ("cls", "prediction_type"),
    [(EpsPreconditioning, "epsilon"), (VPreconditioning, "v_prediction")],
)
def test_eps_and_v_name_sdxls_scheduler(cls: type[Preconditioning], prediction_type: str) -> None:
    assert cls(SDXL).scheduler_config() == {
        "_class_name": "EulerDiscreteScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "trained_betas": None,
        "num_train_timesteps": 1000,
        "prediction_type": prediction_type,
        "timestep_spacing": "trailing",
    }


def test_another_schedule_is_told_by_its_betas() -> None:
    """From them the noise levels come back: sigma^2 = (1 - abar) / abar, abar = prod(1 - beta)."""
    schedule = NoiseSchedule.scaled_linear(0.001, 0.02, 500)
    said = EpsPreconditioning(schedule).scheduler_config()
    betas = np.asarray(said["trained_betas"])
    assert said["num_train_timesteps"] == len(betas) == 500
    np.testing.assert_allclose(betas, np.linspace(0.001**0.5, 0.02**0.5, 500) ** 2, rtol=1e-9)
    alpha_bar = np.cumprod(1.0 - betas)
    np.testing.assert_allclose(np.sqrt((1 - alpha_bar) / alpha_bar), schedule.sigmas, rtol=1e-9)


def test_a_plugins_preconditioning_has_none_unless_it_says() -> None:
    assert Preconditioning.scheduler_config(EpsPreconditioning(SDXL)) is None


def test_what_a_source_records_is_what_a_folder_gets(
    small_model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    """An objective that only its scheduler can name: the folder has it, a single file is refused,
    and a folder that is read again keeps it."""
    monkeypatch.chdir(tmp_path)
    scheduler = {"_class_name": "EDMEulerScheduler", "sigma_data": 0.7, "sigma_max": 80.0}
    metadata = {"sdxl_host.objective": "edm", "sdxl_host.scheduler": json.dumps(scheduler)}
    save_file(small_model.arrays, "edm.safetensors", metadata)
    assert main(["convert", "edm.safetensors", "folder", "--head_width", "8"]) == 0
    assert main(["convert", "folder", "again"]) == 0
    for folder in ("folder", "again"):
        written = json.loads(Path(folder, "scheduler", "scheduler_config.json").read_text())
        assert {key: written[key] for key in scheduler} == scheduler
        assert "_diffusers_version" in written
        index = json.loads(Path(folder, "model_index.json").read_text())
        assert index["scheduler"] == ["diffusers", "EDMEulerScheduler"]
    assert main(["convert", "folder", "out.safetensors"]) == 2
    assert "--allow_unmarked_objective" in capsys.readouterr().err
    assert not Path("out.safetensors").exists()
