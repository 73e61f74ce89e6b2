"""Tokenizer: what the library and transformers say, and what the files beside tokenizer.json add."""

import subprocess
import sys
from pathlib import Path

import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import tokenizer_folders
from modelrig.errors import ConfigError, FileError, TemplateError, TokenizerError
from modelrig.generation.tokenizer import Tokenizer

VOCAB = 400
TEXTS = [
    "",
    " ",
    "def add(a, b):\n    return a + b",
    "a\x00b\r\n\t",
    "é́ 漢字 😀👩‍👩‍👧",
    "  <|im_start|>user<tool call>漢x",
    "\u2028\ufeff\ufffd",
    "x" * 5000,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tokenizer_folders.write(
        tmp_path_factory.mktemp("tokenizer"),
        tokenizer_folders.byte_level(),
        tokenizer_config__json={
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|endoftext|>",
            "model_max_length": int(1e30),
        },
    )


@pytest.fixture(scope="module")
def tokenizer(folder) -> Tokenizer:
    return Tokenizer.from_folder(folder, VOCAB)


@pytest.fixture(scope="module")
def theirs(folder):
    return transformers.PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("add_special_tokens", [True, False])
def test_ids_are_those_of_transformers(tokenizer, theirs, text, add_special_tokens):
    assert theirs.encode(text, add_special_tokens=add_special_tokens) == tokenizer.encode(text, add_special_tokens)


@pytest.mark.parametrize("skip_special_tokens", [True, False])
def test_text_is_that_of_transformers(tokenizer, theirs, skip_special_tokens):
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert theirs.decode(ids, skip_special_tokens=skip_special_tokens) == tokenizer.decode(ids, skip_special_tokens)


@given(text=st.text())
@settings(deadline=None)
def test_any_text_survives_a_round_trip(tokenizer, text):
    assert text == tokenizer.decode(tokenizer.encode(text, add_special_tokens=False), skip_special_tokens=False)


def test_a_batch_is_its_texts_one_by_one(tokenizer):
    assert [tokenizer.encode(text) for text in TEXTS] == tokenizer.encode_batch(TEXTS)


def test_special_tokens_are_added_as_the_post_processor_says(tokenizer):
    assert [tokenizer.bos_id] == tokenizer.encode("")
    assert [] == tokenizer.encode("", add_special_tokens=False)


def test_truncation_and_padding_of_the_file_are_off(tmp_path):
    made = tokenizer_folders.byte_level()
    made.enable_truncation(3)
    made.enable_padding(length=64)
    tokenizer_folders.write(tmp_path, made)
    text = "a much longer text than three tokens"
    assert text == Tokenizer.from_folder(tmp_path, VOCAB).decode(Tokenizer.from_folder(tmp_path, VOCAB).encode(text))


@pytest.mark.parametrize(
    ("text", "said"), [("a\ud800b", "character 1"), (b"bytes", "bytes"), (5, "int"), (None, "NoneType"), (["a"], "list")]
)
def test_what_is_no_text_is_a_typed_error(tokenizer, text, said):
    for call in (tokenizer.encode, lambda item: tokenizer.encode_batch(["fine", item]), tokenizer.token_to_id):
        with pytest.raises(TokenizerError, match=said) as caught:
            call(text)
        assert "TK-TEXT" == caught.value.code


@pytest.mark.parametrize("ids", [[1, -1], [2**32], ["a"], [1.5], [None]])
def test_what_is_no_id_is_a_typed_error(tokenizer, ids):
    with pytest.raises(TokenizerError, match="is no token id") as caught:
        tokenizer.decode(ids)
    assert "TK-VOCAB" == caught.value.code


def test_rows_that_only_pad_the_vocabulary_have_no_text(tokenizer):
    assert "ab" == tokenizer.decode([*tokenizer.encode("a"), VOCAB - 1, 10**6, *tokenizer.encode("b")])
    assert None is tokenizer.id_to_token(VOCAB - 1)


def test_ids_beyond_the_models_vocabulary_are_refused_with_both_numbers(folder, tokenizer):
    highest = tokenizer.vocab_size - 1
    assert Tokenizer.from_folder(folder, highest + 1)
    with pytest.raises(TokenizerError, match=f"id {highest}, but the model's vocabulary ends at {highest - 1}") as caught:
        Tokenizer.from_folder(folder, highest)
    assert "TK-VOCAB" == caught.value.code


def test_a_folder_without_tokenizer_files_has_no_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text('{"eos_token_id": 3}')
    assert None is Tokenizer.from_folder(tmp_path, VOCAB)


def test_a_tokenizer_in_another_form_is_an_error_with_a_command(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\x0a\x00")
    with pytest.raises(TokenizerError, match="SentencePiece") as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    assert ("TK-MISSING", str(tmp_path / "tokenizer.model")) == (caught.value.code, caught.value.path)
    assert "save_pretrained" in caught.value.hint


IDS = {"<|endoftext|>": 0, "<|im_start|>": 1, "<|im_end|>": 2}
EOS = [
    ({"generation_config__json": {"eos_token_id": 2}}, (2,)),
    ({"generation_config__json": {"eos_token_id": [2, 0]}, "config__json": {"eos_token_id": 1}}, (2, 0)),
    ({"generation_config__json": {}, "config__json": {"eos_token_id": 1}}, (1,)),
    ({"generation_config__json": {"eos_token_id": None}, "tokenizer_config__json": {"eos_token": "<|im_end|>"}}, (2,)),
    ({"generation_config__json": {"eos_token_id": 0}, "tokenizer_config__json": {"eos_token": {"content": "<|im_end|>"}}}, (0,)),
    ({"generation_config__json": {"eos_token_id": []}, "tokenizer_config__json": {"eos_token": "<|im_end|>"}}, ()),
    ({"special_tokens_map__json": {"eos_token": {"content": "<|im_end|>"}}}, (2,)),
    ({"special_tokens_map__json": {"eos_token": "<|im_end|>"}, "tokenizer_config__json": {"eos_token": "<|im_start|>"}}, (1,)),
    ({"tokenizer_config__json": {"eos_token": "not in the vocabulary"}}, ()),
    ({"config__json": {"eos_token_id": [50256, -1, 1]}}, (1,)),
    ({}, ()),
]


@pytest.mark.parametrize(("files", "expected"), EOS, ids=str)
def test_texts_end_at_the_ids_that_the_files_name(tmp_path, files, expected):
    tokenizer_folders.write(tmp_path, tokenizer_folders.byte_level(), **files)
    assert expected == Tokenizer.from_folder(tmp_path, VOCAB).eos_ids


@pytest.mark.parametrize("value", ["2", 2.0, True, [2, "3"], {"id": 2}])
def test_an_end_of_text_id_of_the_wrong_type_is_named(tmp_path, value):
    tokenizer_folders.write(tmp_path, tokenizer_folders.byte_level(), generation_config__json={"eos_token_id": value})
    with pytest.raises(ConfigError) as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    assert ("CF-TYPE", "eos_token_id") == (caught.value.code, caught.value.locus)


SPECIAL = [
    ({"tokenizer_config__json": {"bos_token": None, "eos_token": "<|im_end|>"}}, (None, 2, None)),
    (
        {"tokenizer_config__json": {"bos_token": {"__type": "AddedToken", "content": "<|endoftext|>", "lstrip": False}}},
        (0, None, None),
    ),
    (
        {
            "tokenizer_config__json": {
                "added_tokens_decoder": {"2": {"content": "<|im_end|>", "special": True}},
                "extra_special_tokens": {"image_token": "<image>"},
                "additional_special_tokens": ["<|im_start|>"],
                "pad_token": "<|im_end|>",
                "add_bos_token": True,
            }
        },
        (None, None, 2),
    ),
    ({"tokenizer_config__json": {"extra_special_tokens": ["<a>"], "pad_token": "nowhere"}}, (None, None, None)),
]


@pytest.mark.parametrize(("files", "expected"), SPECIAL, ids=str)
def test_special_tokens_are_found_in_every_way_they_are_written(tmp_path, files, expected):
    tokenizer_folders.write(tmp_path, tokenizer_folders.byte_level(), **files)
    found = Tokenizer.from_folder(tmp_path, VOCAB)
    assert expected == (found.bos_id, next(iter(found.eos_ids), None), found.pad_id)


def test_null_for_a_special_token_does_not_hide_what_the_other_file_says(tmp_path):
    files = {"special_tokens_map__json": {"bos_token": "<|im_start|>"}, "tokenizer_config__json": {"bos_token": None}}
    tokenizer_folders.write(tmp_path, tokenizer_folders.byte_level(), **files)
    assert 1 == Tokenizer.from_folder(tmp_path, VOCAB).bos_id


def test_a_vocabulary_smaller_than_the_models_is_fine(folder, tokenizer):
    padded = Tokenizer.from_folder(folder, 10 * VOCAB)
    assert tokenizer.encode("def add(a, b):") == padded.encode("def add(a, b):")


TEMPLATES = [
    ({"tokenizer_config__json": {"chat_template": "one"}}, "one", "tokenizer_config.json"),
    ({"tokenizer_config__json": {"chat_template": "one"}, "chat_template__jinja": "two"}, "two", "chat_template.jinja"),
    ({"chat_template__json": {"chat_template": "three"}}, "three", "chat_template.json"),
    ({"tokenizer_config__json": {"chat_template": [{"name": "default", "template": "four"}]}}, "four", "tokenizer_config.json"),
    ({"tokenizer_config__json": {"chat_template": [{"name": "rag", "template": "five"}]}}, None, None),
]


@pytest.mark.parametrize(("files", "expected", "origin"), TEMPLATES, ids=str)
def test_the_chat_template_is_found_with_its_origin(tmp_path, files, expected, origin):
    tokenizer_folders.write(tmp_path, tokenizer_folders.byte_level(), **files)
    found = Tokenizer.from_folder(tmp_path, VOCAB)
    assert (expected, origin and tmp_path / origin) == (found.chat_template, found.chat_template_origin)


def test_messages_become_ids_without_a_second_beginning_of_text(tmp_path):
    template = (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>{% endfor %}{{ eos_token }}"
    )
    tokenizer_folders.write(
        tmp_path,
        tokenizer_folders.byte_level(),
        chat_template__jinja=template,
        tokenizer_config__json={"bos_token": "<|endoftext|>"},
    )
    found = Tokenizer.from_folder(tmp_path, VOCAB)
    messages = [{"role": "user", "content": "hé"}]
    assert "<|endoftext|><|im_start|>user\nhé<|im_end|>" == found.render_chat(messages)
    ids = found.encode_messages(messages)
    assert [IDS["<|endoftext|>"], IDS["<|im_start|>"]] == ids[:2]
    assert 1 == ids.count(IDS["<|endoftext|>"])


def test_tools_use_the_template_made_for_them(tmp_path):
    tokenizer_folders.write(tmp_path, tokenizer_folders.byte_level(), chat_template__jinja="plain")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("with {{ tools[0].name }}")
    found, messages = Tokenizer.from_folder(tmp_path, VOCAB), [{"role": "user", "content": "x"}]
    assert ("plain", "with f") == (found.render_chat(messages), found.render_chat(messages, tools=[{"name": "f"}]))


def test_messages_without_a_template_say_what_to_do(tokenizer):
    with pytest.raises(TemplateError) as caught:
        tokenizer.render_chat([{"role": "user", "content": "x"}])
    assert "TM-MISSING" == caught.value.code and "prompt" in caught.value.hint


def test_a_link_to_nothing_is_not_a_missing_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "gone")
    with pytest.raises(FileError):
        Tokenizer.from_folder(tmp_path, VOCAB)


def test_what_others_write_to_standard_error_while_loading_is_not_lost(tmp_path):
    code = (
        "import os, sys; from modelrig.generation.tokenizer import _quiet_stderr\n"
        "with _quiet_stderr(): os.write(2, b'kept')\n"
        "try:\n with _quiet_stderr():\n  os.write(2, b'dropped'); 1/0\n"
        "except ZeroDivisionError: os.write(2, b' again')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert b"kept again" == done.stderr


def test_a_process_without_standard_error_can_load(folder):
    code = (
        "import os; os.close(2)\n"
        "from pathlib import Path; from modelrig.generation.tokenizer import Tokenizer\n"
        f"print(Tokenizer.from_folder(Path({str(folder)!r}), {VOCAB}).encode('a', False))"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert done.stdout.startswith(b"[")


def test_a_git_lfs_pointer_in_its_place_says_what_to_run(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(TokenizerError, match="git-lfs pointer") as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    assert "TK-JSON" == caught.value.code and "git lfs pull" in caught.value.hint
