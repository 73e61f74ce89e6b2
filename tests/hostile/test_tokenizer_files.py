"""Tokenizer files that are broken or made to hurt: one typed error each, soon, and nothing on standard error."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modelrig.errors import FileError, ModelrigError, TokenizerError
from modelrig.generation import tokenizer as module
from modelrig.generation.tokenizer import Tokenizer

VOCAB = 100


def document(**parts):
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None}
    model |= {"fuse_unk": False, "byte_fallback": False, "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]}
    model |= parts.pop("model", {})
    keys = ("truncation", "padding", "normalizer", "pre_tokenizer", "post_processor", "decoder")
    return json.dumps({"version": "1.0", "added_tokens": [], **dict.fromkeys(keys), "model": model, **parts})


TEMPLATE = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "X", "type_id": 0}}], "pair": [], "special_tokens": {}}
BACKTRACKING = {"type": "Split", "pattern": {"Regex": "(.+)+$$x"}, "behavior": "Isolated", "invert": False}

BROKEN = {
    "empty": ("", "TK-JSON"),
    "not JSON": ("<html>", "TK-JSON"),
    "cut short": (document()[:60], "TK-JSON"),
    "a list": ("[]", "TK-JSON"),
    "nested deeply": ('{"version":' + "[" * 100_000, "TK-JSON"),
    "not UTF-8": (b'{"version": "\xff"}', "TK-JSON"),
    "an unknown model": (document(model={"type": "Other"}), "TK-JSON"),
    "a merge of unknown tokens": (document(model={"merges": ["a c"]}), "TK-JSON"),
    "a negative id": (document(model={"vocab": {"a": -1, "b": 1, "ab": 2}}), "TK-JSON"),
    "an id beyond 32 bits": (document(model={"vocab": {"a": 2**32, "b": 1, "ab": 2}}), "TK-JSON"),
    "a regular expression that is none": (document(pre_tokenizer={**BACKTRACKING, "pattern": {"Regex": "(a"}}), "TK-JSON"),
    "an enormous id": (document(model={"vocab": {"a": 2**32 - 1, "b": 1, "ab": 2}}), "TK-VOCAB"),
    "an id beyond the model": (document(model={"vocab": {"a": VOCAB, "b": 1, "ab": 2}}), "TK-VOCAB"),
    "a merge longer than its parts": (document(model={"merges": ["ab a"]}), "TK-PANIC"),
    "a prefix longer than tokens": (document(model={"continuing_subword_prefix": "#" * 20}), "TK-PANIC"),
    "a template without its special token": (document(post_processor=TEMPLATE), "TK-PANIC"),
    "pieces of length zero": (document(pre_tokenizer={"type": "FixedLength", "length": 0}), "TK-PANIC"),
    "an empty character map": (document(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAAAAAA"}), "TK-PANIC"),
    "a broken character map": (document(normalizer={"type": "Precompiled", "precompiled_charsmap": "/////w=="}), "TK-PANIC"),
    "a decoder that strips more than there is": (
        document(decoder={"type": "Strip", "content": "a", "start": 1, "stop": 1}),
        "TK-PANIC",
    ),
    "a regular expression that explodes": (document(pre_tokenizer=BACKTRACKING), "TK-PANIC"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_one_typed_error_that_names_it(tmp_path, name, capfd):
    content, code = BROKEN[name]
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    started = time.perf_counter()
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    assert (code, str(path)) == (caught.value.code, caught.value.path)
    assert time.perf_counter() - started < 2
    assert ("", "") == tuple(capfd.readouterr())
    assert len(str(caught.value)) < 1000


def test_the_plain_document_itself_is_fine(tmp_path):
    (tmp_path / "tokenizer.json").write_text(document())
    assert [2, 0] == Tokenizer.from_folder(tmp_path, VOCAB).encode("ab a")


@pytest.mark.parametrize(
    "part",
    [
        {"truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 5}},
        {"truncation": {"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}},
        {
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Left",
                "pad_to_multiple_of": 0,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "a",
            }
        },
    ],
    ids=["a stride longer than the text", "nothing but truncation", "a billion pads"],
)
def test_truncation_and_padding_made_to_hurt_are_not_used(tmp_path, part):
    (tmp_path / "tokenizer.json").write_text(document(**part))
    assert [2, 0, 2] == Tokenizer.from_folder(tmp_path, VOCAB).encode("ab a ab")


def test_a_panic_while_encoding_or_decoding_is_typed_too(tmp_path, capfd):
    (tmp_path / "tokenizer.json").write_text(document(pre_tokenizer={**BACKTRACKING, "pattern": {"Regex": "(a+)+$"}}))
    found = Tokenizer.from_folder(tmp_path, VOCAB)
    with pytest.raises(TokenizerError) as caught:
        found.encode("a" * 40 + "b")
    assert "TK-PANIC" == caught.value.code
    with pytest.raises(TokenizerError):
        found.encode_batch(["a" * 40 + "b"])


def test_a_file_larger_than_the_limit_is_not_read(tmp_path):
    with (tmp_path / "tokenizer.json").open("wb") as file:
        file.truncate(module.MAX_BYTES + 1)
    with pytest.raises(TokenizerError) as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    assert "TK-LIMIT" == caught.value.code and f"{module.MAX_BYTES + 1:,}" in caught.value.reason


@pytest.mark.parametrize("kind", ["folder", "pipe", "device"])
def test_what_is_no_regular_file_is_refused_without_waiting(tmp_path, kind):
    path = tmp_path / "tokenizer.json"
    {"folder": path.mkdir, "pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    with pytest.raises(FileError):
        Tokenizer.from_folder(tmp_path, VOCAB)


SIDE_FILES = {
    "config that is no JSON": ("tokenizer_config.json", "{", "TK-JSON"),
    "config that is a list": ("tokenizer_config.json", "[]", "TK-JSON"),
    "config with a key twice": ("tokenizer_config.json", '{"eos_token": "a", "eos_token": "b"}', "TK-JSON"),
    "config nested deeply": ("tokenizer_config.json", '{"a":' * 5000 + "1" + "}" * 5000, "TK-LIMIT"),
    "a token that is a number": ("tokenizer_config.json", '{"eos_token": 5}', "TK-JSON"),
    "a token without content": ("tokenizer_config.json", '{"eos_token": {"special": true}}', "TK-JSON"),
    "a template that is a number": ("tokenizer_config.json", '{"chat_template": 5}', "TK-JSON"),
    "a named template without text": ("tokenizer_config.json", '{"chat_template": [{"name": "default"}]}', "TK-JSON"),
    "a map that is no JSON": ("special_tokens_map.json", "nope", "TK-JSON"),
    "a template that is not UTF-8": ("chat_template.jinja", b"\xff", "TK-JSON"),
    "a template of two megabytes": ("chat_template.jinja", "x" * (2 << 20), "TK-LIMIT"),
    "a generation config that is no JSON": ("generation_config.json", "{", "CF-JSON"),
}


@pytest.mark.parametrize("name", SIDE_FILES)
def test_a_broken_file_beside_the_tokenizer_is_named(tmp_path, name):
    file, content, code = SIDE_FILES[name]
    (tmp_path / "tokenizer.json").write_text(document())
    (tmp_path / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ModelrigError) as caught:
        Tokenizer.from_folder(tmp_path, VOCAB)
    assert (code, str(tmp_path / file)) == (caught.value.code, caught.value.path)


def test_no_string_of_the_folder_selects_code(tmp_path):
    (tmp_path / "tokenizer.json").write_text(document())
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    config = {
        "tokenizer_class": "evil.Evil",
        "auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]},
        "tokenizer_file": "/etc/passwd",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    code = (
        "import sys; seen = []\n"
        "sys.addaudithook(lambda event, args: seen.append(args) if event in ('subprocess.Popen', 'os.system', 'socket.connect') "
        "or (event == 'open' and 'passwd' in str(args[0])) else None)\n"
        "from pathlib import Path; from modelrig.generation.tokenizer import Tokenizer\n"
        f"Tokenizer.from_folder(Path({str(tmp_path)!r}), 100).encode('ab')\n"
        "assert not seen and 'evil' not in sys.modules, seen"
    )
    assert 0 == subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode


def test_a_broken_tokenizer_leaves_no_file_descriptor_open(tmp_path):
    (tmp_path / "tokenizer.json").write_text(BROKEN["pieces of length zero"][0])
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with pytest.raises(TokenizerError):
            Tokenizer.from_folder(tmp_path, VOCAB)
    assert before == len(list(Path("/proc/self/fd").iterdir()))
