"""`sdxl-host sample`: images from a checkpoint with its plugins, or from a file of weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_host.commands.flags import Command
from sdxl_host.commands.image_file import check_out, unwritable
from sdxl_host.commands.printer import show
from sdxl_host.errors import ConfigError
from sdxl_host.settings.declarations import MAX_SEED
from sdxl_host.settings.options import option

if TYPE_CHECKING:
    from sdxl_host.config.load import RunConfig
    from sdxl_host.sampling.pipeline import ImageSampler

__all__ = ["sample"]

_CONFIG = "configs/inference/sd_xl_base.yaml"


@dataclass
class Flags:
    """The flags of `sdxl-host sample`. None is what the help has in brackets."""

    checkpoint: Path | None = option(None, help="a folder below checkpoints/ of a run")
    weight: str | None = option(None, help="a file or folder of weights, as for training")
    config: str | None = option(None, help=f"the model of --weight [{_CONFIG}]")
    use_ema: bool | None = option(None, help="draw from a checkpoint's EMA [where it keeps one]")
    prompt: list[str] = option([], help="what to draw; given once for each image")
    negative_prompt: str | None = option(
        None, help="what guidance leads away from [zero embedding]"
    )
    steps: int = option(25, help="sampling steps", minimum=1)
    guidance_scale: float = option(5.0, help="1: no guidance", minimum=0.0)
    sampler: str = option("auto", help="euler, euler_a, heun or dpmpp_2m; auto: the model's own")
    spacing: str = option("auto", help="trailing, karras or edm; auto: the model's own")
    seed: int = option(42, help="seed of the noise", minimum=0, maximum=MAX_SEED)
    size: str | None = option(
        None, help="HxW, height and width of an image [what the model was trained on]"
    )
    original_size: str | None = option(
        None, help="HxW of the image before resizing, a condition of the network"
    )
    crop_top_left: str | None = option(
        None, help="TxL, where the image was cropped, a condition of the network [0x0]"
    )
    target_size: str | None = option(
        None, help="HxW of the image, a condition of the network [its size]"
    )
    aesthetic_score: float | None = option(None, help="for a model with that condition [6.0]")
    negative_aesthetic_score: float | None = option(
        None, help="the same for the images without prompt that guidance leads away from [2.5]"
    )
    out: Path = option(Path("grid.png"), help="PNG file")


_COMMAND = Command(
    "sample",
    "Draws images from a checkpoint, or from a file of weights.",
    Flags,
    rest="arguments of sdxl-host train",
    notes="With --checkpoint the model and its plugins are those it was trained with. With "
    "--weight the model is that of --config, and whatever else `sdxl-host train` understands may "
    "follow: --plugins edm, --edm_sigma_data 0.5, model.params... = value, --ms_mode 1.",
)


def sample(arguments: Sequence[str]) -> int:
    """Draws images as the arguments say; returns the exit code."""
    return _COMMAND.run(arguments, _sample)


def _sample(flags: Flags, rest: list[str]) -> int:
    conditions = _conditions(flags)
    _check(flags, rest)

    from sdxl_host.sampling.samplers import none_if_auto

    sampler, facts = _sampler(flags, rest, conditions)
    show(*facts, *_cut_notes(flags, rest))
    pixels = sampler.draw(
        flags.prompt,
        flags.steps,
        flags.guidance_scale,
        flags.seed,
        negative_prompt=flags.negative_prompt,
        sampler=none_if_auto(flags.sampler),
        spacing=none_if_auto(flags.spacing),
    )
    from sdxl_host.sampling.grid import save_grid

    try:
        save_grid(flags.out, pixels, flags.prompt)
    except OSError as error:
        raise unwritable(flags.out, error) from error
    show(("images", str(flags.out)))
    return 0


def _conditions(flags: Flags) -> dict[str, Any]:
    """The fields of `Conditions` that the flags give."""
    given: dict[str, Any] = {}
    for name in ("size", "original_size", "crop_top_left", "target_size"):
        text = getattr(flags, name)
        if text is not None:
            first, _, second = text.lower().partition("x")
            if not (first.isdigit() and second.isdigit()):
                raise ConfigError(f"--{name} {text}: must be two numbers, such as 1024x1024")
            given[name] = int(first), int(second)
    for name in ("aesthetic_score", "negative_aesthetic_score"):
        if getattr(flags, name) is not None:
            given[name] = getattr(flags, name)
    return given


def _check(flags: Flags, rest: Sequence[str]) -> None:
    """Raises HostError for what needs no model to be seen as wrong."""
    from sdxl_host.errors import did_you_mean
    from sdxl_host.sampling.samplers import AUTO, SAMPLERS, SPACINGS

    if not flags.prompt:
        raise ConfigError("--prompt: is missing; give what to draw, once for each image")
    if flags.weight == "":
        raise ConfigError("--weight: is empty; give a file or folder of weights")
    if (flags.checkpoint is None) == (flags.weight is None):
        raise ConfigError("sample: give either --checkpoint DIR or --weight PATH")
    if flags.checkpoint is not None:
        if flags.config is not None:
            raise ConfigError("--config: a checkpoint has its own; leave it out")
        if rest:
            name = rest[0].removeprefix("--").partition("=")[0]
            near = did_you_mean(name, Flags.__dataclass_fields__)
            raise ConfigError(
                f"{rest[0]}: not understood{near}; with --checkpoint the model's settings are "
                "those it was trained with (sdxl-host sample --help lists what may be given)"
            )
    elif flags.use_ema is not None:
        raise ConfigError(
            "--use_ema: chooses between the weights of a --checkpoint; leave it out with --weight"
        )
    for flag, value, known in (
        ("sampler", flags.sampler, [AUTO, *SAMPLERS]),
        ("spacing", flags.spacing, [AUTO, *SPACINGS]),
    ):
        if value not in known:
            raise ConfigError(
                f"--{flag} {value}: must be one of {', '.join(known)}{did_you_mean(value, known)}"
            )
    for flag in ("negative_prompt", "negative_aesthetic_score"):
        if getattr(flags, flag) is not None and flags.guidance_scale == 1.0:
            raise ConfigError(
                f"--{flag}: has no effect at --guidance_scale 1; raise the scale or leave it out"
            )
    for word in rest:
        _check_for_training(word)
    check_out(flags.out)


def _check_for_training(word: str) -> None:
    """Raises ConfigError for a setting of training that drawing has no use for."""
    from sdxl_host.settings.declarations import FLAGS, SCHEMAS, SETTINGS

    name = word.partition("=")[0]
    if name.startswith("--"):
        name = name[2:].replace("-", "_")
        is_of_training, setting = name in FLAGS, FLAGS.get(name)
    else:
        is_of_training, setting = name.partition(".")[0] in SCHEMAS, SETTINGS.get(name)
    if is_of_training and not (setting and setting.for_drawing):
        raise ConfigError(
            f"{word}: is a setting of training and has no effect here; sdxl-host sample --help "
            "lists what may be given"
        )


def _cut_notes(flags: Flags, rest: Sequence[str]) -> list[tuple[str, str]]:
    """What is cut off of the prompts. Asked of hooks of their own, because to be asked may change a
    plugin's state."""
    from sdxl_host.planning.captions import caption_lengths, cut_note
    from sdxl_host.plugins.hooks import make_hooks
    from sdxl_host.training.summary import longer_prompts

    config = _config(flags, rest)
    hooks = make_hooks(config.plugins)
    encoders = hooks.build_model(config.tree).encoders
    prompts = [*flags.prompt, *([flags.negative_prompt] if flags.negative_prompt else [])]
    lengths = caption_lengths(hooks, encoders, [(_short(prompt), [prompt]) for prompt in prompts])
    encoder = hooks.chain("encode_prompt")
    # The plugins of a checkpoint are those that it was trained with.
    remedy = longer_prompts(encoder) if flags.checkpoint is None else "shorten the prompt"
    return [("note", note) for note in cut_note(lengths, "prompts", encoder, remedy)]


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."


def _config(flags: Flags, rest: Sequence[str]) -> RunConfig:
    """The settings of the model that draws."""
    if flags.checkpoint is not None:
        from sdxl_host.checkpoints.layout import CONFIG_FILE
        from sdxl_host.config.load import restore

        return restore(flags.checkpoint.expanduser().resolve() / CONFIG_FILE)
    from sdxl_host.config.load import load_model

    return load_model(["--config", flags.config or _CONFIG, *rest, "--weight", flags.weight or ""])


def _sampler(
    flags: Flags, rest: Sequence[str], conditions: dict[str, Any]
) -> tuple[ImageSampler, list[tuple[str, str]]]:
    """The sampler that the flags describe, and rows that describe it."""
    from sdxl_host.device import prepare_device

    if flags.checkpoint is not None:
        prepare_device()
        from sdxl_host.sampling.load import restore_sampler

        return restore_sampler(flags.checkpoint, flags.use_ema, **conditions)

    from sdxl_host.config.load import image_size

    config = _config(flags, rest)
    prepare_device(config.train.device_target)
    from sdxl_host.sampling.load import weight_sampler
    from sdxl_host.sampling.pipeline import Conditions

    size = image_size(config)
    sampler, rows = weight_sampler(config, Conditions(size, size), **conditions)
    return sampler, [*rows, *(("note", notice) for notice in config.notices)]
