"""The promise of a plugin on `encode_prompt`, as a function of a `Subject`; see `checks`."""

from __future__ import annotations

import numpy as np

from sdxl_host.diffusion.conditioning import PromptEmbedding
from sdxl_host.testing.parts import tiny_encoders
from sdxl_host.testing.subject import Subject

__all__ = ["PROMPTS", "check_encode_prompt"]

PROMPTS = (
    "",
    "a cat on a mat",
    "a photo of " + "a very " * 150 + "long prompt",
    "K\u00e4se, \u732b, \U0001f408 and (brackets:1.2) [too] \\( BREAK",
    "a cat on a mat",
)


def check_encode_prompt(subject: Subject) -> None:
    """What prompts become: an embedding of the encoders' widths in float32, and one that depends
    on the prompt alone."""
    hooks, encoders, prompts = subject.hooks(), tiny_encoders(), list(PROMPTS)
    first = hooks.encode_prompt(prompts, encoders)
    for name in ("context", "pooled"):
        array = getattr(first, name)
        if array.dtype != np.float32:
            raise subject.fault(
                f"encode_prompt gives a {name} of {array.dtype}",
                f"return {name}.astype(np.float32), as the encoders do",
            )
    attended = first.attended()
    again = hooks.encode_prompt(prompts, encoders)
    if not _same(first, again):
        raise subject.fault(
            "encode_prompt gives the same prompts another embedding the second time",
            "make it a pure function of the prompts, for images are drawn with it as well",
        )
    for row, prompt in enumerate(prompts):
        alone = hooks.encode_prompt([prompt], encoders)
        for told, mine, beside in (
            ("context", alone.context[0][alone.attended()[0]], first.context[row][attended[row]]),
            ("pooled", alone.pooled[0], first.pooled[row]),
        ):
            if mine.shape != beside.shape or not np.allclose(mine, beside, rtol=1e-5, atol=1e-6):
                raise subject.fault(
                    f"encode_prompt gives the prompt {_short(prompt)!r} another {told} alone than "
                    "beside others",
                    "let each prompt's embedding depend on that prompt only; what pads it to the "
                    "length of the others is masked",
                )


def _same(one: PromptEmbedding, other: PromptEmbedding) -> bool:
    return (
        np.array_equal(one.context, other.context)
        and np.array_equal(one.pooled, other.pooled)
        and np.array_equal(one.attended(), other.attended())
    )


def _short(prompt: str) -> str:
    return prompt if len(prompt) <= 40 else f"{prompt[:37]}..."
