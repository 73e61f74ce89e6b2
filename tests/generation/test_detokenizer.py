"""Detokenizer: piece by piece equals all at once, for every family of decoders."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer_folders
from modelrig.generation.detokenizer import Detokenizer
from modelrig.generation.tokenizer import Tokenizer

VOCAB = 400


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    made = {}
    for name, make in tokenizer_folders.FAMILIES.items():
        folder = tmp_path_factory.mktemp(name)
        made[name] = Tokenizer.from_folder(tokenizer_folders.write(folder, make()), VOCAB)
    return made


def pieces(tokenizer, ids, **how):
    stream = Detokenizer(tokenizer, **how)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("family", tokenizer_folders.FAMILIES)
@given(data=st.data(), skip=st.booleans())
@settings(deadline=None, max_examples=150)
def test_the_pieces_together_are_the_text_of_all_ids(tokenizers, family, data, skip):
    tokenizer = tokenizers[family]
    some = st.integers(0, VOCAB - 1) | st.integers(0, min(12, tokenizer.vocab_size))
    ids = data.draw(st.lists(some, max_size=40))
    assert tokenizer.decode(ids, skip) == "".join(pieces(tokenizer, ids, skip_special_tokens=skip))


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_runs_of_byte_tokens_are_held_until_they_end(tokenizers, data):
    tokenizer = tokenizers["byte_fallback"]
    runs = st.one_of(st.text(max_size=3).map(lambda text: text.encode()), st.binary(max_size=5))
    ids = []
    for run in data.draw(st.lists(runs, max_size=8)):
        ids += [tokenizer.token_to_id(f"<0x{byte:02X}>") for byte in run]
        ids += data.draw(
            st.lists(st.sampled_from([tokenizer.token_to_id(token) for token in ("▁", "▁a", "b", "é", "</s>")]), max_size=2)
        )
    assert tokenizer.decode(ids) == "".join(pieces(tokenizer, ids))


@pytest.mark.parametrize("family", ["byte_level", "byte_fallback"])
@given(text=st.text(min_size=1, max_size=30))
@settings(deadline=None)
def test_no_half_character_is_ever_shown(tokenizers, family, text):
    tokenizer = tokenizers[family]
    ids = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(ids)
    shown = ""
    for piece in pieces(tokenizer, ids):
        shown += piece
        assert whole.startswith(shown)


def test_text_is_shown_as_soon_as_it_is_certain(tokenizers):
    tokenizer = tokenizers["byte_level"]
    ids = [tokenizer.token_to_id(token) for token in ("a", "Ã", "©", "Ġ", "b")]
    assert ["a", "", "é", " ", "b", ""] == pieces(tokenizer, ids)


def test_a_leading_space_is_dropped_once_and_not_in_every_piece(tokenizers):
    tokenizer = tokenizers["byte_fallback"]
    ids = [tokenizer.token_to_id(token) for token in ("▁a", "▁a", "▁", "▁a")]
    assert ["a", " a", " ", " a", ""] == pieces(tokenizer, ids)
    skipped = [tokenizer.token_to_id("<s>"), *ids]
    assert ["", "a", " a", " ", " a", ""] == pieces(tokenizer, skipped)


def test_an_unfinished_character_becomes_a_replacement_at_the_end(tokenizers):
    tokenizer = tokenizers["byte_level"]
    assert ["", "\ufffd"] == pieces(tokenizer, [tokenizer.token_to_id("Ã")])


def test_a_decoder_that_looks_at_the_whole_text_gives_it_at_the_end(tokenizers):
    tokenizer = tokenizers["across_tokens"]
    assert ["", "", "", "b!"] == pieces(tokenizer, [2, 1, 2])


@pytest.mark.parametrize("family", tokenizer_folders.FAMILIES)
@pytest.mark.parametrize("token", range(12))
def test_the_work_per_id_does_not_grow(tokenizers, family, token, monkeypatch):
    tokenizer = tokenizers[family]
    decoded = 0

    def counting(ids, skip_special_tokens=True):
        nonlocal decoded
        decoded += len(ids)
        return Tokenizer.decode(tokenizer, ids, skip_special_tokens)

    monkeypatch.setattr(tokenizer, "decode", counting)
    stream = Detokenizer(tokenizer)
    opening = tokenizer.encode("a", add_special_tokens=False)
    for one in [*opening, *[token] * 500]:
        stream.push(one)
    stream.finish()
    assert decoded <= 8 * 502


def test_ten_thousand_ids_take_well_under_a_second(tokenizers):
    for family in ("byte_level", "byte_fallback"):
        stream, started = Detokenizer(tokenizers[family]), time.perf_counter()
        for step in range(10_000):
            stream.push(200 + step % 60)
        stream.finish()
        assert time.perf_counter() - started < 1
