"""What the small files beside `tokenizer.json` say: special tokens, end-of-text ids, chat templates. None of it selects code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any

from attrs import field, frozen

from modelrig.checkpoint.files import open_regular, read_at
from modelrig.checkpoint.paths import inside, optional
from modelrig.checkpoint.strict_json import load_json
from modelrig.components import Snapshot
from modelrig.errors import ConfigError, TokenizerError, quoted
from modelrig.generation.tokenizer_growth import MAX_ADDED_CHARACTERS
from modelrig.planning.generation_config import read_generation
from modelrig.planning.identify import CONFIG as MODEL_CONFIG
from modelrig.planning.tokenizer_files import CONFIG, MAX_DIGITS

MAX_TEMPLATE_BYTES = 1 << 20
MAX_TEMPLATES = 100
SPECIAL_TOKENS, ADDED_TOKENS, OLD_TEMPLATE = "special_tokens_map.json", "added_tokens.json", "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"


@frozen(kw_only=True)
class SpecialTokens:
    """What the folder says of its tokenizer, apart from the tokenizer itself.

    Attributes:
        tokens: text of each special token by its name (`bos_token`, `eos_token`, ...); templates see them under these names.
        templates: source of each chat template by name; the usual one is called `default`.
        origins: the file each template came from.
        extra: texts of further special tokens.
        added: id → token, as an object with its `content`, that the tokenizer shall have.
    """

    tokens: Mapping[str, str] = field(factory=dict)
    templates: Mapping[str, str] = field(factory=dict)
    origins: Mapping[str, Path] = field(factory=dict)
    extra: tuple[str, ...] = ()
    added: Mapping[int, Mapping[str, Any]] = field(factory=dict)


def read_special_tokens(snapshot: Snapshot) -> SpecialTokens:
    """Read `tokenizer_config.json`, `special_tokens_map.json` and the chat templates of the snapshot's folder.

    Raises:
        TokenizerError: TK-JSON or TK-LIMIT, naming file and key.
        FileError: something there is not a regular readable file, or a link that leaves the folder.
    """
    config, others = _json(snapshot, CONFIG), _json(snapshot, SPECIAL_TOKENS)
    tokens = {**_named_tokens(others, snapshot.root / SPECIAL_TOKENS), **_named_tokens(config, snapshot.root / CONFIG)}
    templates: dict[str, str] = {}
    origins: dict[str, Path] = {}
    for name, source, path in _templates(snapshot, config):
        templates[name], origins[name] = source, path
    extra = tuple(text for values in (others, config) for text in _extra_tokens(values))
    added = dict(_added_tokens(snapshot, config, {*tokens.values(), *extra}))
    return SpecialTokens(tokens=tokens, templates=templates, origins=origins, extra=extra, added=added)


def end_of_text_ids(snapshot: Snapshot, vocab_size: int) -> tuple[int, ...] | None:
    """The ids that end a text, as the plan reads them, without those that a model with `vocab_size` logits cannot produce; None
    where no file says any.

    Raises:
        ConfigError: CF-TYPE if `eos_token_id` is neither an id nor a list of ids, or what `load_json` finds.
    """
    path = optional(snapshot, MODEL_CONFIG)
    config = {} if path is None else load_json(path, error=ConfigError, prefix="CF")
    said = read_generation(config, snapshot)
    if "eos_token_id" not in said.values:
        return None
    return tuple(dict.fromkeys(token for token in said.eos_ids if token < vocab_size))


def _json(snapshot: Snapshot, name: str) -> dict[str, Any]:
    path = optional(snapshot, name)
    return {} if path is None else load_json(path, error=TokenizerError, prefix="TK", max_digits=MAX_DIGITS)


def _named_tokens(values: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The entries `<name>_token`: a text, or an object whose `content` is one."""
    found = {}
    for key, value in values.items():
        if not key.endswith("_token") or value is None or isinstance(value, bool):
            continue  # `add_bos_token` and the like are switches
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str):
            raise TokenizerError("TK-JSON", f"{quoted(value)}: accepted is the token's text", path=path, locus=key)
        found[key] = text
    return found


def _extra_tokens(values: Mapping[str, Any]) -> Iterator[str]:
    for key in ("additional_special_tokens", "extra_special_tokens"):  # before transformers 5, and since
        found = values.get(key)
        for token in found.values() if isinstance(found, dict) else found if isinstance(found, list) else ():
            text = token.get("content") if isinstance(token, dict) else token
            if isinstance(text, str):
                yield text


def _added_tokens(snapshot: Snapshot, config: Mapping[str, Any], special: Set[str]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """(id, token) of `added_tokens_decoder`, or where there is none, of the older added_tokens.json."""
    key, path = "added_tokens_decoder", snapshot.root / CONFIG
    values = config.get(key)
    if values is None:
        key, path = "", snapshot.root / ADDED_TOKENS
        values = {
            str(number): {"content": text, "special": text in special} for text, number in _json(snapshot, ADDED_TOKENS).items()
        }
    if not isinstance(values, dict):
        raise TokenizerError("TK-JSON", f"{quoted(values)}: accepted is an object", path=path, locus=key)
    characters = 0
    for number, token in values.items():
        text = token.get("content") if isinstance(token, dict) else None
        if not (number.isascii() and number.isdecimal() and len(number) < 11 and isinstance(text, str) and text):
            reason = f"{quoted(number)}: accepted are ids, each with an object whose content is the token's text"
            raise TokenizerError("TK-JSON", reason, path=path, locus=key or None)
        characters += len(text)
        yield int(number), token
    if characters > MAX_ADDED_CHARACTERS:
        reason = f"tokens of {characters:,} characters together; at most {MAX_ADDED_CHARACTERS:,} are accepted"
        raise TokenizerError("TK-LIMIT", reason, path=path, locus=key or None)


def _templates(snapshot: Snapshot, config: Mapping[str, Any]) -> Iterator[tuple[str, str, Path]]:
    """(name, source, file) of each chat template; later ones win, and files of their own win over tokenizer_config.json."""
    for file, values in ((OLD_TEMPLATE, _json(snapshot, OLD_TEMPLATE)), (CONFIG, config)):
        path, entry = snapshot.root / file, values.get("chat_template")
        if isinstance(entry, str):
            yield "default", entry, path
        elif isinstance(entry, list) and all(isinstance(item, dict) for item in entry):
            for item in entry:
                name, source = item.get("name"), item.get("template")
                if not isinstance(name, str) or not isinstance(source, str):
                    raise TokenizerError("TK-JSON", "accepted are objects with name and template", path=path, locus="chat_template")
                yield name, source, path
        elif entry is not None:
            raise TokenizerError(
                "TK-JSON", "accepted is a template's text, or a list of named templates", path=path, locus="chat_template"
            )
    if (own := optional(snapshot, "chat_template.jinja")) is not None:
        yield "default", _text(own), own
    folder = optional(snapshot, TEMPLATE_FOLDER)
    names = sorted(path.name for path in folder.glob("*.jinja")) if folder is not None else []
    if len(names) > MAX_TEMPLATES:
        raise TokenizerError("TK-LIMIT", f"{len(names):,} templates; at most {MAX_TEMPLATES} are accepted", path=folder)
    for name in names:
        path = inside(snapshot, f"{TEMPLATE_FOLDER}/{name}")
        yield path.stem, _text(path), path


def _text(path: Path) -> str:
    with open_regular(path) as (descriptor, _):
        data = read_at(descriptor, MAX_TEMPLATE_BYTES + 1, 0, path)
    if len(data) > MAX_TEMPLATE_BYTES:
        raise TokenizerError("TK-LIMIT", f"more than {MAX_TEMPLATE_BYTES:,} bytes", path=path)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        raise TokenizerError("TK-JSON", f"not UTF-8 at byte {problem.start}", path=path) from problem
