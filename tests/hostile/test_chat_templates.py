"""Chat templates made to hurt end in one typed error, within two seconds and little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modelrig.errors import TemplateError
from modelrig.generation.chat_template import render
from template_cases import CASES

RUNNER = Path(__file__).parent.parent / "template_cases.py"


@pytest.fixture(scope="module")
def outcomes():
    done = subprocess.run([sys.executable, RUNNER], capture_output=True, text=True, timeout=300, check=False)
    assert 0 == done.returncode, done.stdout[-500:] + done.stderr[-2000:]
    return {name: rest for name, *rest in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_template_ends_in_one_typed_error(outcomes, name):
    found, reason, seconds, grown_bytes = outcomes[name]
    assert CASES[name][1] == found, reason
    assert seconds < 2
    assert grown_bytes < 64 << 20
    assert len(reason) < 600
    assert " at 0x" not in reason


WORDS = (
    "{{ }} {% %} {%- -%} {# #} for in if else elif endif endfor set endset macro endmacro call endcall filter endfilter with "
    "endwith raw endraw generation endgeneration not and or is x y ns loop namespace range messages role content 'a' 1 0 none true "
    ". , ( ) [ ] { } : | + - * ** % ~ / // == < upper list map join sum sort tojson replace format batch default length first "
    "__class__ items split"
)
OPERATORS = ["+", "-", "*", "**", "%", "~", "/", "//", "==", "in", "<", "and"]
FILTERS = [
    "list",
    "sum",
    "sort",
    "join",
    "tojson",
    "upper",
    "first",
    "last",
    "length",
    "map('upper')",
    "batch(2)",
    "dictsort",
    "items",
]
MEMBERS = [".items()", ".split('b')", ".content", "[0]", ".format(1, k=2)", ".get('role')", "[1:]"]
VALUES = ["messages", "messages[0]", "'ab'", "1", "0", "none", "x", "[1, 'a']", "{'k': 2}", "(1,)", "range(3)", "ns", "2.5"]


@given(st.lists(st.sampled_from(WORDS.split()), max_size=30).map(" ".join))
@settings(deadline=2000, max_examples=400)
def test_any_template_renders_or_is_a_typed_error(source):
    try:
        assert isinstance(render(source, [{"role": "user", "content": "hello"}]), str)
    except TemplateError as error:
        assert error.code.startswith("TM-")


EXPRESSIONS = st.recursive(
    st.sampled_from(VALUES),
    lambda inner: st.one_of(
        st.builds("({} {} {})".format, inner, st.sampled_from(OPERATORS), inner),
        st.builds("({} | {})".format, inner, st.sampled_from(FILTERS)),
        st.builds("{}{}".format, inner, st.sampled_from(MEMBERS)),
        st.lists(inner, max_size=3).map(lambda parts: f"[{', '.join(parts)}]"),
    ),
    max_leaves=8,
)


@given(EXPRESSIONS, EXPRESSIONS)
@settings(deadline=2000, max_examples=400)
def test_any_expression_renders_or_is_a_typed_error(one, other):
    source = f"{{% set ns = namespace(a=1) %}}{{% set x = {one} %}}{{% for y in x %}}{{{{ y }}}}{{% endfor %}}{{{{ {other} }}}}"
    try:
        assert isinstance(render(source, [{"role": "user", "content": "hello"}]), str)
    except TemplateError as error:
        assert error.code in ("TM-INPUT", "TM-BUDGET", "TM-SANDBOX")
