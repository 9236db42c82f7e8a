"""`sdxl-host cache`, and what `plan` and `train` refuse of a cache alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import cache as small

from sdxl_host.cli import main
from sdxl_host.config.load import load
from sdxl_host.training import data_sink

pytestmark = pytest.mark.usefixtures("device", "here")

# A plugin that answers encode_prompt, and how often it did is in its state.
COUNTING = """
from sdxl_host import hookimpl

class Fake:
    seen = 0

    @hookimpl(wrapper=True)
    def encode_prompt(self):
        encoded = yield
        self.seen += 1
        return encoded

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]
"""


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one line that a command says when it ends with exit code 2."""
    capsys.readouterr()
    assert main(list(words)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line.removeprefix("sdxl-host: error: ")


@pytest.mark.parametrize("command", ["plan", "train", "cache"])
def test_an_encoder_that_keeps_state_is_refused_by_name(
    site: Any, capsys: Any, command: str
) -> None:
    site.add("counting", source=COUNTING)
    words = [command, "--config", small.TINY, "--plugins", "counting"]
    said = refused(capsys, *words, "--cache_text_embedding", "True")
    assert said.startswith("--cache_text_embedding True: the plugin counting keeps state")
    assert not any(Path.cwd().iterdir())


@pytest.mark.parametrize("command", ["plan", "train"])
def test_the_data_sink_needs_kept_latents(
    monkeypatch: pytest.MonkeyPatch, capsys: Any, command: str
) -> None:
    monkeypatch.setattr(data_sink, "on_ascend", lambda: True)
    words = [command, "--config", small.TINY, small.AUTOENCODER, "--data_sink", "True"]
    words += ["data.total_step=10", "train.ms_mode=0", f"{small.NETWORK}.in_channels=4"]
    words += [f"{small.NETWORK}.out_channels=4"]
    said = refused(capsys, *words)
    assert "make them with sdxl-host cache and read them with --cache_latent True" in said
    assert not any(Path.cwd().iterdir())
    if command == "plan":
        assert main([*words, "--cache_latent", "True"]) == 0


@pytest.mark.parametrize("command", ["plan", "train"])
def test_the_data_sink_is_refused_on_a_cpu(capsys: Any, command: str) -> None:
    said = refused(capsys, command, "--config", small.TINY, "--data_sink", "True")
    assert "the queue is an Ascend device's, and this run is on the CPU" in said


def test_task_is_given_once(capsys: Any) -> None:
    assert refused(capsys, "cache", "--task", "train") == "--task: given twice; give it once"


def test_a_cache_path_that_nothing_reads_is_named() -> None:
    notices = load(["--config", small.TINY, "--cache_path", "kept"]).notices
    assert notices == (
        "train.cache_path has no effect: cache_latent and cache_text_embedding are off",
    )
    assert load(["--config", small.TINY, "--cache_path", "kept", "--cache_latent"]).notices == ()
