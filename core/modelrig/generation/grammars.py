"""Constraints in words: which component serves their language, and masks made by it.

A constraint is no part of a plan. Of the components that declare its language the first active one serves, in the order of the
registry; a call may name another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from modelrig.components import Constraint
from modelrig.errors import GenerateError, ModelrigError, PluginError, nearest, quoted
from modelrig.generation.options import Grammar
from modelrig.planning.request import Request
from modelrig.planning.tokenizer_files import OtherForm, no_text
from modelrig.registry import Registered, Registry, current

if TYPE_CHECKING:
    from modelrig.components import ConstraintCompiler, TokenMask
    from modelrig.generation.tokenizer import Tokenizer

KIND = Constraint.kind
GUIDE = "install a plugin that serves it; docs/how-to/constrain-output.md names one"

__all__ = ["Grammars", "find"]


class Grammars:
    """What compiles the constraints of one model. Compilers are made when first needed, and kept.

    Args:
        request: what the plan was made of: it may switch components off, or prefer some.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer | None, vocab_size: int, other_form: OtherForm | None) -> None:
        self._request, self._tokenizer, self._vocab_size, self._other_form = request, tokenizer, vocab_size, other_form
        self._compilers: dict[str, tuple[Any, ConstraintCompiler]] = {}  # id → (what makes it, it)

    def compile(self, grammar: Grammar, end_ids: Sequence[int]) -> Callable[[], TokenMask]:
        """What makes a mask for each row.

        Raises:
            GenerateError: GN-CONSTRAINT if nothing installed serves it or it cannot be compiled, GN-TOKENIZER without a tokenizer.
            RequestError, PluginError: the component it names is not there, or not active; PL-CONTRACT for one that fails.
        """
        serving = find(grammar, current(disable=self._request.disable), self._request.prefer)
        if self._tokenizer is None:
            raise no_text(self._other_form, "follow a grammar of texts", locus="constraint")
        made, compiler = self._compilers.get(serving.id, (None, None))
        if compiler is None or made is not serving.implementation():
            made = serving.implementation()
            compiler = _guarded(serving, lambda: made(self._tokenizer, self._vocab_size))
            self._compilers[serving.id] = (made, compiler)
        make = _guarded(serving, lambda: compiler.compile(grammar.language, grammar.text, end_ids))
        if not callable(make):
            raise _broken(serving, f"compile returned {quoted(make)}, which makes no masks")
        return lambda: _guarded(serving, make)


def find(grammar: Grammar, registry: Registry, prefer: Sequence[str] = ()) -> Registered:
    """The component that serves `grammar`.

    Raises:
        GenerateError: GN-CONSTRAINT if there is none, with what is installed, and the commands that would make more of it serve.
        RequestError, PluginError: the component it names is not there, or not active.
    """
    if grammar.name is not None:
        serving = registry.find(KIND, grammar.name)
        if grammar.language in _languages(serving):
            return serving
        raise _unserved(grammar, f"{serving.name} does not serve constraints", [serving])
    there = registry.components(KIND, prefer)
    speaking = [one for one in there if grammar.language in _languages(one)]
    serving_ = next((one for one in speaking if one.state == "active"), None)
    if serving_ is None:
        raise _unserved(grammar, "nothing that is installed serves constraints", there)
    return serving_


def _unserved(grammar: Grammar, says: str, there: Sequence[Registered]) -> GenerateError:
    speaking = [one for one in there if grammar.language in _languages(one)]
    others = [] if speaking else sorted({language for one in there for language in _languages(one)})
    shown = [
        f"{one.name} ({', '.join(sorted(_languages(one)))}{'' if one.state == 'active' else f'; {one.state}: {one.reason}'})"
        for one in there
    ]
    text = f"{says} in the language {quoted(grammar.language)}{nearest(grammar.language, others)}"
    installed = ", ".join(shown) or "no component of this kind"
    hint = next((one.descriptor.install for one in speaking if one.state == "unavailable"), None)
    return GenerateError("GN-CONSTRAINT", f"{text}; installed: {installed}", locus="constraint", hint=hint or GUIDE)


def _languages(component: Registered) -> frozenset[str]:
    assert isinstance(component.descriptor, Constraint)
    return component.descriptor.languages


def _guarded(serving: Registered, call: Callable[[], Any]) -> Any:
    """What `call` returns; a failure that the component did not name itself is its own."""
    try:
        return call()
    except (ModelrigError, KeyboardInterrupt):
        raise
    except BaseException as error:  # panics of Rust extensions too
        raise _broken(serving, f"failed with {type(error).__name__}: {quoted(str(error))}") from error


def _broken(serving: Registered, says: str) -> PluginError:
    return PluginError("PL-CONTRACT", f"constraint {serving.id} {says}", plugin=serving.id, distribution=serving.distribution)
