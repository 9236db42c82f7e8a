"""CLIP's byte-pair tokenizer, offline, from the files the package carries."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["tokenize"]

FOLDER = Path(__file__).parent / "clip_tokenizer"


@cache
def _tokenizer() -> Any:
    # A late import: it takes over a second. Not CLIPTokenizer(vocab_file=...), which transformers
    # 5 answers with an empty vocabulary and no error.
    # Its advice that a deep-learning framework is missing does not apply to a tokenizer.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(FOLDER), local_files_only=True)


def tokenize(text: str) -> list[int]:
    """Ids of `text` in CLIP's vocabulary of 49,408, any number, without the special tokens."""
    return _tokenizer()(text, add_special_tokens=False, truncation=False, verbose=False)[
        "input_ids"
    ]
