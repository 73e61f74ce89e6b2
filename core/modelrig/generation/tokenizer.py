"""Text to token ids and back, by the `tokenizers` library and the files of the checkpoint's folder."""

from __future__ import annotations

import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelrig.checkpoint.files import open_regular, read_at
from modelrig.checkpoint.paths import optional
from modelrig.components import Snapshot
from modelrig.errors import TemplateError, TokenizerError, quoted
from modelrig.generation.added_tokens import complete
from modelrig.generation.special_tokens import SpecialTokens, end_of_text_ids, read_special_tokens
from modelrig.generation.tokenizer_growth import require_bounded
from modelrig.planning.tokenizer_files import find_other_form

if TYPE_CHECKING:
    import tokenizers

__all__ = ["Tokenizer"]

MAX_BYTES = 128 << 20
TRIAL_TEXT = 'def f(a, ab):\n\treturn "é😀 漢字" + 1,000  # <|x|>\x00 '

_stderr_lock = threading.Lock()


class Tokenizer:
    """The tokenizer of a checkpoint; made by `from_folder`.

    Attributes:
        eos_ids: ids that end a text: those of generation_config.json, else of config.json, else the tokenizer's `eos_token`.
        bos_id, pad_id: ids of `bos_token` and `pad_token`, None where there is none.
        special: special tokens and chat templates of the folder.
    """

    def __init__(self, rust: tokenizers.Tokenizer, root: Path, special: SpecialTokens, eos_ids: Sequence[int] | None) -> None:
        self._rust, self._root, self.special = rust, root, special
        self._path = root / "tokenizer.json"
        self.bos_id = self._named("bos_token")
        self.pad_id = self._named("pad_token")
        eos = self._named("eos_token")
        self.eos_ids = (() if eos is None else (eos,)) if eos_ids is None else tuple(dict.fromkeys(eos_ids))

    @classmethod
    def from_folder(cls, root: Path, vocab_size: int, link_roots: Sequence[Path] = ()) -> Tokenizer | None:
        """The tokenizer in `root` for a model with `vocab_size` logits, or None if the folder has no tokenizer files at all.

        `link_roots` are folders outside that links in `root` may point into.

        Raises:
            TokenizerError: TK-MISSING for tokenizers in another form than tokenizer.json; TK-LIMIT, TK-JSON, TK-PANIC or TK-VOCAB
                for files that cannot be used.
            ConfigError, FileError: for the files beside it.
        """
        snapshot = Snapshot(reference=str(root), root=root, source="", link_roots=tuple(link_roots))
        path = optional(snapshot, "tokenizer.json")
        if path is None:
            if (form := find_other_form(snapshot)) is not None:
                raise form.error()
            return None
        data = _read(path)
        special = read_special_tokens(snapshot)
        rust = _load(data, path)
        highest = max(rust.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1], default=("", -1))
        if highest[1] >= vocab_size:
            raise TokenizerError(
                "TK-VOCAB",
                f"token {quoted(highest[0])} has id {highest[1]}, but the model's vocabulary ends at {vocab_size - 1}",
                path=path,
                hint="tokenizer and weights belong to different models",
            )
        with _panics_typed(path, "adding tokens"):
            complete(rust, special, vocab_size, path)
        return cls(rust, root, special, end_of_text_ids(snapshot, vocab_size))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Ids of `text`. Special tokens are added as tokenizer.json's post-processor says; nothing is truncated or padded.

        Raises:
            TokenizerError: TK-TEXT for what is not text (lone surrogates included), TK-PANIC if the library gives up.
        """
        _check_text(text, self._path)
        with _panics_typed(self._path, "encoding a text"):
            return list(self._rust.encode(text, add_special_tokens=add_special_tokens).ids)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """`encode` for each of `texts`, in parallel."""
        for text in texts:
            _check_text(text, self._path)
        with _panics_typed(self._path, "encoding texts"):
            return [list(one.ids) for one in self._rust.encode_batch(list(texts), add_special_tokens=add_special_tokens)]

    def encode_within(self, texts: Sequence[str], limit: int) -> list[tuple[list[int], list[int]]]:
        """(ids, token types) of each of `texts` with its special tokens: its first ones if there are more than `limit`.

        Raises:
            TokenizerError: TK-LIMIT if the special tokens alone are more; else as `encode` does.
        """
        for text in texts:
            _check_text(text, self._path)
        with _panics_typed(self._path, "encoding texts"):
            special = self._rust.num_special_tokens_to_add(False)
            if special > limit:
                raise TokenizerError("TK-LIMIT", f"adds {special} tokens to a text, and {limit} are the most", path=self._path)
            found = []
            for one in self._rust.encode_batch(list(texts), add_special_tokens=False):
                one.truncate(limit - special)
                whole = self._rust.post_process(one)
                found.append((list(whole.ids), list(whole.type_ids)))
            return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Ids that stand for no token (rows that pad a model's vocabulary) have no text."""
        try:
            with _panics_typed(self._path, "decoding ids"):
                return self._rust.decode(list(ids), skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as problem:
            wrong = next((item for item in ids if isinstance(item, bool) or not isinstance(item, int) or item < 0), max(ids))
            raise TokenizerError("TK-VOCAB", f"{quoted(wrong)} is no token id", path=self._path) from problem

    def token_to_id(self, token: str) -> int | None:
        _check_text(token, self._path)
        return self._rust.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        """The token as the vocabulary spells it; None for an id without one."""
        return self._rust.id_to_token(token_id)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; the model's own vocabulary may be padded beyond it."""
        return int(self._rust.get_vocab_size(with_added_tokens=True))

    def to_json(self) -> str:
        """The whole tokenizer as a tokenizer.json, with the tokens that the files beside it add."""
        return self._rust.to_str()

    @cached_property
    def special_tokens(self) -> frozenset[str]:
        """Tokens that `decode` leaves out with `skip_special_tokens`."""
        return frozenset(token.content for token in self._rust.get_added_tokens_decoder().values() if token.special)

    @cached_property
    def decoder_state(self) -> bytes | None:
        """The `decoder` of tokenizer.json, as JSON."""
        return None if self._rust.decoder is None else bytes(self._rust.decoder.__getstate__())

    @property
    def chat_template(self) -> str | None:
        """Source of the usual chat template."""
        return self.special.templates.get("default")

    @property
    def chat_template_origin(self) -> Path | None:
        """The file the usual chat template came from."""
        return self.special.origins.get("default")

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The text of a conversation, by the checkpoint's chat template (its `tool_use` one, where there is one, with tools).

        Raises:
            TemplateError: TM-MISSING without a template; else what `chat_template.render` raises.
        """
        from modelrig.generation.chat_template import render

        name = "tool_use" if tools and "tool_use" in self.special.templates else "default"
        if name not in self.special.templates:
            raise TemplateError(
                "TM-MISSING",
                "there is no chat template, so messages cannot become a prompt",
                path=self._root,
                hint="give a prompt instead of messages, or add a chat_template.jinja to the folder",
            )
        return render(
            self.special.templates[name],
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            path=self.special.origins[name],
            **{**self.special.tokens, **variables},
        )

    def encode_messages(self, messages: Sequence[Mapping[str, Any]], **how: Any) -> list[int]:
        """Ids of `render_chat(messages, **how)`. The template writes all special tokens, so none are added."""
        return self.encode(self.render_chat(messages, **how), add_special_tokens=False)

    def _named(self, name: str) -> int | None:
        token = self.special.tokens.get(name)
        return None if token is None else self._rust.token_to_id(token)


def _read(path: Path) -> bytes:
    with open_regular(path) as (descriptor, status):
        if status.st_size > MAX_BYTES:
            raise TokenizerError("TK-LIMIT", f"{status.st_size:,} bytes; at most {MAX_BYTES:,} are accepted", path=path)
        data = read_at(descriptor, MAX_BYTES + 1, 0, path)
    if data.startswith(b"version https://git-lfs"):
        hint = "run `git lfs pull` in the folder it came from"
        raise TokenizerError("TK-JSON", "a git-lfs pointer, not the file it points to", path=path, hint=hint)
    if len(data) > MAX_BYTES:
        raise TokenizerError("TK-LIMIT", f"more than {MAX_BYTES:,} bytes", path=path)
    return data


def _load(data: bytes, path: Path) -> tokenizers.Tokenizer:
    """Parse and try out: many files that make the library panic do so only when first used."""
    import tokenizers

    require_bounded(data, path)
    with _quiet_stderr(), _panics_typed(path, "reading it"):
        try:
            rust = tokenizers.Tokenizer.from_buffer(data)
            rust.no_truncation()  # a truncating tokenizer would silently drop text
            rust.no_padding()
            for add_special_tokens in (True, False):
                ids = rust.encode(TRIAL_TEXT, add_special_tokens=add_special_tokens).ids
                rust.decode(ids)
                for token in set(ids):
                    rust.decode([token])
        except Exception as problem:
            raise TokenizerError("TK-JSON", f"not a tokenizer the library can read: {quoted(str(problem))}", path=path) from problem
    return rust


def _check_text(text: Any, path: Path) -> None:
    if not isinstance(text, str):
        raise TokenizerError("TK-TEXT", f"a str is needed, this is {type(text).__name__}", path=path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as problem:
        reason = f"character {problem.start} is half of a surrogate pair ({quoted(text[problem.start])}), which is no text"
        raise TokenizerError("TK-TEXT", reason, path=path) from problem


@contextmanager
def _panics_typed(path: Path, doing: str) -> Iterator[None]:
    """A panic of the Rust library comes as a BaseException of a class that cannot be imported."""
    try:
        yield
    except BaseException as panic:
        if type(panic).__name__ != "PanicException":
            raise
        reason = f"the tokenizers library gave up while {doing}: {quoted(str(panic))}"
        raise TokenizerError("TK-PANIC", reason, path=path) from panic


@contextmanager
def _quiet_stderr() -> Iterator[None]:
    """Hold back what is written to file descriptor 2, and drop it if the block fails: a panic prints its backtrace there."""
    with _stderr_lock:
        if sys.stderr is not None:
            sys.stderr.flush()
        try:
            kept = os.dup(2)
        except OSError:  # there is no standard error
            yield
            return
        with tempfile.TemporaryFile() as held:
            try:
                os.dup2(held.fileno(), 2)
                yield
            except BaseException:
                held.truncate(0)
                raise
            finally:
                os.dup2(kept, 2)
                os.close(kept)
                held.seek(0)
                if text := held.read():
                    os.write(2, text)
