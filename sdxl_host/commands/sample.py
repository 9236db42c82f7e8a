"""`sdxl-host sample`: pictures from a checkpoint, with the plugins it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from sdxl_host.commands.parser import Parser
from sdxl_host.errors import ConfigError, DataError

__all__ = ["sample"]


def sample(arguments: Sequence[str]) -> int:
    """Draws pictures as the arguments say; returns the exit code."""
    parser = Parser(prog="sdxl-host sample", description="Draw pictures from a checkpoint.")
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR",
                        help="a folder below checkpoints/ of a run")  # fmt: skip
    parser.add_argument("--prompt", required=True, action="append", help="give it once a picture")
    parser.add_argument("--steps", type=int, default=25, help="sampling steps [25]")
    parser.add_argument("--guidance_scale", type=float, default=5.0, help="1: no guidance [5.0]")
    parser.add_argument("--seed", type=int, default=42, help="seed of the noise [42]")
    parser.add_argument("--out", type=Path, default=Path("grid.png"), help="PNG file [grid.png]")
    options = parser.parse_args(list(arguments))
    if options.steps < 1:
        raise ConfigError(f"--steps {options.steps}: must be at least 1")
    if options.seed < 0:
        raise ConfigError(f"--seed {options.seed}: must be at least 0")
    if not 0 <= options.guidance_scale < float("inf"):
        raise ConfigError(f"--guidance_scale {options.guidance_scale}: must be at least 0")
    if options.out.suffix.lower() != ".png":
        raise ConfigError(f"--out {options.out}: must end with .png")
    try:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        is_new = not options.out.exists()
        with open(options.out, "ab"):
            pass
        if is_new:
            options.out.unlink()  # only to see that it can be written
    except OSError as error:
        raise DataError(f"--out {options.out}: can't be written ({error.strerror})") from error

    from sdxl_host.device import prepare_device

    prepare_device()
    from sdxl_host.sampling.grid import save_grid
    from sdxl_host.sampling.restore import restore_sampler

    sampler, notes = restore_sampler(options.checkpoint)
    for note in notes:
        print(note, flush=True)
    pixels = sampler.draw(options.prompt, options.steps, options.guidance_scale, options.seed)
    save_grid(options.out, pixels, options.prompt)
    print(f"pictures    {options.out}")
    return 0
