"""Derive CLIP's vocabulary and tokenizer settings from its list of merges.

    python scripts/build_clip_vocabulary.py            # rewrite the JSON files beside merges.txt
    python scripts/build_clip_vocabulary.py --check    # exit with 1 if they are out of date

`merges.txt` is the one file that was learned; everything else follows from it. The ids are

    0     .. 255     the 256 bytes, each as a visible character, in CLIP's order
    256   .. 511     the same, ending a word ("</w>")
    512   .. 49405   what each merge makes, in the order of the merges
    49406, 49407     <|startoftext|>, <|endoftext|>

Standard library only. `transformers.CLIPTokenizer.from_pretrained(folder)` reads the folder
offline; given `vocab_file=` and `merges_file=`, transformers 5 silently has an empty vocabulary.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent.parent / "sdxl_host" / "models" / "clip_tokenizer"
START = "<|startoftext|>"
END = "<|endoftext|>"
WORD_END = "</w>"
MERGES = 48_894
CONTEXT_LENGTH = 77


def byte_symbols() -> list[str]:
    """Return the character that stands for each of the 256 bytes, in the order of CLIP's ids.

    Bytes that Latin-1 shows as ink come first and stand for themselves; the other 68 (controls,
    spaces, the soft hyphen) take the code points from 256 on, so that no symbol is whitespace and a
    merge can be written as two words on a line.
    """
    inked = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), 256)]
    return [chr(byte) for byte in inked] + [chr(256 + i) for i in range(256 - len(inked))]


def read_merges(path: Path) -> list[str]:
    """Return what each merge of `path` makes, e.g. "th" for the line "t h".

    Raises:
        ValueError: the file has no version header, or not CLIP's number of merges of two parts.
    """
    header, *lines = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    if not header.startswith("#version"):
        raise ValueError(f"{path} begins with {header!r}, not '#version': restore CLIP's file")
    pairs = [line.split(" ") for line in lines]
    if len(pairs) != MERGES or any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{path} is not {MERGES} lines of two symbols: restore CLIP's file")
    return ["".join(pair) for pair in pairs]


def build_vocabulary(merges: list[str]) -> dict[str, int]:
    """Return {symbol: id}, in the order of the ids."""
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + WORD_END for symbol in symbols), *merges, START, END]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    if len(vocabulary) != len(tokens):
        raise ValueError("two merges make the same symbol: merges.txt is not CLIP's file")
    return vocabulary


def build_files(merges_file: Path) -> dict[str, str]:
    """Return {file name: text} of all that is derived from `merges_file`."""
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": CONTEXT_LENGTH,
        "do_lower_case": True,
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
    }
    # Written without spaces and escapes, the vocabulary is a fifth smaller than json's default.
    vocabulary = json.dumps(
        build_vocabulary(read_merges(merges_file)), ensure_ascii=False, separators=(",", ":")
    )
    return {
        "vocab.json": vocabulary + "\n",
        "tokenizer_config.json": json.dumps(settings, indent=2) + "\n",
    }


def main() -> int:
    """Run the command line; return the exit code."""
    parser = argparse.ArgumentParser(description="Derive CLIP's vocabulary from its merges.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if a file is out of date"
    )
    check: bool = parser.parse_args().check
    stale = 0
    for name, text in build_files(FOLDER / "merges.txt").items():
        path = FOLDER / name
        if not check:
            path.write_text(text, encoding="utf-8", newline="\n")
        elif not path.is_file() or path.read_text(encoding="utf-8") != text:
            stale += 1
            print(f"{path} is out of date: run scripts/build_clip_vocabulary.py", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
