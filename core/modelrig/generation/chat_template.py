"""Messages to a prompt, by the checkpoint's chat template.

The template is a program that came with the weights. It runs in jinja2's sandbox, may use only what is listed in
`template_filters.py` and `template_sandbox.py`, and has a budget (`template_budget.py`). What it renders is what transformers'
`apply_chat_template` renders.
"""

from __future__ import annotations

import functools
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from types import CodeType
from typing import TYPE_CHECKING, Any

from modelrig.errors import TemplateError, quoted

if TYPE_CHECKING:
    from jinja2 import Template

__all__ = ["render"]

MAX_SOURCE = 64 << 10  # characters; the longest in use are about half of it
MAX_DEPTH = 32  # of lists and objects in messages, tools and variables
REASONING = ("reasoning_content", "thinking", "reasoning")  # the same field under its three names


def render(
    source: str,
    messages: Sequence[Mapping[str, Any]],
    *,
    bos_token: str | None = None,
    eos_token: str | None = None,
    add_generation_prompt: bool = True,
    tools: Sequence[Mapping[str, Any]] | None = None,
    documents: Sequence[Mapping[str, Any]] | None = None,
    now: datetime | None = None,
    path: str | Path | None = None,
    **variables: Any,
) -> str:
    """The prompt for a conversation.

    Args:
        source: the template.
        messages: each an object with `role` and `content`, a text or a list of `{"type": "text", "text": ...}`; a template that
            does not loop over such parts gets them joined by line ends.
        bos_token, eos_token, variables: what the template sees under these names; JSON values. None means not defined.
        add_generation_prompt: end with the beginning of the assistant's answer.
        tools, documents: lists of JSON objects, if any.
        now: the time for `strftime_now`.
        path: where the template came from, for errors.

    Raises:
        TemplateError: TM-SYNTAX, TM-SANDBOX (it reaches for what is not offered), TM-BUDGET (too much work), TM-RAISED (it refused
            the messages), TM-INPUT (messages that no template, or not this one, can take).
    """
    from modelrig.generation.template_budget import Budget
    from modelrig.generation.template_sandbox import Sandbox

    with _failures_typed(path):
        if len(source) > MAX_SOURCE:
            raise TemplateError("TM-BUDGET", f"{len(source):,} characters; at most {MAX_SOURCE:,} are accepted")
        code, takes_parts = _compiled(source)
        values = {
            "messages": [
                _message(message, f"messages[{at}]", takes_parts) for at, message in enumerate(_listed(messages, "messages"))
            ],
            "tools": None if tools is None else [_object(tool, f"tools[{at}]") for at, tool in enumerate(_listed(tools, "tools"))],
            "documents": None if documents is None else [_object(one, "documents") for one in _listed(documents, "documents")],
            "add_generation_prompt": bool(add_generation_prompt),
        }
        given = {"bos_token": bos_token, "eos_token": eos_token, **variables}
        values |= {name: _plain(value, name) for name, value in given.items() if value is not None}
        environment = Sandbox(Budget(values.values(), len(messages)), now)
        template = environment.template_class.from_code(environment, code, environment.make_globals(None))
        with _failures_typed(path, template):
            return _run(template, values, environment.budget)


def _run(template: Template, values: Mapping[str, Any], budget: Any) -> str:
    parts, length = [], 0
    for part in template.root_render_func(template.new_context(dict(values))):
        length += len(part)
        budget.size(length)
        parts.append(part)
    return "".join(parts)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> tuple[CodeType, bool]:
    from modelrig.generation.template_sandbox import compiled

    return compiled(source)


@contextmanager
def _failures_typed(path: str | Path | None, template: Template | None = None) -> Iterator[None]:
    """Every way a template can fail as one `TemplateError`, with the template's line where it is known."""
    from jinja2 import exceptions as jinja

    from modelrig.generation.template_budget import BudgetError
    from modelrig.generation.template_sandbox import RaisedError

    def refuse(code: str, reason: str, problem: BaseException) -> TemplateError:
        line = _line(problem, template)
        return TemplateError(code, reason + (f" (line {line})" if line else ""), path=path)

    try:
        yield
    except TemplateError as problem:
        if problem.path is not None or path is None:
            raise
        raise TemplateError(problem.code, problem.reason, path=path, locus=problem.locus, hint=problem.hint) from problem.__cause__
    except jinja.TemplateSyntaxError as problem:
        raise TemplateError("TM-SYNTAX", f"line {problem.lineno}: {quoted(problem.message or '')[1:-1]}", path=path) from problem
    except jinja.SecurityError as problem:
        raise refuse("TM-SANDBOX", quoted(str(problem))[1:-1], problem) from problem
    except RaisedError as problem:
        raise refuse("TM-RAISED", f"the template refuses these messages: {quoted(str(problem))}", problem) from problem
    except (BudgetError, RecursionError, MemoryError) as problem:
        reason = str(problem) if isinstance(problem, BudgetError) else f"it exhausts the {_exhausted(problem)}"
        raise refuse("TM-BUDGET", f"the template does too much: {reason}", problem) from problem
    except jinja.TemplateRuntimeError as problem:
        code = "TM-SYNTAX" if str(problem).startswith(("No filter named", "No test named")) else "TM-INPUT"
        raise refuse(code, f"the template fails on these messages: {quoted(str(problem))[1:-1]}", problem) from problem
    except Exception as problem:
        reason = f"the template fails on these messages: {type(problem).__name__}: {quoted(str(problem))[1:-1]}"
        raise refuse("TM-INPUT", reason, problem) from problem


def _exhausted(problem: BaseException) -> str:
    return "stack" if isinstance(problem, RecursionError) else "memory"


def _line(problem: BaseException, template: Template | None) -> int | None:
    if template is None:
        return None
    lines = [line for frame, line in traceback.walk_tb(problem.__traceback__) if frame.f_code.co_filename == "<template>"]
    return template.get_corresponding_lineno(lines[-1]) if lines else None


# ------------------------------------------------------------------------------------------------ what goes in


def _listed(values: Any, where: str) -> Sequence[Any]:
    if not isinstance(values, list | tuple):
        raise TemplateError("TM-INPUT", f"a list of objects is needed, this is {type(values).__name__}", locus=where)
    return values


def _message(message: Any, where: str, takes_parts: bool) -> dict[str, Any]:
    plain = _object(message, where)
    role, content = plain.get("role"), plain.get("content")
    if not isinstance(role, str) or not role:
        raise TemplateError("TM-INPUT", f"{quoted(role)}: a role is a text such as 'user'", locus=f"{where}.role")
    if isinstance(content, list):
        for at, part in enumerate(content):
            if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
                reason = f"{quoted(part)}: accepted is {{'type': 'text', 'text': ...}}"
                raise TemplateError("TM-INPUT", reason, locus=f"{where}.content[{at}]")
        if not takes_parts:
            plain["content"] = "\n".join(part["text"] for part in content)
    elif not isinstance(content, str) and not (content is None and plain.get("tool_calls")):
        raise TemplateError("TM-INPUT", f"{quoted(content)}: a content is a text or a list of parts", locus=f"{where}.content")
    reasoning = next((plain[name] for name in REASONING if plain.get(name) is not None), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TemplateError("TM-INPUT", f"an object is needed, this is {type(value).__name__}", locus=where)
    return dict(_plain(value, where))


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """A copy of JSON values: templates meet no other object, and nobody changes these meanwhile."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if depth >= MAX_DEPTH:
        raise TemplateError("TM-INPUT", f"nested more than {MAX_DEPTH} levels deep", locus=where)
    if isinstance(value, Mapping) and all(type(key) is str for key in value):
        return {key: _plain(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{where}[{at}]", depth + 1) for at, item in enumerate(value)]
    raise TemplateError("TM-INPUT", f"a value of type {type(value).__name__} is no JSON value", locus=where)
