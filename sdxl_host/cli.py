"""The command line: arguments in, a command called; nothing heavy is imported before its time."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from sdxl_host.errors import ConfigError, HostError, did_you_mean
from sdxl_host.version import __version__

__all__ = ["main"]

# Each command's function, as "module:function", and its line in the help.
_COMMANDS = {
    "train": (
        "sdxl_host.commands.train:train",
        "train a model; with no arguments, a small one on the images the package carries",
    ),
    "plan": (
        "sdxl_host.commands.plan:plan",
        "show what a training would be, without training: settings, curves, captions, memory",
    ),
    "data": (
        "sdxl_host.commands.data:data",
        "look at a folder of images: sizes, captions, what can't be used",
    ),
    "cache": (
        "sdxl_host.commands.cache:cache",
        "make the latents and embeddings that a training reads from a cache",
    ),
    "sample": ("sdxl_host.commands.sample:sample", "draw images from a checkpoint"),
    "convert": (
        "sdxl_host.commands.convert:convert",
        "write weights in another format or precision",
    ),
    "plugins": ("sdxl_host.commands.plugins:plugins", "list the installed plugins"),
    "new-plugin": (
        "sdxl_host.commands.new_plugin:new_plugin",
        "write the package of a new plugin, ready to install and test",
    ),
    "doctor": (
        "sdxl_host.commands.doctor:doctor",
        "look at this machine and installation, and say what to mend",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs `sdxl-host ARGUMENTS`; returns the exit code: 0, or 2 for what the user can mend."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(words)
    except HostError as error:
        # One line, also where a plugin's or a library's message of several lines is quoted.
        message = " ".join(line.strip() for line in str(error).splitlines() if line.strip())
        print(f"sdxl-host: error: {message}", file=sys.stderr)
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
    name, rest = words[0], words[1:]
    if name not in _COMMANDS:
        raise ConfigError(
            f"{name}: there is no such command{did_you_mean(name, _COMMANDS)} "
            f"(commands: {', '.join(_COMMANDS)})"
        )
    module, _, function = _COMMANDS[name][0].partition(":")
    return getattr(import_module(module), function)(rest)


def _help() -> str:
    lines = [
        "usage: sdxl-host COMMAND ...",
        "",
        "Fine-tune Stable Diffusion XL with MindSpore; what is learned is a matter of plugins.",
        "",
        "commands:",
        *(f"  {name:<11} {text}" for name, (_, text) in _COMMANDS.items()),
        "",
        "sdxl-host COMMAND --help shows its flags; sdxl-host --version gives the version.",
    ]
    return "\n".join(lines)
