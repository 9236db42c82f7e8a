"""The command line: arguments in, a command called; nothing heavy is imported before its time."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from sdxl_host.errors import HostError
from sdxl_host.version import __version__

__all__ = ["main"]

_COMMANDS = {
    "train": "train a model; with no arguments, a small one on the images the package carries",
    "plan": "show what a training would be, without training: settings, curves, captions, memory",
    "sample": "draw images from a checkpoint",
    "convert": "write weights in another format or precision",
    "plugins": "list the installed plugins",
    "new-plugin": "write the package of a new plugin, ready to install and test",
    "doctor": "look at this machine and installation, and say what to mend",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `sdxl-host ARGUMENTS`; returns the exit code: 0, or 2 for what the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except HostError as error:
        # One line, whatever the lines of a plugin's or a library's own message that it quotes.
        told = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        print(f"sdxl-host: error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("sdxl-host: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone; Python's own flush at exit must not complain again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"sdxl-host {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help"):
        print(_help())
        return 0
    command, rest = words[0], words[1:]
    if command == "train":
        from sdxl_host.commands.train import train

        return train(rest)
    if command == "plan":
        from sdxl_host.commands.plan import plan

        return plan(rest)
    if command == "sample":
        from sdxl_host.commands.sample import sample

        return sample(rest)
    if command == "convert":
        from sdxl_host.commands.convert import convert

        return convert(rest)
    if command == "plugins":
        from sdxl_host.commands.plugins import plugins

        return plugins(rest)
    if command == "new-plugin":
        from sdxl_host.commands.new_plugin import new_plugin

        return new_plugin(rest)
    if command == "doctor":
        from sdxl_host.commands.doctor import doctor

        return doctor(rest)
    from sdxl_host.errors import ConfigError, did_you_mean

    raise ConfigError(
        f"{command}: there is no such command{did_you_mean(command, _COMMANDS)} "
        f"(commands: {', '.join(_COMMANDS)})"
    )


def _help() -> str:
    lines = [
        "usage: sdxl-host COMMAND ...",
        "",
        "Fine-tune Stable Diffusion XL with MindSpore; what is learned is a matter of plugins.",
        "",
        "commands:",
        *(f"  {name:<11} {text}" for name, text in _COMMANDS.items()),
        "",
        "sdxl-host COMMAND --help tells more; sdxl-host --version gives the version.",
    ]
    return "\n".join(lines)
