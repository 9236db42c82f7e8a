"""MindSpore's state, set once before anything of it runs."""

from __future__ import annotations

import os
import warnings

from sdxl_host.errors import ConfigError

__all__ = ["on_ascend", "prepare_device"]


def prepare_device(target: str = "auto") -> str:
    """Imports MindSpore and chooses its device; returns "CPU" or "Ascend".

    Raises ConfigError when the device is not there, or when NumPy is one MindSpore can't work with.
    """
    import numpy as np

    if int(np.__version__.split(".")[0]) >= 2:
        raise ConfigError(
            f"numpy {np.__version__} does not work with MindSpore (tensor operations fail); "
            "pip install 'numpy<2'"
        )
    if target != "Ascend":
        # Without it MindSpore's main thread waits by spinning and takes a whole core; it must be
        # set before the first operator runs. It is undocumented and untested on Ascend, so only
        # the CPU gets it; set it to 0 to opt out.
        os.environ.setdefault("MS_DEV_HOST_BLOCKING_RUN", "1")
    # Warnings of its own about operators and deprecations would bury what the run has to say.
    os.environ.setdefault("GLOG_v", "3")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import mindspore as ms

    ascend = ms.hal.is_available("Ascend")
    if target == "Ascend" and not ascend:
        raise ConfigError(
            "train.device_target: MindSpore finds no Ascend device here; install CANN and its "
            "driver, or use --device_target CPU"
        )
    chosen = "Ascend" if ascend and target != "CPU" else "CPU"
    ms.set_device(chosen)
    # Compiled parts are marked as such; the rest runs eagerly either way.
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return chosen


def on_ascend() -> bool:
    """Whether MindSpore computes on an Ascend device."""
    import mindspore as ms

    return ms.get_current_device().device_target == "Ascend"
