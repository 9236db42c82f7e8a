"""The typed sections of the config, and the flags that set them.

`model` is the engine's (see `engine`); `plugins` holds each plugin's own options.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from sdxl_host.settings.options import option

__all__ = [
    "FLAG_HOMES",
    "NOT_YET",
    "OLD_FLAGS",
    "SCHEMAS",
    "DataSettings",
    "OptimSettings",
    "TrainSettings",
]


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
    allow_changes: bool = option(
        False, help="resume although settings or plugins differ; the differences are named"
    )
    resume_step: int = option(
        0, help="continue from --weight CHECKPOINT, which must be of this step", minimum=0
    )
    optimizer_weight: str = option(
        "", help="the optimizer's state to continue with: that of the checkpoint in --weight"
    )
    log_interval: int = option(1, help="steps between lines in metrics.jsonl", minimum=1)
    save_ckpt_interval: int = option(1000, help="steps between checkpoints", minimum=1)
    max_num_ckpt: int = option(0, help="checkpoints kept, the newest; 0: all of them", minimum=0)
    save_optimizer: bool = option(
        True, help="False: checkpoints of weights alone, which can't be resumed"
    )
    gradient_accumulation_steps: int = option(
        1, help="batches of per_batch_size whose gradients make one update", minimum=1
    )
    scale_lr: bool = option(
        False, help="multiply the learning rate by the global batch: samples in an update"
    )
    use_ema: bool = option(
        False, help="keep a moving average of the weights; images are drawn from it"
    )
    ema_decay: float = option(
        0.9999, help="of use_ema, reached as (1 + k) / (10 + k) grows", minimum=0.0, maximum=1.0
    )
    clip_grad: bool = option(False, help="clip gradients by their global norm")
    max_grad_norm: float = option(1.0, help="the norm that clip_grad clips to", above=0.0)
    sample_interval: int = option(
        0, help="steps between image grids; 0: only at the end", minimum=0
    )
    sample_prompts: list[str] = option(
        [], help="prompts of the grids; none: the first captions of the data"
    )
    sample_count: int = option(8, help="images in a grid without sample_prompts", minimum=1)
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
    ms_amp_level: Literal["O0", "O1", "O2", "O3"] = option(
        "O0",
        help="O0: float32; O1: products in float16; O2: float16 but for norms and SiLU; "
        "O3: float16 throughout",
    )
    ms_amp_dtype: Literal["float16", "bfloat16"] = option(
        "float16", help="what stands for float16 in ms_amp_level; bfloat16 needs no loss scale"
    )
    param_fp16: bool = option(
        False, help="keep weights in 16 bits, but for norms; updates are made on float32 copies"
    )
    jit_level: Literal["O0", "O1"] = option(
        "O0", help="MindSpore's optimization of compiled steps; O1 fuses more and compiles longer"
    )
    compile_cache: str = option(
        "", help="folder to keep compiled graphs in, so that the same run starts at once"
    )
    max_device_memory: str = option(
        "", help="most memory that MindSpore takes of an Ascend device, such as 59GB"
    )
    is_parallel: bool = option(
        False, help="share each update among the workers that msrun has started"
    )
    data_sink: bool = option(
        False, help="run sink_size steps a call from a queue on an Ascend device"
    )
    sink_size: int = option(10, help="steps in a call of data_sink", minimum=1)
    sink_queue_size: int = option(
        -1, help="steps whose data the queue of data_sink holds; -1: MindSpore's own", minimum=-1
    )
    device_target: Literal["auto", "CPU", "Ascend"] = option(
        "auto", help="auto: Ascend where MindSpore has one, else CPU"
    )


@dataclass
class DataSettings:
    """`data`: what is learned from, how much at once, and for how long."""

    dataset_config: dict[str, Any] = option({}, help="target and params of the dataset")
    per_batch_size: int = option(1, help="samples of one device in a batch", minimum=1)
    total_step: int = option(100000, help="steps of the run, one optimizer update each", minimum=1)
    num_parallel_workers: int = option(2, help="threads that load images", minimum=1)
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
}

# Flags of the old trainer that have no place here, and what to do instead.
_CLOUD = "files are not copied to or from a cloud here; copy them yourself and give their paths"
OLD_FLAGS = {
    "version": "the config says what model it is; leave it out",
    "sd_xl_base_ratios": "images are drawn at the size of the data; leave it out",
    "save_ckpt_only_rank_zero": "no other rank writes here; leave it out",
    "dataset_load_tokenizer": "captions become tokens with their embeddings here; leave it out",
    "max_embeddings_multiples": "it is the plugin's here; use --lpw_max_embeddings_multiples",
    "infer_during_train": "images are drawn every so many steps; use --sample_interval",
    "infer_interval": "images are drawn every so many steps; use --sample_interval",
    "ms_enable_graph_kernel": "it was for GPUs, which this program does not run on; leave it out",
    "ms_enable_allreduce_fusion": "workers exchange each gradient by itself; leave it out",
    "overflow_still_update": "gradients that are not finite are never applied; leave it out",
    "dynamic_shape": "all images of a run have one size here; leave it out",
    "parallel_mode": "workers share the data of an update; use --is_parallel True",
    "enable_modelarts": _CLOUD,
    "ckpt_url": _CLOUD,
    "train_url": _CLOUD,
    "multi_data_url": _CLOUD,
    "pretrain_url": _CLOUD,
    "ckpt_dir": _CLOUD,
}
