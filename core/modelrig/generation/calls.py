"""From the arguments of `generate` to a run of the loop."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import attrs
from attrs import frozen

from modelrig.components import Decoder
from modelrig.errors import CacheError, GenerateError
from modelrig.generation.defaults import Call
from modelrig.generation.feeding import Engine
from modelrig.generation.inputs import as_prompts
from modelrig.generation.loop import Run
from modelrig.generation.options import Grammar
from modelrig.planning.negotiation import Choice
from modelrig.planning.tokenizer_files import no_text

if TYPE_CHECKING:
    from modelrig.components import Cache, DecoderMaker, TokenMask
    from modelrig.generation.caches import CachePool
    from modelrig.planning.plan import RigPlan

Message = Mapping[str, Any]


@frozen(eq=False)
class Caller:
    """Starts the calls of one model.

    Args:
        plan: what was decided.
        engine: what the loop needs of the model.
        pool: caches for calls that bring none of their own.
        maker_of: the implementation of a decoder that was chosen.
        companions: role → further model.
        compile: what makes the masks of a grammar, in a call that these ids end.
    """

    plan: RigPlan
    engine: Engine
    pool: CachePool
    maker_of: Callable[[Choice], DecoderMaker]
    companions: Mapping[str, Any]
    compile: Callable[[Grammar, Sequence[int]], Callable[[], TokenMask]]

    def start(self, prompt: Any, messages: Sequence[Message] | None, cache: Cache | None, given: dict[str, Any]) -> Run:
        """See `modelrig.model.Model.start`."""
        call = Call.make(self.plan.generation, given)
        prompts, is_single = self.read(prompt, messages, follows=cache is not None and cache.length > 0)
        run = self._with_own(prompts, call) if cache is None else self._with(cache, prompts, call)
        run.is_single = is_single and call.options.num_return_sequences == 1
        return run

    def read(self, prompt: Any, messages: Sequence[Message] | None, *, follows: bool) -> tuple[list[list[int]], bool]:
        """(ids of each prompt, whether it was a single one). A text that `follows` others begins without special tokens."""
        tokenizer, size = self.engine.tokenizer, self.plan.facts.vocab_size
        self.plan.require_generation()
        if (prompt is None) == (messages is None):
            raise GenerateError("GN-INPUT", "give either a prompt or messages")
        if messages is not None:
            if tokenizer is None:
                raise no_text(self.engine.other_form, "read messages")
            return as_prompts(tokenizer.encode_messages(messages), None, size)
        return as_prompts(prompt, tokenizer, size, add_special_tokens=not follows, other_form=self.engine.other_form)

    def read_turn(self, prompt: Any, messages: Sequence[Message] | None, follows: bool) -> list[int]:
        """The ids of one turn of a session."""
        rows, _ = self.read(prompt, messages, follows=follows)
        if len(rows) != 1:
            raise GenerateError("GN-INPUT", "a session has one conversation, not a batch")
        return rows[0]

    def start_turn(self, cache: Cache, ids: list[int], kept: int, call: Call) -> Run:
        """A turn of a session: `ids` are the whole conversation, of which `cache` holds the first `kept`."""
        if call.options.num_return_sequences != 1:
            raise GenerateError("GN-ARGS", "a session has one answer a turn", locus="num_return_sequences")
        limit = call.limit(len(ids) - kept, kept, cache.capacity, self.plan.facts.context_length, unfed=1)
        return self._run(cache, [ids[kept:]], [ids], call, limit)

    def _with_own(self, prompts: Sequence[Sequence[int]], call: Call) -> Run:
        """A run in a cache of the pool, with a row for each prompt, which is forked for more."""
        longest = max(map(len, prompts))
        multiple = call.options.pad_to_multiple_of or 1
        limit = call.limit(longest, 0, self.plan.context, self.plan.facts.context_length, unfed=1)
        room = self.plan.context - (longest + limit - 1)
        extra = min(-longest % multiple, room)
        padding = _padding(prompts, longest + extra, call)
        cache = self.pool.borrow(len(prompts), longest + extra + limit - 1, padding)
        try:
            run = self._run(cache, prompts, prompts, call, limit, extra=extra, returns=call.options.num_return_sequences)
            if run.num_forked:
                self.pool.require_room_to_fork(cache, run.num_forked)
        except BaseException:
            self.pool.give_back(cache)
            raise
        run.on_end = lambda: self.pool.give_back(cache)
        return run

    def _with(self, cache: Cache, prompts: Sequence[Sequence[int]], call: Call) -> Run:
        """A run in a cache of the caller's, which has a row for each text that is wanted and keeps the answers."""
        copies = call.options.num_return_sequences
        rows = [prompt for prompt in prompts for _ in range(copies)]
        if cache.batch != len(rows):
            raise CacheError("CA-ARGS", f"the cache has {cache.batch} rows, there are {len(rows)} prompts", locus="batch")
        longest = max(map(len, rows))
        follows = cache.length > 0
        if follows and any(len(row) != longest for row in rows):
            raise GenerateError("GN-INPUT", "prompts that continue a cache must have the same length, or run alone")
        limit = call.limit(longest, cache.length, cache.capacity, self.plan.facts.context_length, unfed=0)
        multiple = 1 if follows else call.options.pad_to_multiple_of or 1
        extra = min(-longest % multiple, cache.capacity - (cache.length + longest + limit))
        run = self._run(cache, rows, rows, call, limit, extra=extra, ranks=[copy for _ in prompts for copy in range(copies)])
        run.keeps_answer = True
        if not follows and (padding := _padding(rows, longest + extra, call)) is not None:
            cache.reset(padding)
        return run

    def _run(
        self,
        cache: Cache,
        prompts: Sequence[Sequence[int]],
        histories: Sequence[Sequence[int]],
        call: Call,
        limit: int,
        **more: Any,
    ) -> Run:
        choice = self._decoder(call)
        options = call.options
        if isinstance(options.constraint, Grammar):
            options = attrs.evolve(options, constraint=self.compile(options.constraint, self.engine.end_ids(options)))
        return Run(
            self.engine,
            self.maker_of(choice),
            cache,
            prompts,
            histories,
            options,
            limit,
            choice.options,
            companions=self.companions,
            **more,
        )

    def _decoder(self, call: Call) -> Choice:
        choice = self.plan.choices["decoders"]
        descriptor = choice.registered.descriptor
        assert isinstance(descriptor, Decoder)
        if call.options.is_greedy or descriptor.capabilities.samples:
            return choice
        if self.plan.decoder_when_sampling is None:
            raise GenerateError(
                "GN-ARGS", f"the decoder {choice.name} does not sample", locus="temperature", hint="plan with decoder='auto'"
            )
        return self.plan.decoder_when_sampling


def _padding(rows: Sequence[Sequence[int]], length: int, call: Call) -> list[int] | None:
    """Pad tokens on the left of each row; None if there are none. Where lengths are rounded up there may be none by chance: what is
    compiled for padded rows then serves too."""
    padding = [length - len(row) for row in rows]
    return padding if any(padding) or call.options.pad_to_multiple_of is not None else None
