"""Text of ids that arrive one by one: never half a character, and together exactly what decoding all ids at once gives.

What a token means can depend on its neighbours, and how far depends on the decoder of tokenizer.json:

* byte-level decoders join bytes: a character may be spread over several tokens, nothing else;
* the others look at the token before and after it, or at the beginning of the text. They are asked again for a short window of
  the latest tokens. A run of byte-fallback tokens is held until it ends: one wrong byte turns all of its text into U+FFFD;
* a decoder that is not known to work like this gives its text at the end.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Mapping
from itertools import count
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from modelrig.generation.tokenizer import Tokenizer

__all__ = ["Detokenizer"]


class Detokenizer:
    """Text of a stream of ids.

    Attributes are private; one object serves one row: `push` each id, then `finish` once. The concatenation of everything
    returned equals `tokenizer.decode(ids, skip_special_tokens)`. Work per id is constant on average.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skipped = tokenizer.special_tokens if skip_special_tokens else frozenset()
        self._stream = _stream_for(tokenizer)

    def push(self, token_id: int) -> str:
        """The text that became certain with this id; may be empty."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None or token in self._skipped:
            return ""
        return self._stream.push(token_id, token)

    def finish(self) -> str:
        """The text that was still uncertain: there are no more ids."""
        return self._stream.finish()


class _Stream(Protocol):
    def push(self, token_id: int, token: str) -> str: ...
    def finish(self) -> str: ...


class _ByteLevel:
    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int, token: str) -> str:  # noqa: ARG002 - one shape for all streams
        try:
            data = bytes(map(BYTE_OF.__getitem__, token))
        except KeyError:  # an added token with a character beyond the byte alphabet stands for itself
            data = token.encode("utf-8")
        return self._utf8.decode(data)

    def finish(self) -> str:
        return self._utf8.decode(b"", final=True)


class _Windowed:
    """Decodes the latest ids again. `_before` are the ids whose text is out already, kept as context; `_new` those held back."""

    def __init__(self, tokenizer: Tokenizer, has_byte_tokens: bool) -> None:
        self._tokenizer, self._has_byte_tokens = tokenizer, has_byte_tokens
        self._before: list[int] = []
        self._new: list[int] = []
        self._num_context = 0  # how many of `_before` it takes; perhaps one token without text follows them
        self._shown = ""  # the text of `_before` alone

    def push(self, token_id: int, token: str) -> str:
        self._new.append(token_id)
        return "" if self._has_byte_tokens and BYTE_TOKEN.fullmatch(token) else self._advance()

    def finish(self) -> str:
        return self._advance() if self._new else ""

    def _advance(self) -> str:
        window = self._before + self._new
        text = self._tokenizer.decode(window, skip_special_tokens=False)
        added = text[len(self._shown) :]
        if added or not self._shown:
            self._before, self._shown = self._context(window, len(self._new))
        else:
            # Tokens without text between tokens with text matter to nobody; keep one, as it is the latest neighbour.
            self._before = [*self._before[: self._num_context], window[-1]]
        self._new = []
        return added

    def _context(self, window: list[int], size: int) -> tuple[list[int], str]:
        """The shortest end of `window` (from `size` ids on, doubling) that has text: only then has the decoder done what it
        does at the beginning of a text, such as dropping a space, and will not do it to what follows."""
        while True:
            tail = window[-size:]
            text = self._tokenizer.decode(tail, skip_special_tokens=False)
            if text or size >= len(window):
                self._num_context = len(tail)
                return tail, text
            size *= 2


class _AtTheEnd:
    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._ids: list[int] = []

    def push(self, token_id: int, token: str) -> str:  # noqa: ARG002
        self._ids.append(token_id)
        return ""

    def finish(self) -> str:
        ids, self._ids = self._ids, []
        return self._tokenizer.decode(ids, skip_special_tokens=False)


# One letter per step of a decoder, and the orders of steps that look no further than a window. Replace and Strip work token by
# token until Fuse has made one text of them.
LETTERS = {"Replace": "R", "ByteFallback": "B", "Fuse": "F", "Strip": "S", "Metaspace": "M", "WordPiece": "W", "BPEDecoder": "P"}
LOCAL = re.compile(r"R*B?F?S?|M|W|P")
#: as the library reads it: two hexadecimal digits, or one with a sign
BYTE_TOKEN = re.compile(r"<0x(?:[0-9A-Fa-f]{2}|\+[0-9A-Fa-f])>")


def _stream_for(tokenizer: Tokenizer) -> _Stream:
    state = tokenizer.decoder_state
    if state is None:
        return _Windowed(tokenizer, has_byte_tokens=False)
    decoder = json.loads(state)
    steps: list[dict[str, Any]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    if [step["type"] for step in steps] == ["ByteLevel"]:
        return _ByteLevel()
    letters = "".join(LETTERS.get(step["type"], "?") for step in steps)
    if not LOCAL.fullmatch(letters) or not all(_is_local(step, "B" in letters) for step in steps):
        return _AtTheEnd(tokenizer)
    return _Windowed(tokenizer, has_byte_tokens="B" in letters)


def _is_local(step: Mapping[str, Any], has_byte_tokens: bool) -> bool:
    if step["type"] == "Strip":
        return step["stop"] == 0  # else the end of the text so far is not the end of the text
    if step["type"] == "Replace" and has_byte_tokens:
        return bool(step["pattern"] == {"String": "▁"} and step["content"] == " ")  # must not make byte tokens of others
    return True


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's characters for bytes: those that can be printed stand for themselves, the others for 256, 257, ..."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = count(256)
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}


BYTE_OF = _byte_alphabet()
