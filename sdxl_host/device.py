"""MindSpore's state, set once before anything of it runs."""

from __future__ import annotations

import ctypes
import os
import platform
import re
import warnings

from sdxl_host.errors import ConfigError

__all__ = [
    "ascend_generation",
    "has_bfloat16",
    "limit_memory",
    "on_ascend",
    "prepare_cpu_environment",
    "prepare_device",
]

# Environment variables for MindSpore's CPU backend alone; a value that the user has set stands.
_CPU_ENVIRONMENT = {
    # Without it MindSpore's main thread waits by spinning and takes a whole core. "0" opts out.
    "MS_DEV_HOST_BLOCKING_RUN": "1",
    # Where a CPU has AVX-512, oneDNN inside MindSpore 2.10 computes convolutions by its reference
    # loops, a hundred times slower than with AVX2. "DEFAULT" opts out.
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}


def prepare_cpu_environment() -> tuple[str, ...]:
    """Sets what MindSpore's CPU backend should find in the environment; returns what was not there.

    It must run before MindSpore's first operator. `prepare_device` calls it; a program that imports
    MindSpore in another way calls it itself.
    """
    added = tuple(name for name in _CPU_ENVIRONMENT if name not in os.environ)
    for name in added:
        os.environ[name] = _CPU_ENVIRONMENT[name]
    return added


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
    added = () if target == "Ascend" else prepare_cpu_environment()
    _flush_subnormals()
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
    if chosen == "Ascend":
        for name in added:  # MindSpore reads them when its first operator runs, which is later
            del os.environ[name]
    ms.set_device(chosen)
    # Compiled parts are marked as such; the rest runs eagerly either way.
    ms.set_context(mode=ms.PYNATIVE_MODE)
    return chosen


def _flush_subnormals() -> None:
    """Numbers below 1e-38 become 0 in this thread and in those it starts from now on.

    On x86 MindSpore's own threads do it, and the one that calls them would not. How many of them an
    operator uses it tries out, by the clock, so without this two equal runs could differ.
    """
    import numpy as np

    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return
    for kind in (np.float32, np.float64):
        np.finfo(kind)  # kept by NumPy, which warns where it can't find subnormal numbers later
    library = ctypes.CDLL(None)
    environment = (ctypes.c_uint32 * 8)()  # fenv_t; its last word is the register MXCSR
    library.fegetenv(environment)
    environment[7] |= 0x8040  # results and operands: FTZ and DAZ
    library.fesetenv(environment)


def on_ascend() -> bool:
    """Whether MindSpore computes on an Ascend device."""
    import mindspore as ms

    return ms.get_current_device().device_target == "Ascend"


def limit_memory(most: str) -> None:
    """Lets MindSpore take at most this much of the device's memory, such as "59GB"; "" sets none.

    Before anything runs there. Raises ConfigError for a text that is no size above 0, and on the
    CPU, whose memory MindSpore does not limit.
    """
    if not most:
        return
    if not re.fullmatch(r"[0-9]+(\.[0-9]+)?GB", most) or float(most.removesuffix("GB")) == 0:
        raise ConfigError(f"--max_device_memory {most}: is no size above 0; write it as 59GB")
    if not on_ascend():
        raise ConfigError(
            f"--max_device_memory {most}: limits an Ascend device, and this run is on the CPU; "
            "leave it out"
        )
    import mindspore as ms

    ms.runtime.set_memory(max_size=most)


def has_bfloat16() -> bool:
    """Whether the device computes in bfloat16: Ascend from 910B on; not the CPU, nor older ones."""
    return on_ascend() and ascend_generation() not in ("ascend910", "ascend310", "ascend310p")


def ascend_generation() -> str:
    """What MindSpore calls the chip, such as "ascend910b"; empty where there is none."""
    from mindspore._c_expression import MSContext

    return MSContext.get_instance().get_ascend_soc_version()
