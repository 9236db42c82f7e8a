"""Config files: where they are found, and the mapping that one holds."""

from __future__ import annotations

from pathlib import Path

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from sdxl_host.errors import ConfigError, did_you_mean
from sdxl_host.settings.options import first_line

__all__ = ["DEFAULT_CONFIG", "SDXL_CONFIG", "find_config", "packaged_configs", "read_yaml"]

DEFAULT_CONFIG = "default.yaml"
SDXL_CONFIG = "training/sd_xl_base_finetune_910b.yaml"


def packaged_configs() -> Path:
    """The folder of configs that travels with the package."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def find_config(name: str) -> Path:
    """The file `name` on disk, or of that name among the packaged configs."""
    if Path(name).is_file():
        return Path(name)
    packaged = packaged_configs()
    inside = packaged / name.removeprefix("./").removeprefix("configs/")
    if inside.is_file():
        return inside
    known = sorted(f"configs/{p.relative_to(packaged)}" for p in packaged.rglob("*.yaml"))
    raise ConfigError(
        f"--config {name}: there is no such file{did_you_mean(name, known)} "
        f"(packaged: {', '.join(known)})"
    )


def read_yaml(path: Path) -> DictConfig:
    """The mapping in a YAML file. Raises ConfigError with file and line."""
    try:
        tree = OmegaConf.load(path)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or first_line(error)
        raise ConfigError(f"{path}{line}: not valid YAML: {problem}; mend the file") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from error
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    if not isinstance(tree, DictConfig):
        raise ConfigError(f"{path}: holds no mapping; it needs the keys model, optim and data")
    return tree
