"""Tokenizers in another form than `tokenizer.json`: which one a folder has, and what turns it into that file, once.

Known before a weight is read, and without a tokenizer library: files are told by their names, and where a name has two meanings,
by their first bytes. The commands are those that work with transformers 5.23 (docs/decisions/0013).
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.catalog import file_names
from modelrig.checkpoint.files import open_regular, read_at
from modelrig.checkpoint.paths import inside
from modelrig.checkpoint.strict_json import load_json
from modelrig.components import Snapshot
from modelrig.errors import GenerateError, ModelrigError, TokenizerError

FILE, CONFIG = "tokenizer.json", "tokenizer_config.json"
MAX_DIGITS = 40  # `model_max_length` is often written as int(1e30)

#: classes of transformers that convert without code of the checkpoint → the file they read
CLASSES = {
    **dict.fromkeys(("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "Phi3Tokenizer"), "tokenizer.model"),
    **dict.fromkeys(("T5Tokenizer", "AlbertTokenizer", "PegasusTokenizer", "XLNetTokenizer"), "spiece.model"),
    **dict.fromkeys(("XLMRobertaTokenizer", "CamembertTokenizer", "MBartTokenizer"), "sentencepiece.bpe.model"),
    **dict.fromkeys(("GPT2Tokenizer", "Qwen2Tokenizer", "CodeGenTokenizer", "RobertaTokenizer", "BartTokenizer"), "vocab.json"),
    **dict.fromkeys(("BertTokenizer", "DistilBertTokenizer", "ElectraTokenizer", "MPNetTokenizer"), "vocab.txt"),
}
ANY_CLASS = "AutoTokenizer"
FETCH = (
    "fetch that of the model it came from: hf download ORG/NAME tokenizer.json --local-dir FOLDER, or "
    "transformers.AutoTokenizer.from_pretrained('ORG/NAME').save_pretrained('FOLDER')"
)

_MODEL = re.compile(r".+\.model|tokenizer\.model\.v\d+", re.ASCII)
_USUAL_MODELS = ("tokenizer.model", "tiktoken.model", "spiece.model", "sentencepiece.bpe.model")
_RANKS = re.compile(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n")  # tiktoken's lines: base64 of a token, and its rank
_POINTER = b"version https://git-lfs"
_PLAIN_NAME = re.compile(r"[\w.-]+", re.ASCII)


@frozen
class OtherForm:
    """A tokenizer that is there, but not as `tokenizer.json`.

    Attributes:
        path: its file.
        form: what it is.
        hint: what to do, as a command.
    """

    path: Path
    form: str
    hint: str

    def error(self) -> TokenizerError:
        """TK-MISSING."""
        what = f"there is no tokenizer.json; the folder has a tokenizer in another form ({self.form})"
        return TokenizerError("TK-MISSING", what, path=self.path, hint=self.hint)

    def note(self) -> str:
        """What a plan says of it."""
        what = f"the tokenizer is in another form ({self.path.name}: {self.form}): token ids work, text does not"
        return f"{what}; {self.hint}"


def find_other_form(snapshot: Snapshot) -> OtherForm | None:
    """The tokenizer in another form, or None where there is a `tokenizer.json`, or nothing of a tokenizer at all."""
    names = file_names(snapshot)
    if FILE in names or (snapshot.root / FILE).is_dir():  # whatever it is: opening it says what is wrong with it
        return None
    if "tekken.json" in names:
        load = f"from transformers import {ANY_CLASS} as T; T.from_pretrained('.', mistral_format=False).save_pretrained('.')"
        return OtherForm(snapshot.root / "tekken.json", "Tekken", _command(load))
    models = [name for name in names if _MODEL.fullmatch(name)]
    for name in sorted(models, key=lambda name: (name not in _USUAL_MODELS, name)):
        if (found := _of_model(snapshot, name, names)) is not None:
            return found
    for name in names:
        if name.endswith(".tiktoken"):
            return _of_ranks(snapshot, name)
    there = [name for name in ("vocab.json", "merges.txt") if name in names]
    if len(there) == 1:
        form = f"BPE in two files, {there[0]} without its {'merges.txt' if there == ['vocab.json'] else 'vocab.json'}"
        return OtherForm(snapshot.root / there[0], form, FETCH)
    for name, form, usual in (("vocab.json", "BPE in two files", "GPT2Tokenizer"), ("vocab.txt", "WordPiece", "BertTokenizer")):
        if name in names:
            stated = _stated_class(snapshot, names, {name})
            told = "" if stated else f"; {usual} in the place of {ANY_CLASS} where that finds no class"
            return OtherForm(snapshot.root / name, form, _converting(stated or ANY_CLASS) + told)
    return OtherForm(snapshot.root / CONFIG, "unknown, its vocabulary is missing", FETCH) if CONFIG in names else None


def require_text(snapshot: Snapshot) -> None:
    """Raise, before a weight is read, what `no_text` says, unless there is a `tokenizer.json`."""
    if FILE not in file_names(snapshot) and not (snapshot.root / FILE).is_dir():
        raise no_text(find_other_form(snapshot), "read text", hint="from Python, give token ids")


def no_text(form: OtherForm | None, wanted: str, *, locus: str | None = None, hint: str | None = None) -> ModelrigError:
    """The error where a model without a tokenizer should do something with text: TK-MISSING for another form, else GN-TOKENIZER."""
    if form is not None:
        return form.error()
    return GenerateError("GN-TOKENIZER", f"this model has no tokenizer, so it cannot {wanted}", locus=locus, hint=hint)


def _of_model(snapshot: Snapshot, name: str, names: Collection[str]) -> OtherForm | None:
    """What the file `*.model` is; None for one that is not known to be a tokenizer, neither by its name nor by its beginning."""
    path, head = snapshot.root / name, _head(snapshot, name)
    if head.startswith(_POINTER):
        return OtherForm(path, "a git-lfs pointer, not the file it points to", "run `git lfs pull` in the folder it came from")
    copy = "" if name in ("tokenizer.model", "tiktoken.model") else f"cp {_shown(name)} tokenizer.model && "
    if _RANKS.match(head):
        special = "; special tokens are taken from tokenizer_config.json"
        return OtherForm(path, "tiktoken", _converting(ANY_CLASS, "tiktoken", copy) + special)
    if name not in _USUAL_MODELS and not head.startswith(b"\n"):  # a SentencePiece model begins with its field 1
        return None
    stated = _stated_class(snapshot, names, set(_USUAL_MODELS))
    usual = "LlamaTokenizer" if name == "tokenizer.model" else ANY_CLASS
    if stated is not None and CLASSES[stated] == name:
        copy = ""
    told = "" if stated else "; a family with a class of its own (GemmaTokenizer, T5Tokenizer) needs that one"
    return OtherForm(path, "SentencePiece", _converting(stated or usual, "sentencepiece protobuf", copy) + told)


def _of_ranks(snapshot: Snapshot, name: str) -> OtherForm:
    convert = f"TikTokenConverter as C; C('{_shown(name)}').converted().save('tokenizer.json')"
    told = "; give C the pattern= and extra_special_tokens= of the model's own tokenizer, which the file does not have"
    hint = _command(f"from transformers.convert_slow_tokenizer import {convert}", "tiktoken") + told
    return OtherForm(snapshot.root / name, "tiktoken", hint)


def _converting(name: str, needs: str = "", copy: str = "") -> str:
    return _command(f"from transformers import {name} as T; T.from_pretrained('.').save_pretrained('.')", needs, copy)


def _command(python: str, needs: str = "", copy: str = "") -> str:
    return f'convert it once, in its folder: {" ".join(("pip install transformers", needs)).strip()} && {copy}python -c "{python}"'


def _shown(name: str) -> str:
    """A file's name as it may stand in a command: it is foreign text."""
    return name if _PLAIN_NAME.fullmatch(name) and not name.startswith("-") else "FILE"


def _stated_class(snapshot: Snapshot, names: Collection[str], files: Collection[str]) -> str | None:
    """The `tokenizer_class` that tokenizer_config.json states, if it is one that reads such files."""
    values: dict[str, Any] = {}
    if CONFIG in names:
        with contextlib.suppress(ModelrigError):  # whoever reads it as a config says what is wrong with it
            values = load_json(inside(snapshot, CONFIG), error=TokenizerError, prefix="TK", max_digits=MAX_DIGITS)
    stated = values.get("tokenizer_class")
    name = stated.removesuffix("Fast") if isinstance(stated, str) else ""
    return name if CLASSES.get(name) in files else None


def _head(snapshot: Snapshot, name: str) -> bytes:
    """The first bytes of a file; none of one that cannot be read."""
    with contextlib.suppress(ModelrigError):
        path = inside(snapshot, name)
        with open_regular(path) as (descriptor, _):
            return read_at(descriptor, 4096, 0, path)
    return b""
