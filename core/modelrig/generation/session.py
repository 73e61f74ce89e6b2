"""A conversation that keeps its cache: each turn prefills only what the cache does not hold yet."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelrig.errors import CacheError
from modelrig.generation.defaults import Call
from modelrig.generation.loop import Generation, Piece, Run
from modelrig.planning.generation_config import GenerationConfig

if TYPE_CHECKING:
    from modelrig.components import Cache

Message = Mapping[str, Any]


class Session:
    """Made by `model.session()`. Turn by turn the token ids are compared with those in the cache; their common beginning is kept.

    * `generate(text)` and `generate([ids])` continue the text of the turns before.
    * `generate(messages=[...])` renders a whole conversation through the chat template, and
      `send(content)` adds one user message to the session's own conversation, and the answer to it.

    Attributes:
        tokens: every token id of the conversation so far, prompts and answers.
        messages: the conversation that `send` keeps.
        answer: the newest answer to `send`, whole or as far as it came.
    """

    def __init__(
        self,
        cache: Cache,
        encode: Callable[[Any, Sequence[Message] | None, bool], list[int]],
        start: Callable[[Cache, list[int], int, Call], Run],
        defaults: GenerationConfig,
        save: Callable[..., Path],
    ) -> None:
        self.cache, self._encode, self._start, self._defaults, self._save = cache, encode, start, defaults, save
        self.tokens: list[int] = []
        self.messages: list[dict[str, Any]] = []
        self.answer: Generation | None = None
        self._run: Run | None = None  # the newest turn

    def generate(self, prompt: Any = None, *, messages: Sequence[Message] | None = None, **options: Any) -> Generation:
        """One turn; options as in `model.generate`."""
        run = self._turn(prompt, messages, options)
        for _ in self._follow(run):
            pass
        return run.results()[0]

    def stream(self, prompt: Any = None, *, messages: Sequence[Message] | None = None, **options: Any) -> Iterator[Piece]:
        """One turn, piece by piece. What was produced stays in the session, until the stream is closed or the next turn begins."""
        return self._follow(self._turn(prompt, messages, options))

    def send(self, content: str, **options: Any) -> Generation:
        """Add a user message, return the answer, keep both."""
        for _ in self.stream_send(content, **options):
            pass
        assert self.answer is not None
        return self.answer

    def stream_send(self, content: str, **options: Any) -> Iterator[Piece]:
        """`send`, piece by piece. An interrupted answer is kept as far as it came."""
        asked = [*self.messages, {"role": "user", "content": content}]
        run = self._turn(None, asked, options)
        try:
            yield from self._follow(run)
        finally:
            if self._run is run:
                self.answer = run.results()[0]
                self.messages = [*asked, {"role": "assistant", "content": self.answer.text}]

    def reset(self) -> None:
        """Forget the conversation; the cache's memory stays allocated."""
        self.cache.reset()
        self.tokens, self.messages, self.answer, self._run = [], [], None, None

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the conversation and its cache to a file, from which `model.session(path=...)` goes on. See `model.save_cache`."""
        return self._save(self.cache, path, self.tokens, self.messages)

    def _turn(self, prompt: Any, messages: Sequence[Message] | None, options: dict[str, Any]) -> Run:
        made = Call.make(self._defaults, options)
        ids = self._encode(prompt, messages, bool(self.tokens))
        if messages is None:
            ids = self.tokens + ids
        run = self._start(self.cache, ids, self._keep(ids), made)
        self.tokens, self._run = list(ids), run  # a list of its own: the run looks at its ids when it has to begin anew
        return run

    def _keep(self, ids: list[int]) -> int:
        """Rewind the cache to the common beginning of what it holds and `ids`; at least one id is left to prefill."""
        # The last token of an answer was chosen but not fed; after an interruption the cache may be shorter still.
        cached = self.tokens[: self.cache.length]
        kept, limit = 0, min(len(cached), len(ids) - 1)
        while kept < limit and cached[kept] == ids[kept]:
            kept += 1
        try:
            self.cache.rewind(kept)
        except CacheError:  # a cache that does not keep that much: prefill again
            self.cache.reset()
            kept = 0
        return kept

    def _follow(self, run: Run) -> Iterator[Piece]:
        """The pieces of `run`, until another turn or a reset takes the cache over."""
        pieces = iter(run)
        while self._run is run and (piece := next(pieces, None)) is not None:
            self.tokens.extend(piece.tokens)
            yield piece
