"""The typed sections of the config, and the flags that set them.

`model` is the engine's (see `engine`); `plugins` holds each plugin's own options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sdxl_host.options import option

__all__ = ["FLAG_HOMES", "NOT_YET", "SCHEMAS", "DataSettings", "OptimSettings", "TrainSettings"]


@dataclass
class TrainSettings:
    """`train`: the run itself. Each field is a flag of the same name."""

    weight: str = option(
        "",
        help="weights to start from: a .safetensors file, a diffusers folder, a MindSpore .ckpt or "
        "a checkpoint folder; several with commas between, a later one goes before",
    )
    seed: int = option(42, help="seed of all randomness", minimum=0, maximum=2**64 - 1)
    save_path: str = option("./runs", help="folder that runs are written to")
    save_path_with_time: bool = option(True, help="a folder named by date and time for each run")
    resume: str = option("", help="continue a run: a checkpoint folder, or `latest`")
    log_interval: int = option(1, help="steps between lines in metrics.jsonl", minimum=1)
    save_ckpt_interval: int = option(1000, help="steps between checkpoints", minimum=1)
    clip_grad: bool = option(False, help="clip gradients by their global norm")
    max_grad_norm: float = option(1.0, help="the norm that clip_grad clips to", above=0.0)
    sample_interval: int = option(
        0, help="steps between picture grids; 0: only at the end", minimum=0
    )
    sample_prompts: list[str] = option(
        [], help="prompts of the grids; none: the first captions of the data"
    )
    sample_count: int = option(8, help="pictures in a grid without sample_prompts", minimum=1)
    sample_steps: int = option(20, help="sampling steps of the grids", minimum=1)
    guidance_scale: float = option(3.0, help="classifier-free guidance of the grids", minimum=0.0)
    negative_prompt: str = option(
        "", help="what the grids' guidance leads away from; empty: the zero embedding"
    )
    sampler: Literal["auto", "euler", "euler_a", "heun", "dpmpp_2m"] = option(
        "auto", help="sampler of the grids; auto: the model's own"
    )
    spacing: Literal["auto", "trailing", "karras", "edm"] = option(
        "auto", help="noise levels of the grids; auto: the model's own"
    )
    ms_mode: int = option(0, help="0: compiled steps; 1: eager (PyNative)", minimum=0, maximum=1)
    ms_amp_level: Literal["O0", "O2", "O3"] = option(
        "O0", help="O0: float32; O2: float16 but for norms and SiLU; O3: float16 throughout"
    )
    device_target: Literal["auto", "CPU", "Ascend"] = option(
        "auto", help="auto: Ascend where MindSpore has one, else CPU"
    )


@dataclass
class DataSettings:
    """`data`: what is learned from, how much at once, and for how long."""

    dataset_config: dict[str, Any] = option({}, help="target and params of the dataset")
    per_batch_size: int = option(1, help="samples of one device in a step", minimum=1)
    total_step: int = option(100000, help="steps of the run, one optimizer update each", minimum=1)
    num_parallel_workers: int = option(2, help="threads that load pictures", minimum=1)
    python_multiprocessing: bool = option(
        False, help="processes instead of threads; only False so far"
    )
    shuffle: bool = option(True, help="a new order in every epoch")


@dataclass
class OptimSettings:
    """`optim`: the update."""

    base_learning_rate: float = option(1e-5, help="learning rate after warm-up", above=0.0)
    optimizer_config: dict[str, Any] = option({}, help="target and params of the optimizer")
    scheduler_config: dict[str, Any] | None = option(
        None, help="target and params of the learning-rate schedule; none: constant"
    )


# The sections whose keys are known beforehand.
SCHEMAS: dict[str, type] = {"train": TrainSettings, "data": DataSettings, "optim": OptimSettings}

# Flags whose home is not `train`.
FLAG_HOMES = {
    "data_path": "data.dataset_config.params.data_path",
    "per_batch_size": "data.per_batch_size",
    "total_step": "data.total_step",
}

# Flags of the training guide whose part is not built: the one value each may have, and what it is.
NOT_YET: dict[str, tuple[tuple[str, ...], str]] = {
    "task": (("train", "txt2img"), "caching"),
    "cache_latent": (("False",), "caching"),
    "cache_text_embedding": (("False",), "caching"),
    "cache_path": ((), "caching"),
    "gradient_accumulation_steps": (("1",), "gradient accumulation"),
    "use_ema": (("False",), "averaging of weights"),
    "scale_lr": (("False",), "scaling of the learning rate by the batch"),
    "max_device_memory": ((), "a limit of device memory"),
    "is_parallel": (("False",), "training on several devices"),
    "data_sink": (("False",), "data sink"),
    "sink_size": ((), "data sink"),
    "sink_queue_size": ((), "data sink"),
    "resume_step": (("0",), "resuming by step (use --resume DIR or --resume latest)"),
    "optimizer_weight": ((), "resuming from single files (use --resume DIR or --resume latest)"),
    "save_optimizer": (("True",), "checkpoints without the optimizer's state"),
    "param_fp16": (("False",), "weights in float16"),
}
