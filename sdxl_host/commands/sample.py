"""`sdxl-host sample`: images from a checkpoint with its plugins, or from a file of weights."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_host.commands.parser import Parser
from sdxl_host.errors import ConfigError, DataError

if TYPE_CHECKING:
    from sdxl_host.sampling.pipeline import ImageSampler

__all__ = ["sample"]

_CONFIG = "configs/inference/sd_xl_base.yaml"
_EPILOG = """\
With --checkpoint the model and its plugins are those it was trained with. With --weight the model
is that of --config, and whatever else `sdxl-host train` understands may follow: --plugins edm,
--edm_sigma_data 0.5, model.params... = value, --ms_mode 1.
"""


def sample(arguments: Sequence[str]) -> int:
    """Draws images as the arguments say; returns the exit code."""
    options, rest = _parser().parse_known_args(list(arguments))
    _check(options, rest)

    from sdxl_host.sampling.samplers import none_if_auto

    sampler, notes = _sampler(options, rest)
    for note in notes:
        print(note, flush=True)
    pixels = sampler.draw(
        options.prompt,
        options.steps,
        options.guidance_scale,
        options.seed,
        negative_prompt=options.negative_prompt,
        sampler=none_if_auto(options.sampler),
        spacing=none_if_auto(options.spacing),
    )
    from sdxl_host.sampling.grid import save_grid

    try:
        save_grid(options.out, pixels, options.prompt)
    except OSError as error:
        raise _unwritable(options.out, error) from error
    print(f"images      {options.out}")
    return 0


def _parser() -> Parser:
    parser = Parser(
        prog="sdxl-host sample",
        description="Draw images from a checkpoint, or from a file of weights.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--checkpoint", type=Path, metavar="DIR", help="a folder below checkpoints/ of a run")
    add("--weight", metavar="PATH", help="a file or folder of weights, as for training")
    add("--config", metavar="FILE", help=f"the model of --weight [{_CONFIG}]")
    add("--use_ema", type=_truth, metavar="BOOL",
        help="draw from a checkpoint's EMA [where it keeps one]")  # fmt: skip
    add("--prompt", required=True, action="append", help="give it once an image")
    add("--negative_prompt", metavar="TEXT", help="what guidance leads away from [zero embedding]")
    add("--steps", type=int, default=25, help="sampling steps [25]")
    add("--guidance_scale", type=float, default=5.0, help="1: no guidance [5.0]")
    add("--sampler", default="auto", metavar="NAME",
        help="euler, euler_a, heun or dpmpp_2m [the model's own]")  # fmt: skip
    add("--spacing", default="auto", metavar="NAME",
        help="trailing, karras or edm [the model's own]")  # fmt: skip
    add("--seed", type=int, default=42, help="seed of the noise [42]")
    add("--size", type=_pair, metavar="HxW",
        help="height and width of an image [what the model was trained on]")  # fmt: skip
    add("--original_size", type=_pair, metavar="HxW",
        help="what the network is told the image's size was before resizing")  # fmt: skip
    add("--crop_top_left", type=_pair, metavar="TxL",
        help="where the network is told the image was cropped [0x0]")  # fmt: skip
    add("--target_size", type=_pair, metavar="HxW",
        help="what the network is told the image's size is [its size]")  # fmt: skip
    add("--aesthetic_score", type=float, metavar="S", help="for a model with that condition [6.0]")
    add("--negative_aesthetic_score", type=float, metavar="S", help="the same without prompt [2.5]")
    add("--out", type=Path, default=Path("grid.png"), help="PNG file [grid.png]")
    return parser


def _truth(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be True or False")
    return text.lower() == "true"


def _pair(text: str) -> tuple[int, int]:
    first, _, second = text.lower().partition("x")
    if not (first.isdigit() and second.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} must be two numbers, such as 1024x1024")
    return int(first), int(second)


def _check(options: argparse.Namespace, rest: Sequence[str]) -> None:
    """Raises HostError for what needs no model to be seen as wrong."""
    from sdxl_host.errors import did_you_mean
    from sdxl_host.sampling.samplers import AUTO, SAMPLERS, SPACINGS

    if options.weight == "":
        raise ConfigError("--weight: is empty; give a file or folder of weights")
    if (options.checkpoint is None) == (options.weight is None):
        raise ConfigError("sample: give either --checkpoint DIR or --weight PATH")
    if options.checkpoint is not None:
        if options.config is not None:
            raise ConfigError("--config: a checkpoint has its own; leave it out")
        if rest:
            raise ConfigError(
                f"{rest[0]}: not understood; with --checkpoint the model's settings are its own "
                "(sdxl-host sample --help lists what may be given)"
            )
    elif options.use_ema is not None:
        raise ConfigError(
            "--use_ema: chooses between the weights of a --checkpoint; leave it out with --weight"
        )
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: must be at least 1")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: must be at least 0")
    if not 0 <= options.guidance_scale < float("inf"):
        raise ConfigError(f"--guidance_scale {options.guidance_scale}: must be at least 0")
    for flag, value, known in (
        ("sampler", options.sampler, [AUTO, *SAMPLERS]),
        ("spacing", options.spacing, [AUTO, *SPACINGS]),
    ):
        if value not in known:
            raise ConfigError(
                f"--{flag} {value}: must be one of {', '.join(known)}{did_you_mean(value, known)}"
            )
    for flag in ("negative_prompt", "negative_aesthetic_score"):
        if getattr(options, flag) is not None and options.guidance_scale == 1.0:
            raise ConfigError(
                f"--{flag}: has no effect at --guidance_scale 1; raise the scale or leave it out"
            )
    for word in rest:
        _check_for_training(word)
    _check_out(options.out)


def _check_for_training(word: str) -> None:
    """Raises ConfigError for a setting of training that drawing has no use for."""
    from sdxl_host.settings.schema import FLAGS, SCHEMAS, SETTINGS, UNBUILT

    name = word.partition("=")[0]
    if name.startswith("--"):
        name = name[2:].replace("-", "_")
        is_of_training, setting = name in {*FLAGS, *UNBUILT}, FLAGS.get(name)
    else:
        is_of_training, setting = name.partition(".")[0] in SCHEMAS, SETTINGS.get(name)
    if is_of_training and not (setting and setting.for_drawing):
        raise ConfigError(
            f"{word}: is a setting of training and has no effect here; sdxl-host sample --help "
            "lists what may be given"
        )


def _check_out(out: Path) -> None:
    """Sees that the image can be written before it is drawn."""
    from sdxl_host.files.atomic import check_writable

    if out.suffix.lower() != ".png":
        raise ConfigError(f"--out {out}: must end with .png")
    try:
        check_writable(out)
    except OSError as error:
        raise _unwritable(out, error) from error


def _unwritable(out: Path, error: OSError) -> DataError:
    return DataError(f"--out {out}: can't be written ({error.strerror}); give another place")


def _sampler(
    options: argparse.Namespace, rest: Sequence[str]
) -> tuple[ImageSampler, Sequence[str]]:
    """The sampler that the arguments describe, and lines that say what it is."""
    names = (
        "size", "original_size", "crop_top_left", "target_size",
        "aesthetic_score", "negative_aesthetic_score",
    )  # fmt: skip
    told: dict[str, Any] = {
        name: getattr(options, name) for name in names if getattr(options, name) is not None
    }

    from sdxl_host.device import prepare_device

    if options.checkpoint is not None:
        prepare_device()
        from sdxl_host.sampling.load import restore_sampler

        return restore_sampler(options.checkpoint, options.use_ema, **told)

    from sdxl_host.config.load import image_size, load_model

    config = load_model(["--config", options.config or _CONFIG, *rest, "--weight", options.weight])
    prepare_device(config.train.device_target)
    from sdxl_host.sampling.load import weight_sampler
    from sdxl_host.sampling.pipeline import Conditions

    size = image_size(config)
    sampler, lines = weight_sampler(config, Conditions(size, size), **told)
    return sampler, [*lines, *(f"note        {notice}" for notice in config.notices)]
