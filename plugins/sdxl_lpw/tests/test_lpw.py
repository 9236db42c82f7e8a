"""Long prompts: chunks by hand in both conventions, prompt weights, and what must not change."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from sdxl_host import PromptEmbedding, TextEncoders, encode_truncated
from sdxl_host.testing import HostError, TinyHooks, make_options, tiny_hooks

from sdxl_lpw import LongPrompts, Options
from sdxl_lpw.chunks import cut, kept_positions
from sdxl_lpw.weights import parse_weights


class FakeEncoder:
    """A word is a token, "t7" has id 7; hidden states are causal, as CLIP's are.

    `calls` keeps the ids of each call.
    """

    begin, end = 1000, 1001

    def __init__(self, pad: int, width: int, pooled_width: int, length: int = 77) -> None:
        self.pad, self.width, self.pooled_width, self.length = pad, width, pooled_width, length
        self.calls: list[np.ndarray] = []

    def tokenize(self, text: str) -> list[int]:
        words = text.split()
        return [int(w[1:]) if w[1:].isdigit() else sum(map(ord, w)) % 900 + 50 for w in words]

    def encode(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
        self.calls.append(ids)
        past = np.cumsum(ids, axis=1) / np.arange(1, self.length + 1)
        channels = np.arange(1, self.width + 1)
        hidden = 0.3 + np.sin(0.37 * ids[..., None] * channels + 0.01 * past[..., None])
        if not self.pooled_width:
            return hidden.astype(np.float32), None
        at_end = hidden[np.arange(len(ids)), (ids == self.end).argmax(axis=1)]
        return hidden.astype(np.float32), at_end[:, : self.pooled_width].astype(np.float32)


def two_encoders(length: int = 77) -> TextEncoders:
    """Like SDXL's: the first pads with the end token and has no pooled output."""
    return TextEncoders([FakeEncoder(1001, 3, 0, length), FakeEncoder(0, 5, 4, length)])


def run(options: Options | None = None) -> TinyHooks:
    return tiny_hooks(LongPrompts(options or Options()))


def encode(
    prompts: list[str], encoders: TextEncoders | None = None, **options: Any
) -> tuple[PromptEmbedding, TextEncoders]:
    encoders = encoders or two_encoders()
    return run(Options(**options)).encode_prompt(prompts, encoders), encoders


def words(count: int, first: int = 1) -> str:
    return " ".join(f"t{first + i}" for i in range(count))


# ---- what must not change

FITTING = ["", "t1", "a cat (on a mat:1.3) [sic] BREAK \\(x\\)", words(74), words(75)]


def test_a_prompt_that_fits_77_tokens_keeps_its_ids_and_its_embedding() -> None:
    ours, long = encode(FITTING)
    plain_encoders = two_encoders()
    plain = encode_truncated(FITTING, plain_encoders)
    for encoder, reference in zip(long, plain_encoders, strict=True):
        first_chunks = encoder.calls[0].reshape(len(FITTING), 3, 77)[:, 0]
        assert np.array_equal(first_chunks, reference.calls[0])
        assert encoder.calls[0].dtype == reference.calls[0].dtype
    assert np.array_equal(ours.context[:, :77], plain.context)
    assert np.array_equal(ours.pooled, plain.pooled)
    assert ours.mask is not None
    assert ours.mask[:, :77].all()
    assert not ours.mask[:, 77:].any()


def test_a_prompt_is_encoded_the_same_whatever_stands_beside_it() -> None:
    together, _ = encode(["t1 (t2:1.5)", words(200)], prompt_weights=True)
    alone, _ = encode(["t1 (t2:1.5)"], prompt_weights=True)
    assert np.array_equal(together.context[:1], alone.context)
    assert np.array_equal(together.pooled[:1], alone.pooled)


def test_each_encoder_is_called_once_with_one_shape() -> None:
    for prompts in (["", "t1"], [words(80), words(500)]):
        _, encoders = encode(prompts)
        for encoder in encoders:
            assert [ids.shape for ids in encoder.calls] == [(6, 77)]


# ---- chunks


def test_chunks_by_hand() -> None:
    """Five positions: begin, three tokens, end; pads come after the end."""
    encoder = FakeEncoder(pad=0, width=3, pooled_width=0, length=5)
    chunks = cut([[(words(4), 1.0)]], encoder, count=3)
    assert chunks.ids.tolist() == [
        [1000, 1, 2, 3, 1001],
        [1000, 4, 1001, 0, 0],
        [1000, 1001, 0, 0, 0],
    ]
    assert chunks.used == 2
    assert chunks.lost == 0
    assert (chunks.weights == 1).all()


@pytest.mark.parametrize(
    ("pad", "ids"),
    [
        # CLIP-L pads with the end token, bigG with 0; 150 tokens fill two chunks to the last place.
        (1001, [[1000, 1, 2, 3, 1001], [1000, 4, 5, 6, 1001], [1000, 1001, 1001, 1001, 1001]]),
        (0, [[1000, 1, 2, 3, 1001], [1000, 4, 5, 6, 1001], [1000, 1001, 0, 0, 0]]),
    ],
)
def test_a_full_chunk_ends_with_the_end_token(pad: int, ids: list[list[int]]) -> None:
    """Both conventions: a padding chunk is an empty prompt, not padding alone."""
    encoder = FakeEncoder(pad=pad, width=3, pooled_width=0, length=5)
    assert cut([[(words(6), 1.0)]], encoder, count=3).ids.tolist() == ids


@pytest.mark.parametrize(
    ("prompt", "lost"),
    [
        (words(6), 0),
        (words(7), 1),
        (words(20), 14),
        ("t1 BREAK t2 BREAK t3 t4", 2),
        ("BREAK BREAK t3 BREAK t4 t5 t6 t7", 5),
        (words(6) + " BREAK", 0),
    ],
)
def test_how_many_tokens_are_cut_off(prompt: str, lost: int) -> None:
    encoder = FakeEncoder(pad=0, width=3, pooled_width=0, length=5)
    assert cut(parse_weights(prompt), encoder, count=2).lost == lost


def test_the_context_s_table_of_positions_by_hand() -> None:
    """Chunks of two tokens: which id's hidden state stands at each place of the context."""

    def table(convention: str) -> list[int]:
        encoder = FakeEncoder(pad=0, width=3, pooled_width=0, length=4)
        ids = cut([[(words(3), 1.0)]], encoder, count=3).ids
        return ids.ravel()[kept_positions(convention, 3, 4)].tolist()

    assert table("a1111") == [1000, 1, 2, 1001, 1000, 3, 1001, 0, 1000, 1001, 0, 0]
    # The end token of a chunk that is not full is inner, and stays; the last position closes.
    assert table("kohya") == [1000, 1, 2, 3, 1001, 1001, 0, 0]


@pytest.mark.parametrize(
    ("tokens", "used"), [(0, 1), (1, 1), (75, 1), (76, 2), (150, 2), (151, 3), (225, 3), (500, 3)]
)
def test_how_many_chunks_a_prompt_fills(tokens: int, used: int) -> None:
    ours, encoders = encode([words(tokens)])
    assert ours.mask is not None
    assert ours.context.shape == (1, 231, 8)
    assert ours.mask.sum() == 77 * used
    assert ours.mask[0, : 77 * used].all()
    kept = [i for row in encoders[1].calls[0] for i in row if i not in (0, 1000, 1001)]
    assert kept == list(range(1, min(tokens, 225) + 1))


def test_a_long_prompt_s_chunks_are_encoded_as_prompts_of_their_own() -> None:
    ours, _ = encode([words(100)])
    plain = encode_truncated([words(75), words(25, first=76)], two_encoders())
    assert np.array_equal(ours.context[0, :154], plain.context.reshape(154, 8))
    assert np.array_equal(ours.pooled[0], plain.pooled[0])


def test_the_mask_covers_the_encoder_with_the_most_chunks() -> None:
    encoders = two_encoders(length=5)
    encoders[0].tokenize = lambda text: [1, 2, 3, 4]
    encoders[1].tokenize = lambda text: [1]
    ours, _ = encode(["x"], encoders)
    assert ours.mask is not None
    assert ours.mask.tolist() == [[True] * 10 + [False] * 5]


def test_positions_kept_by_kohya_by_hand() -> None:
    assert kept_positions("kohya", 3, 5).tolist() == [0, 1, 2, 3, 6, 7, 8, 11, 12, 13, 14]
    assert kept_positions("a1111", 2, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert [len(kept_positions("kohya", n, 77)) for n in (1, 2, 3)] == [77, 152, 227]


def test_kohya_drops_inner_specials_and_attends_everything() -> None:
    ours, _ = encode([words(100)], convention="kohya")
    assert ours.mask is None
    assert ours.context.shape == (1, 227, 8)
    pieces = [words(75), words(25, first=76), ""]
    chunk = encode_truncated(pieces, two_encoders()).context
    assert np.array_equal(ours.context[0, 0], chunk[0, 0])
    for index in range(3):
        inner = slice(1 + 75 * index, 76 + 75 * index)
        assert np.array_equal(ours.context[0, inner], chunk[index, 1:76])
    assert np.array_equal(ours.context[0, 226], chunk[2, 76])


def test_kohya_with_one_chunk_is_the_host_s_encoding() -> None:
    ours, _ = encode(FITTING, convention="kohya", max_embeddings_multiples=1)
    assert np.array_equal(ours.context, encode_truncated(FITTING, two_encoders()).context)


def test_break_starts_a_chunk_and_pads_the_one_before() -> None:
    encoder = FakeEncoder(pad=0, width=3, pooled_width=0, length=5)
    chunks = cut(parse_weights("t1 BREAK t2 BREAK BREAK t3 BREAK"), encoder, count=5)
    assert chunks.ids[:, 1:4].tolist() == [
        [1, 1001, 0],
        [2, 1001, 0],
        [1001, 0, 0],
        [3, 1001, 0],
        [1001, 0, 0],
    ]
    assert chunks.used == 4
    assert cut(parse_weights("t1 BREAK"), encoder, count=5).used == 1
    single = FakeEncoder(pad=0, width=3, pooled_width=0, length=3)
    assert cut(parse_weights("t1 BREAK t2"), single, count=5).used == 2
    assert cut(parse_weights(""), encoder, count=5).used == 1


# ---- what the weights do


def test_a_weight_belongs_to_its_tokens_and_specials_weigh_one() -> None:
    encoder = FakeEncoder(pad=0, width=3, pooled_width=0, length=5)
    chunks = cut(parse_weights("t1 (t2 t3 t4:1.5) t5"), encoder, count=3)
    assert chunks.weights.tolist() == [
        [1, 1, 1.5, 1.5, 1],
        [1, 1.5, 1, 1, 1],
        [1, 1, 1, 1, 1],
    ]


def test_kohya_multiplies_the_hidden_states() -> None:
    prompt = "t1 (t2:1.5) " + words(80, first=3)
    ours, _ = encode([prompt], convention="kohya", prompt_weights=True)
    plain, _ = encode([prompt.replace("(t2:1.5)", "t2")], convention="kohya")
    expected = plain.context.copy()
    expected[0, 2] *= np.float32(1.5)
    assert np.array_equal(ours.context, expected)


def test_a1111_multiplies_and_then_restores_each_encoder_s_mean() -> None:
    prompts = ["t1 (t2:1.5) " + words(80, first=3), "[t9] t8", "t4"]
    ours, _ = encode(prompts, prompt_weights=True)
    plain, _ = encode(["t1 t2 " + words(80, first=3), "t9 t8", "t4"])
    assert ours.mask is not None
    assert np.array_equal(ours.mask, plain.mask)
    weights = np.ones((3, 231, 1))
    weights[0, 2], weights[1, 1] = 1.5, 1 / 1.1
    for channels in (slice(0, 3), slice(3, 8)):
        for sample in range(3):
            attended = ours.mask[sample]
            got = ours.context[sample, attended, channels].astype(float)
            was = plain.context[sample, attended, channels].astype(float)
            assert got.mean() == pytest.approx(was.mean(), rel=1e-6)
            weighted = was * weights[sample, attended]
            np.testing.assert_allclose(got, weighted * was.mean() / weighted.mean(), rtol=2e-6)
    assert np.array_equal(ours.context[2], plain.context[2])
    assert ours.context.dtype == np.float32


def test_the_pooled_vector_is_never_weighted() -> None:
    for convention in ("a1111", "kohya"):
        ours, _ = encode(["t1 (t2:1.5)"], convention=convention, prompt_weights=True)
        assert np.array_equal(ours.pooled, encode_truncated(["t1 t2"], two_encoders()).pooled)


def test_a_mean_of_zero_is_left_alone() -> None:
    encoders = two_encoders(length=3)
    for encoder in encoders:
        encoder.encode = lambda ids, e=encoder: (
            np.zeros((len(ids), 3, e.width), np.float32),
            np.zeros((len(ids), 4), np.float32) if e.pooled_width else None,
        )
    ours, _ = encode(["(t1:2)"], encoders, prompt_weights=True)
    assert not ours.context.any()


# ---- what is cut off, told


class Trainer:
    """The part of the host's trainer that observers see."""

    def __init__(self, total_steps: int) -> None:
        self.step, self.total_steps = 0, total_steps
        self.logged: dict[str, float] = {}

    def log(self, name: str, value: float) -> None:
        self.logged[name] = value


def test_each_step_logs_what_was_cut_in_it(caplog: pytest.LogCaptureFixture) -> None:
    hooks, trainer = run(), Trainer(total_steps=3)

    def step(*batches: list[str]) -> tuple[dict[str, float], list[str]]:
        caplog.clear()
        for batch in batches:
            hooks.encode_prompt(batch, two_encoders())
        trainer.step += 1
        trainer.logged = {}
        hooks.on_step_end(trainer, None)
        return trainer.logged, [record.getMessage() for record in caplog.records]

    # Two micro-batches of one step; a prompt of exactly 225 tokens is whole.
    logged, said = step([words(226), words(225), "t1"], [words(300), ""])
    assert logged == {"lpw_cut_prompts": 2, "lpw_cut_tokens": 76}
    assert said == [
        "lpw: 1 of 3 prompts do not fit 3 chunks and lose up to 1 tokens; shorten them or raise "
        "max_embeddings_multiples (said once)"
    ]
    assert step(["t1"]) == ({"lpw_cut_prompts": 0, "lpw_cut_tokens": 0}, [])
    logged, said = step([words(230)])
    assert logged == {"lpw_cut_prompts": 1, "lpw_cut_tokens": 5}
    assert said == ["lpw: 3 prompts of this run were cut, by 81 tokens in all"]


def test_nothing_cut_is_nothing_said(caplog: pytest.LogCaptureFixture) -> None:
    hooks, trainer = run(Options(max_embeddings_multiples=4)), Trainer(total_steps=1)
    hooks.encode_prompt([words(300), ""], two_encoders())
    trainer.step = 1
    hooks.on_step_end(trainer, None)
    assert trainer.logged == {"lpw_cut_prompts": 0, "lpw_cut_tokens": 0}
    assert not caplog.records


def test_sampling_says_it_too(caplog: pytest.LogCaptureFixture) -> None:
    """No step ends there; a negative prompt is a call of its own."""
    hooks, encoders = run(), two_encoders()
    hooks.encode_prompt(["t1"], encoders)
    assert not caplog.records
    hooks.encode_prompt([words(240), words(240)], encoders)
    (record,) = caplog.records
    assert "2 of 2 prompts do not fit 3 chunks and lose up to 15 tokens" in record.getMessage()
    assert record.levelname == "WARNING"
    hooks.encode_prompt([words(240)], encoders)
    assert len(caplog.records) == 1


def test_it_is_said_once_though_two_steps_cut_the_same(caplog: pytest.LogCaptureFixture) -> None:
    hooks, trainer = run(), Trainer(total_steps=9)
    hooks.encode_prompt([words(240)], two_encoders())
    hooks.on_step_end(trainer, None)
    for _ in range(2):
        hooks.encode_prompt([words(240)], two_encoders())
    assert len(caplog.records) == 1


def test_the_encoder_that_loses_most_counts() -> None:
    encoders, hooks, trainer = two_encoders(length=5), run(), Trainer(total_steps=9)
    encoders[0].tokenize = lambda text: list(range(1, 12))
    encoders[1].tokenize = lambda text: list(range(1, 15))
    hooks.encode_prompt(["x"], encoders)
    hooks.on_step_end(trainer, None)
    assert trainer.logged == {"lpw_cut_prompts": 1, "lpw_cut_tokens": 5}


def test_counting_changes_no_embedding() -> None:
    hooks, trainer = run(), Trainer(total_steps=9)
    prompts = [words(300), "t1"]
    first = hooks.encode_prompt(prompts, two_encoders())
    hooks.on_step_end(trainer, None)
    again = hooks.encode_prompt(prompts, two_encoders())
    assert np.array_equal(first.context, again.context)
    assert np.array_equal(first.pooled, again.pooled)
    assert hooks.state_dict() == {}


@pytest.mark.parametrize("convention", ["a1111", "kohya"])
def test_a_negative_prompt_has_the_shape_of_a_prompt(convention: Any) -> None:
    """Guidance stacks both, so a short one and a long one must come out alike."""
    prompt, _ = encode([words(200)], convention=convention)
    negative, _ = encode([""], convention=convention)
    assert prompt.context.shape == negative.context.shape
    assert prompt.attended().shape == negative.attended().shape
    assert not np.array_equal(prompt.context, negative.context)


# ---- in a run, and its options


def test_it_claims_the_hook() -> None:
    assert run().chain("encode_prompt") == "lpw"
    assert run(Options(convention="kohya", prompt_weights=True)).describe() == [
        "lpw (sdxl-lpw 0.1.0): claims encode_prompt, observes on_step_end"
    ]


def test_every_option_has_an_effect() -> None:
    prompt = ["(t1:1.5) " + words(100)]
    default, _ = encode(prompt)
    longer, _ = encode(prompt, max_embeddings_multiples=4)
    kohya, _ = encode(prompt, convention="kohya")
    weighted, _ = encode(prompt, prompt_weights=True)
    lengths = [e.context.shape[1] for e in (default, longer, kohya, weighted)]
    assert lengths == [231, 308, 227, 231]
    assert not np.array_equal(default.context, weighted.context)


def test_notes_tell_options_that_do_nothing() -> None:
    for convention in ("a1111", "kohya"):
        idle = Options(max_embeddings_multiples=1, convention=convention)
        assert run(idle).notes() == [
            "lpw: does nothing: max_embeddings_multiples is 1 and prompt_weights is off"
        ]
        prompts = [*FITTING, words(100)]
        ours, _ = encode(prompts, max_embeddings_multiples=1, convention=convention)
        plain = encode_truncated(prompts, two_encoders())
        assert np.array_equal(ours.context, plain.context)
        assert ours.attended().all()
    assert run().notes() == []
    assert run(Options(max_embeddings_multiples=1, prompt_weights=True)).notes() == []


def test_options_come_from_a_config_section() -> None:
    assert make_options(LongPrompts, {}) == Options(3, "a1111", False)
    values = {"max_embeddings_multiples": 1, "convention": "kohya", "prompt_weights": True}
    assert make_options(LongPrompts, values) == Options(1, "kohya", True)
    bad_values = [
        ("max_embeddings_multiples", 0),
        ("max_embeddings_multiples", 1.5),
        ("convention", "compel"),
        ("prompt_weights", 1),
    ]
    for key, bad in bad_values:
        with pytest.raises(HostError, match=rf"plugins\.lpw\.{key}"):
            make_options(LongPrompts, {key: bad})
