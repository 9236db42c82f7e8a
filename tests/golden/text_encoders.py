"""Golden text encoders and tokenizer: transformers' CLIP."""

from pathlib import Path

import numpy as np
import torch
from deterministic import array
from loading import Arrays, load_weights
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

TOKENIZER_FOLDER = Path(__file__).resolve().parents[2] / "sdxl_host" / "models" / "clip_tokenizer"
BEGIN, END, CONTEXT_LENGTH = 49406, 49407, 77


def prompt_ids(label: str, lengths: list[int], pad: int) -> np.ndarray:
    """Ids (N, 77) int64: begin, `length` words, end, then padding up to the context length."""
    ids = np.full((len(lengths), CONTEXT_LENGTH), pad, dtype=np.int64)
    for row, length in enumerate(lengths):
        # A wide bell folded many times over is flat: any id that stands for a piece of a word.
        words = array(f"{label}.ids.{row}", (length,)) * 1e6 % BEGIN
        ids[row, : length + 2] = [BEGIN, *words.astype(np.int64), END]
    return ids


def clip_config(activation: str) -> CLIPTextConfig:
    """Small text transformer.

    Its end id must be 49407 for it to pool at the first end of text: with 2, the value in the
    published config files, transformers pools at the largest id instead.
    """
    return CLIPTextConfig(
        vocab_size=END + 1,
        hidden_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=256,
        max_position_embeddings=CONTEXT_LENGTH,
        hidden_act=activation,
        projection_dim=64,
        bos_token_id=BEGIN,
        eos_token_id=END,
        attn_implementation="eager",
    )


def golden_clip_l() -> Arrays:
    """CLIP ViT-L's text half, padded with the end id.

    `hidden` (4, 77, 64) is the output of the last layer but one, without the final norm.
    """
    ids = prompt_ids("clip_l", [5, 0, 40, 75], pad=END)
    model = CLIPTextModel(clip_config("quick_gelu"))
    # transformers 5 dropped this part of the names, in memory as well as in the files it saves.
    load_weights(model, "text_encoder/text_model.")
    with torch.no_grad():
        states = model(torch.from_numpy(ids), output_hidden_states=True).hidden_states
    return {"ids": ids, "hidden": states[-2].numpy()}


def golden_open_clip_g() -> Arrays:
    """OpenCLIP bigG's text half, padded with 0.

    `hidden` (4, 77, 64) as for CLIP-L; `pooled` (4, 64) is the final norm of the last layer at the
    first end of text, projected.
    """
    ids = prompt_ids("open_clip_g", [7, 0, 33, 75], pad=0)
    model = CLIPTextModelWithProjection(clip_config("gelu"))
    load_weights(model, "text_encoder_2/")
    with torch.no_grad():
        output = model(torch.from_numpy(ids), output_hidden_states=True)
    return {
        "ids": ids,
        "hidden": output.hidden_states[-2].numpy(),
        "pooled": output.text_embeds.numpy(),
    }


CAPTIONS = [
    "",
    "a photo of a cat",
    "A Photo Of A CAT",
    "  spaces   before, between \t and after  ",
    "two lines\nand a third\r\n\r\nafter an empty one",
    "it's what they're after; we've said I'd, you'll, I'm, don't, IT'S",
    'punctuation!!! (really?) [yes] {no} -- "quoted" ... #1 @home 50% a_b ~`^*+=|<>/',
    "\u201ccurly\u201d quotes, an ellipsis\u2026 and an em\u2014dash",
    "fish &amp; chips &lt;b&gt;",
    "1girl, 35mm f/1.8, 2024, 1,000,000, \u00bd, \u2163, x\u00b2",
    "caf\u00e9 na\u00efve \u00dcber stra\u00dfe \u00c5ngstr\u00f6m",
    "cafe\u0301 U\u0308ber, composed or not",
    "\u0432\u0435\u0447\u0435\u0440\u043d\u0438\u0439 \u0433\u043e\u0440\u043e\u0434",
    "\u4e00\u53ea\u732b\u5750\u5728\u6905\u5b50\u4e0a\uff0c\u6c34\u58a8\u753b",
    "\u732b\u306e\u5199\u771f \u30cd\u30b3 \uff21\uff22\uff11",
    "\u092c\u093f\u0932\u094d\u0932\u0940 \u0642\u0637\u0629 \u05d7\u05ea\u05d5\u05dc",
    "\U0001f600 smile \U0001f468\u200d\U0001f469\u200d\U0001f467 family \U0001f44d\U0001f3fd",
    "no\u00a0break, zero\u200bwidth, ideographic\u3000space",
    "supercalifragilisticexpialidocious antidisestablishmentarianism zzxqvkjw",
    "a very long caption of a lighthouse by the sea at dusk, " * 12,
    ", ".join(["word"] * 38),
    " ".join(["seventy"] * 75),
]


def golden_tokenizer() -> Arrays:
    """Ids (n, 77) int64 of captions, cut to 77 and padded with the end id, as CLIP-L has them."""
    tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER_FOLDER)
    encoded = tokenizer(CAPTIONS, padding="max_length", truncation=True, max_length=CONTEXT_LENGTH)
    return {"texts": np.array(CAPTIONS), "ids": np.array(encoded.input_ids, dtype=np.int64)}
