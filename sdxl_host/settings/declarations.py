"""Every setting of the sections `train`, `data` and `optim`, each declared once with its facts.

`model` is what `config.model_section` makes of it; `plugins` holds the options of each plugin.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sdxl_host.errors import ConfigError
from sdxl_host.settings.facts import Needs, Setting, setting, settings_of

__all__ = [
    "FLAGS",
    "MAX_SEED",
    "SCHEMAS",
    "SETTINGS",
    "CaptionLines",
    "DataSettings",
    "OptimSettings",
    "TrainSettings",
]

CaptionLines = Literal["whole", "first_line", "one_of_lines"]

MAX_SEED = 2**64 - 1  # the key of the random numbers has 64 bits for it

_COMPILED = Needs(lambda train: train.ms_mode == 0, "ms_mode 1 compiles nothing", "use --ms_mode 0")
_CACHE = Needs(
    lambda train: train.task == "cache" or train.cache_latent or train.cache_text_embedding,
    "cache_latent and cache_text_embedding are off",
)


@dataclass
class TrainSettings:
    """`train`: the run itself. Each field is a flag of the same name too."""

    weight: str = setting(
        "",
        help="weights to start from: a .safetensors file, a diffusers folder, a MindSpore .ckpt or "
        "a checkpoint folder; several with commas between, a later one goes before",
        touches="start",
        path="weights",
    )
    seed: int = setting(
        42, help="seed of all randomness", minimum=0, maximum=MAX_SEED, touches="numbers"
    )
    save_path: str = setting(
        "./runs",
        help="folder that runs are written to",
        touches="start",
        path="a folder",
        needs=Needs(
            lambda train: not train.continues_elsewhere, "a resumed run goes on in its own folder"
        ),
    )
    save_path_with_time: bool = setting(
        True, help="a folder named by date and time for each run", touches="start"
    )
    resume: str = setting(
        "",
        help="continue a run: a checkpoint folder, or `latest`",
        touches="start",
        path="a checkpoint folder, or `latest`",
    )
    allow_changes: bool = setting(
        False,
        help="resume although settings or plugins differ; the differences are named",
        touches="start",
        needs=Needs(
            lambda train: not train.allow_changes or train.continues,
            "no run is resumed",
            "use --resume latest",
        ),
    )
    resume_step: int = setting(
        0,
        help="continue from --weight CHECKPOINT, which must be of this step",
        minimum=0,
        touches="start",
    )
    optimizer_weight: str = setting(
        "",
        help="the optimizer's state to continue with: that of the checkpoint in --weight",
        touches="start",
        path="the optimizer's state",
    )
    log_interval: int = setting(
        1, help="steps between lines in metrics.jsonl", minimum=1, touches="display"
    )
    save_ckpt_interval: int = setting(
        1000, help="steps between checkpoints", minimum=1, touches="display"
    )
    max_num_ckpt: int = setting(
        0, help="checkpoints kept, the newest; 0: all of them", minimum=0, touches="display"
    )
    save_optimizer: bool = setting(
        True, help="False: checkpoints of weights alone, which can't be resumed", touches="display"
    )
    gradient_accumulation_steps: int = setting(
        1,
        help="batches of per_batch_size whose gradients make one update",
        minimum=1,
        touches="numbers",
    )
    scale_lr: bool = setting(
        False,
        help="multiply the learning rate by the global batch: samples in an update",
        touches="numbers",
    )
    use_ema: bool = setting(
        False,
        help="keep an EMA of the weights; images are drawn from it",
        touches="numbers",
    )
    ema_decay: float = setting(
        0.9999,
        help="of use_ema, reached as (1 + k) / (10 + k) grows",
        minimum=0.0,
        maximum=1.0,
        touches="numbers",
        needs=Needs(lambda train: train.use_ema, "use_ema is off", "use --use_ema True"),
    )
    clip_grad: bool = setting(False, help="clip gradients by their global norm", touches="numbers")
    max_grad_norm: float = setting(
        1.0,
        help="the norm that clip_grad clips to",
        above=0.0,
        touches="numbers",
        needs=Needs(lambda train: train.clip_grad, "clip_grad is off"),
    )
    sample_interval: int = setting(
        0, help="steps between image grids; 0: only at the end", minimum=0, touches="display"
    )
    sample_prompts: list[str] = setting(
        [], help="prompts of the grids; none: the first captions of the data", touches="display"
    )
    sample_count: int = setting(
        8,
        help="images in a grid without sample_prompts",
        minimum=1,
        touches="display",
        needs=Needs(
            lambda train: not train.sample_prompts,
            "a grid shows the sample_prompts",
            "give as many prompts as images",
        ),
    )
    sample_steps: int = setting(
        20, help="sampling steps of the grids", minimum=1, touches="display"
    )
    guidance_scale: float = setting(
        3.0, help="classifier-free guidance of the grids", minimum=0.0, touches="display"
    )
    negative_prompt: str = setting(
        "",
        help="what the grids' guidance leads away from; empty: the zero embedding",
        touches="display",
        needs=Needs(
            lambda train: not train.negative_prompt or train.guidance_scale != 1,
            "guidance_scale 1 is no guidance",
            "use --guidance_scale 3",
        ),
    )
    sampler: Literal["auto", "euler", "euler_a", "heun", "dpmpp_2m"] = setting(
        "auto", help="sampler of the grids; auto: the model's own", touches="display"
    )
    spacing: Literal["auto", "trailing", "karras", "edm"] = setting(
        "auto", help="noise levels of the grids; auto: the model's own", touches="display"
    )
    ms_mode: int = setting(
        0,
        help="0: compiled steps; 1: eager (PyNative)",
        minimum=0,
        maximum=1,
        touches="graph",
        for_drawing=True,
    )
    ms_amp_level: Literal["O0", "O1", "O2", "O3"] = setting(
        "O0",
        help="O0: float32; O1: products in float16; O2: float16 but for norms and SiLU; "
        "O3: float16 throughout",
        touches="numbers",
        for_drawing=True,
    )
    ms_amp_dtype: Literal["float16", "bfloat16"] = setting(
        "float16",
        help="what stands for float16 in ms_amp_level; bfloat16 needs no loss scale",
        touches="numbers",
        for_drawing=True,
        needs=Needs(
            lambda train: train.ms_amp_level != "O0" or train.ms_amp_dtype == "bfloat16",
            "everything is float32 at ms_amp_level O0",
        ),
    )
    param_fp16: bool = setting(
        False,
        help="keep weights in 16 bits, but for norms; updates are made on float32 copies",
        touches="numbers",
    )
    jit_level: Literal["O0", "O1"] = setting(
        "O0",
        help="MindSpore's optimization of compiled steps; O1 fuses more and compiles longer",
        touches="graph",
        needs=_COMPILED,
    )
    compile_cache: str = setting(
        "",
        help="folder to keep compiled graphs in, so that the same run starts at once",
        touches="speed",
        needs=_COMPILED,
    )
    max_device_memory: str = setting(
        "",
        help="most memory that MindSpore takes of an Ascend device, such as 59GB",
        touches="speed",
    )
    is_parallel: bool = setting(
        False, help="share each update among the ranks that msrun has started", touches="graph"
    )
    task: Literal["train", "cache", "txt2img"] = setting(
        "train",
        help="train, or make what a cache lacks of the entries that training with these settings "
        "reads; txt2img is the old name of train",
        touches="start",
    )
    cache_latent: bool = setting(
        False,
        help="read latents from the cache, or make those alone with task cache; each image then "
        "has crops_per_image fixed crops, at least one",
        touches="numbers",
    )
    cache_text_embedding: bool = setting(
        False,
        help="read embeddings of captions from the cache, or make those alone with task cache",
        touches="speed",
    )
    cache_path: str = setting(
        "./cache_data",
        help="folder of the cache",
        touches="start",
        path="a folder",
        needs=_CACHE,
    )
    cache_dtype: Literal["float32", "float16"] = setting(
        "float32",
        help="what entries of the cache are kept in; an entry with a number that float16 can't "
        "hold stays float32",
        touches="numbers",
        needs=_CACHE,
    )
    data_sink: bool = setting(
        False, help="run sink_size steps a call from a queue on an Ascend device", touches="graph"
    )
    sink_size: int = setting(
        10,
        help="steps in a call of data_sink",
        minimum=1,
        touches="graph",
        needs=Needs(lambda train: train.data_sink, "data_sink is off"),
    )
    sink_queue_size: int = setting(
        -1,
        help="steps whose data the queue of data_sink holds; -1: MindSpore's own",
        minimum=-1,
        touches="speed",
        needs=Needs(lambda train: train.data_sink, "data_sink is off"),
    )
    device_target: Literal["auto", "CPU", "Ascend"] = setting(
        "auto",
        help="auto: Ascend where MindSpore has one, else CPU",
        touches="graph",
        for_drawing=True,
    )

    def __post_init__(self) -> None:
        if self.task == "txt2img":
            self.task = "train"
        if self.sink_queue_size == 0:
            raise ConfigError(
                "train.sink_queue_size: a queue of 0 steps holds nothing; give at least 1, or -1 "
                "for MindSpore's own size"
            )

    @property
    def continues(self) -> bool:
        """Whether the run goes on from a checkpoint of this program."""
        return bool(self.resume or self.resume_step or self.optimizer_weight)

    @property
    def continues_elsewhere(self) -> bool:
        """Whether the run that it continues lies outside `save_path`."""
        if not self.continues or self.resume == "latest":
            return False
        folder = Path(self.resume or self.weight).expanduser().resolve()
        return Path(self.save_path).expanduser().resolve() not in folder.parents


@dataclass
class DataSettings:
    """`data`: what is learned from, how much at once, and for how long."""

    dataset_config: dict[str, Any] = setting(
        {}, help="target and params of the dataset", touches="numbers"
    )
    per_batch_size: int = setting(
        1, help="samples of one device in a batch", minimum=1, touches="numbers", flag=True
    )
    total_step: int = setting(
        100000,
        help="steps of the run, one optimizer update each",
        minimum=1,
        touches="length",
        flag=True,
    )
    num_parallel_workers: int = setting(
        2, help="threads that load images", minimum=1, touches="speed"
    )
    python_multiprocessing: bool = setting(
        False, help="processes instead of threads; only False so far", touches="speed"
    )
    shuffle: bool = setting(True, help="a new order in every epoch", touches="numbers")
    resolution: int = setting(
        0,
        help="side of the images in pixels, in place of target_size and of what transforms are "
        "given; 0: as they say",
        minimum=0,
        touches="numbers",
        flag=True,
    )
    buckets: bool = setting(
        False,
        help="train each image at the aspect ratio of SDXL's that is nearest to its own, not "
        "cropped to a square",
        touches="numbers",
        flag=True,
    )
    captions: CaptionLines = setting(
        "whole",
        help="what is learned of a text: all of it, its first line, or in each step one line",
        touches="numbers",
        flag=True,
    )
    caption_prefix: str = setting(
        "", help="text put before every caption, as it is", touches="numbers", flag=True
    )
    caption_suffix: str = setting(
        "", help="text put behind every caption, as it is", touches="numbers", flag=True
    )
    shuffle_tags: bool = setting(
        False,
        help="put what stands between a caption's commas in a new order in every step",
        touches="numbers",
        flag=True,
    )
    keep_tags: int = setting(
        0,
        help="tags at a caption's beginning that shuffle_tags leaves in their place",
        minimum=0,
        touches="numbers",
        flag=True,
        needs=Needs(lambda data: data.shuffle_tags, "shuffle_tags is off"),
    )
    repeats: dict[str, int] = setting(
        {},
        help="how often an epoch holds the images of a folder below data_path, as cats: 3",
        touches="numbers",
    )
    max_bad_fraction: float = setting(
        0.01,
        help="share of the images that may be set aside because they can't be decoded; above it "
        "the run stops before training",
        minimum=0.0,
        maximum=1.0,
        touches="start",
    )
    crops_per_image: int = setting(
        0,
        help="random crops that an image has, of which a step takes one; 0: a new one every step",
        minimum=0,
        touches="numbers",
        flag=True,
    )

    def __post_init__(self) -> None:
        for folder, times in self.repeats.items():
            if times < 1:
                raise ConfigError(
                    f"data.repeats.{folder}: {times} is no number of times; give 1 or more, or "
                    "take the folder out of data_path"
                )
        if self.python_multiprocessing:
            raise ConfigError(
                "data.python_multiprocessing: True is not supported; images are loaded by "
                "data.num_parallel_workers threads, set it to False"
            )


@dataclass
class OptimSettings:
    """`optim`: the update."""

    base_learning_rate: float = setting(
        1e-5, help="learning rate after warm-up", above=0.0, touches="numbers"
    )
    optimizer_config: dict[str, Any] = setting(
        {}, help="target and params of the optimizer", touches="numbers"
    )
    scheduler_config: dict[str, Any] | None = setting(
        None,
        help="target and params of the learning-rate schedule; none: constant",
        touches="numbers",
    )


# The sections whose keys are known beforehand.
SCHEMAS: dict[str, type] = {"train": TrainSettings, "data": DataSettings, "optim": OptimSettings}

# The one flag that sets a key below a section's: a parameter of the dataset.
_DATA_PATH = Setting(
    key="data.dataset_config.params.data_path",
    type=str,
    default="",
    help="captioned images to learn from",
    touches="numbers",
    flag="data_path",
    path="a folder of images",
)

_DECLARED = [one for section, schema in SCHEMAS.items() for one in settings_of(section, schema)]

# Every setting by its key; every flag of `train` by its name, those of other sections first.
SETTINGS = {one.key: one for one in [_DATA_PATH, *_DECLARED]}
FLAGS = {
    one.flag: one
    for one in sorted(SETTINGS.values(), key=lambda one: one.key.startswith("train."))
    if one.flag
}
