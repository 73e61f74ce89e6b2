"""Tokenizers in another form than tokenizer.json: told apart without a library, and turned into one by commands that work."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from modelrig.components import Snapshot
from modelrig.errors import GenerateError, TokenizerError
from modelrig.planning.tokenizer_files import CLASSES, OtherForm, find_other_form, require_text

RANKS = b"".join(base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256))
PIECES = b"\x0a\x0e\x0a\x05<unk>\x15\x00\x00\x00\x00\x18\x02"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n"


def stating(name: str) -> dict[str, bytes]:
    return {"tokenizer_config.json": json.dumps({"tokenizer_class": name, "model_max_length": int(1e30)}).encode()}


def found(root: Path, files: dict[str, bytes]) -> OtherForm | None:
    for name, content in files.items():
        (root / name).write_bytes(content)
    return find_other_form(Snapshot(reference="x", root=root, source="local"))


#: files → (the one that is named, its form, what the hint says, what it does not say)
FORMS = {
    "SentencePiece": (
        {"tokenizer.model": PIECES},
        (
            "tokenizer.model",
            "SentencePiece",
            ["pip install transformers sentencepiece protobuf &&", "import LlamaTokenizer as"],
            ["cp"],
        ),
    ),
    "SentencePiece of a stated family": (
        {"tokenizer.model": PIECES, **stating("GemmaTokenizerFast")},
        ("tokenizer.model", "SentencePiece", ["import GemmaTokenizer as"], ["Llama", "family"]),
    ),
    "SentencePiece whose stated class is code of its own": (
        {"tokenizer.model": PIECES, **stating("os; import evil")},
        ("tokenizer.model", "SentencePiece", ["import LlamaTokenizer as"], ["evil"]),
    ),
    "SentencePiece under the name of T5": (
        {"spiece.model": PIECES, **stating("T5Tokenizer")},
        ("spiece.model", "SentencePiece", ["sentencepiece protobuf", "import T5Tokenizer as"], ["cp "]),
    ),
    "SentencePiece under a name its class does not look for": (
        {"spiece.model": PIECES, **stating("LlamaTokenizer")},
        ("spiece.model", "SentencePiece", ["&& cp spiece.model tokenizer.model && python", "import LlamaTokenizer as"], []),
    ),
    "SentencePiece of XLM-R": (
        {"sentencepiece.bpe.model": PIECES},
        ("sentencepiece.bpe.model", "SentencePiece", ["cp sentencepiece.bpe.model tokenizer.model", "import AutoTokenizer as"], []),
    ),
    "SentencePiece of a numbered version": (
        {"tokenizer.model.v3": PIECES},
        ("tokenizer.model.v3", "SentencePiece", ["cp tokenizer.model.v3 tokenizer.model"], []),
    ),
    "a name that is no word of a shell": (
        {"x; rm -rf $HOME.model": PIECES},
        ("x; rm -rf $HOME.model", "SentencePiece", ["cp FILE tokenizer.model"], ["rm -rf"]),
    ),
    "tiktoken in a .model file": (
        {"tokenizer.model": RANKS},
        ("tokenizer.model", "tiktoken", ["pip install transformers tiktoken &&", "import AutoTokenizer as"], ["sentencepiece"]),
    ),
    "tiktoken.model": ({"tiktoken.model": RANKS}, ("tiktoken.model", "tiktoken", ["transformers tiktoken &&"], ["cp"])),
    "tiktoken": (
        {"qwen.tiktoken": RANKS, **stating("QWenTokenizer")},
        ("qwen.tiktoken", "tiktoken", ["transformers tiktoken &&", "TikTokenConverter", "C('qwen.tiktoken')", "pattern="], []),
    ),
    "Tekken": (
        {"tekken.json": b"{}", "tokenizer.model": PIECES},
        ("tekken.json", "Tekken", ["pip install transformers &&", "mistral_format=False"], ["mistral-common", "sentencepiece"]),
    ),
    "GPT-2": (
        {"vocab.json": b"{}", "merges.txt": b""},
        (
            "vocab.json",
            "BPE in two files",
            ["pip install transformers &&", "import AutoTokenizer as", "GPT2Tokenizer in the place"],
            [],
        ),
    ),
    "Qwen2": (
        {"vocab.json": b"{}", "merges.txt": b"", **stating("Qwen2Tokenizer")},
        ("vocab.json", "BPE in two files", ["import Qwen2Tokenizer as"], ["GPT2"]),
    ),
    "GPT-2, half of it": ({"vocab.json": b"{}"}, ("vocab.json", "without its merges.txt", ["hf download"], [])),
    "GPT-2, the other half": ({"merges.txt": b""}, ("merges.txt", "without its vocab.json", ["hf download"], [])),
    "BERT": (
        {"vocab.txt": b"[UNK]"},
        ("vocab.txt", "WordPiece", ["pip install transformers &&", "BertTokenizer in the place"], []),
    ),
    "nothing but a config": (
        stating("LlamaTokenizer"),
        ("tokenizer_config.json", "unknown", ["hf download ORG/NAME tokenizer.json"], ["pip install"]),
    ),
    "a config that is broken": ({"tokenizer_config.json": b"{", "vocab.txt": b"a"}, ("vocab.txt", "WordPiece", [], [])),
    "a git-lfs pointer": ({"tokenizer.model": POINTER}, ("tokenizer.model", "git-lfs pointer", ["git lfs pull"], ["pip"])),
}


@pytest.mark.parametrize("name", FORMS)
def test_the_form_is_told_with_the_packages_and_the_command(tmp_path: Path, name: str) -> None:
    files, (file, form, says, says_not) = FORMS[name]
    other = found(tmp_path, files)
    assert other is not None and tmp_path / file == other.path
    assert form in other.form
    assert [] == [part for part in says if part not in other.hint]
    assert [] == [part for part in says_not if part in other.hint]
    error = other.error()
    assert (TokenizerError, "TK-MISSING", str(tmp_path / file)) == (type(error), error.code, error.path)
    assert form in error.reason and "no tokenizer.json" in error.reason
    assert other.path.name in other.note() and other.hint in other.note() and "token ids work" in other.note()


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"config.json": b"{}"},
        {"tokenizer.json": b"", "tokenizer.model": PIECES, "vocab.json": b"{}"},
        {"flow.model": b"PK\x03\x04"},
        {"special_tokens_map.json": b"{}"},
    ],
    ids=lambda files: " ".join(files) or "empty",
)
def test_where_there_is_a_tokenizer_json_or_nothing_there_is_no_other_form(tmp_path: Path, files: dict[str, bytes]) -> None:
    assert None is found(tmp_path, files)


def test_what_is_no_regular_file_is_told_by_its_name_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "tokenizer.model")
    started = time.perf_counter()
    assert "SentencePiece" == found(tmp_path, {}).form  # type: ignore[union-attr]
    assert time.perf_counter() - started < 1


def test_text_is_required_before_weights_are_read(tmp_path: Path) -> None:
    snapshot = Snapshot(reference="x", root=tmp_path, source="local")
    with pytest.raises(GenerateError, match="GN-TOKENIZER"):
        require_text(snapshot)
    (tmp_path / "vocab.txt").write_text("a")
    with pytest.raises(TokenizerError, match="TK-MISSING"):
        require_text(snapshot)
    (tmp_path / "tokenizer.json").write_text("{}")
    require_text(snapshot)


def test_the_form_is_told_without_torch_or_tokenizers(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(RANKS)
    code = (
        "import sys; from pathlib import Path; from modelrig.components import Snapshot\n"
        "from modelrig.planning.tokenizer_files import find_other_form\n"
        "print(find_other_form(Snapshot(reference='x', root=Path(sys.argv[1]), source='local')).form)\n"
        "assert not {'torch', 'tokenizers', 'transformers'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert "tiktoken" == done.stdout.strip()


# ------------------------------------------------------------------------------------------------ the commands


def test_every_class_that_a_command_names_exists_and_reads_that_file() -> None:
    import transformers

    for name, file in CLASSES.items():
        files = getattr(transformers, name).vocab_files_names
        assert file in files.values() or name == "GemmaTokenizer", name  # which reads tokenizer.model like all others


def bpe() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(["hello world, add(a, b)"] * 9, trainers.BpeTrainer(vocab_size=270, initial_alphabet=alphabet))
    return made


def tekken() -> bytes:
    tokens = [bytes([byte]) for byte in range(256)] + [b"he", b"ll", b"hell", b"hello"]
    vocab = [{"rank": rank, "token_bytes": base64.b64encode(token).decode()} for rank, token in enumerate(tokens)]
    special = [{"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(("<unk>", "<s>", "</s>"))]
    pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    sizes = {"num_vocab_tokens": len(tokens), "default_vocab_size": len(tokens) + 3, "default_num_special_tokens": 3}
    return json.dumps(
        {"config": {"pattern": pattern, "version": "v3", **sizes}, "vocab": vocab, "special_tokens": special}
    ).encode()


def run_hint(root: Path, hint: str, instead: tuple[str, str] = ("", "")) -> tokenizers.Tokenizer:
    """Run the command of a hint in the folder, without its `pip install`; returns the tokenizer it makes."""
    code = hint.partition('python -c "')[2].partition('"')[0]
    if instead[0]:
        assert instead[0] in code
        code = code.replace(*instead)
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, timeout=100)
    return tokenizers.Tokenizer.from_file(str(root / "tokenizer.json"))


TEXT = "hello world, add(a, b)"


@pytest.mark.parametrize(("model_type", "stated"), [("gpt2", None), ("qwen2", "Qwen2Tokenizer"), ("mistral", "GPT2TokenizerFast")])
def test_two_files_become_the_tokenizer_they_were_made_of(tmp_path: Path, model_type: str, stated: str | None) -> None:
    made = bpe()
    made.model.save(str(tmp_path))
    other = found(tmp_path, {"config.json": json.dumps({"model_type": model_type}).encode(), **(stating(stated) if stated else {})})
    assert other is not None
    assert made.encode(TEXT).tokens == run_hint(tmp_path, other.hint).encode(TEXT).tokens


def test_two_files_of_a_family_without_such_a_class_are_converted_by_the_class_that_the_hint_names(tmp_path: Path) -> None:
    made = bpe()
    made.model.save(str(tmp_path))
    other = found(tmp_path, {"config.json": b'{"model_type": "llama"}'})
    assert other is not None
    assert made.encode(TEXT).tokens == run_hint(tmp_path, other.hint, ("AutoTokenizer", "GPT2Tokenizer")).encode(TEXT).tokens


def test_word_pieces_are_converted(tmp_path: Path) -> None:
    vocab = "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "hello", "world", "##s", ","])
    other = found(tmp_path, {"config.json": b'{"model_type": "bert"}', "vocab.txt": vocab.encode()})
    assert other is not None
    assert ["[CLS]", "hello", "##s", ",", "world", "[SEP]"] == run_hint(tmp_path, other.hint).encode("hellos, world").tokens


def test_tekken_is_converted_without_further_packages(tmp_path: Path) -> None:
    other = found(tmp_path, {"config.json": b'{"model_type": "mistral"}', "tekken.json": tekken()})
    assert other is not None
    assert [259 + 3, *(ord(c) + 3 for c in " you")] == run_hint(tmp_path, other.hint).encode(
        "hello you", add_special_tokens=False
    ).ids


@pytest.mark.parametrize("file", ["tokenizer.model", "qwen.tiktoken"])
def test_ranks_are_converted_by_tiktoken(tmp_path: Path, file: str) -> None:
    pytest.importorskip("tiktoken")
    other = found(tmp_path, {"config.json": b'{"model_type": "llama"}', file: RANKS})
    assert other is not None
    assert list(b"hello") == run_hint(tmp_path, other.hint).encode("hello").ids


@pytest.mark.parametrize("file", ["tokenizer.model", "spiece.model"])
def test_pieces_are_converted_by_sentencepiece(tmp_path: Path, file: str) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    pytest.importorskip("google.protobuf")
    model = tmp_path / Path(file).stem
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([TEXT] * 99), model_prefix=str(model), vocab_size=290, model_type="bpe", byte_fallback=True
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / file))
    other = found(tmp_path, {"config.json": b'{"model_type": "llama"}', **stating("LlamaTokenizer")})
    assert other is not None
    if file != "tokenizer.model":
        (tmp_path / "tokenizer.model").write_bytes((tmp_path / file).read_bytes())  # what the command's cp does
    assert theirs.encode(TEXT) == run_hint(tmp_path, other.hint).encode(TEXT, add_special_tokens=False).ids
