"""Chat templates render what transformers renders, and every failure says what is wrong."""

import datetime
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import chat_template_utils

from modelrig.errors import TemplateError
from modelrig.generation.chat_template import render

TEMPLATES = {path.stem: path.read_text() for path in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}

SYSTEM = {"role": "system", "content": "You are terse. <b>&\"'"}
USER = {"role": "user", "content": "  What is 2+2? 漢字 😀\n"}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 4."}
THOUGHT = {"role": "assistant", "content": "4", "reasoning_content": "two and two"}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": [None, True, "é<"]}}}
    ],
}
RESULT = {"role": "tool", "content": "4", "name": "add"}
PARTS = {"role": "user", "content": [{"type": "text", "text": " one"}, {"type": "text", "text": "two "}]}
TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds <two> numbers & more",
        "parameters": {
            "type": "object",
            "properties": {"b": {"type": "string", "enum": ["x", 1]}, "a": {"type": "number", "description": "é"}},
            "required": ["a"],
        },
    },
}
CONVERSATIONS = {
    "one question": [USER],
    "with a system prompt": [SYSTEM, USER],
    "several turns": [SYSTEM, USER, ANSWER, USER],
    "an answer at the end": [USER, THOUGHT],
    "a tool call and its result": [SYSTEM, USER, CALL, RESULT, ANSWER, USER],
}


def theirs(template, messages, tools=None, add_generation_prompt=True, **variables):
    rendered, _ = chat_template_utils.render_jinja_template(
        [messages], tools=tools, chat_template=template, add_generation_prompt=add_generation_prompt, **SPECIAL, **variables
    )
    return rendered[0]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("tools", [None, [TOOL, TOOL]], ids=["no tools", "tools"])
@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_the_prompt_is_that_of_transformers(name, conversation, tools, add_generation_prompt):
    given = CONVERSATIONS[conversation], tools, add_generation_prompt
    variables = {"date_string": "26 Jul 2024", "enable_thinking": False}
    expected = theirs(TEMPLATES[name], *given, **variables)
    messages, tools, add = given
    assert expected == render(TEMPLATES[name], messages, tools=tools, add_generation_prompt=add, **SPECIAL, **variables)


def test_parts_of_a_content_reach_a_template_that_looks_into_them():
    assert theirs(TEMPLATES["turns"], [PARTS]) == render(TEMPLATES["turns"], [PARTS], **SPECIAL)


def test_parts_of_a_content_are_joined_for_a_template_that_does_not():
    assert "user:  one\ntwo " == render("{% for m in messages %}{{ m.role + ': ' + m.content }}{% endfor %}", [PARTS])


EXPRESSIONS = [
    "{% for i in range(3) %}{{ loop.index }}/{{ loop.length }}{{ loop.cycle('a', 'b') }}{{ loop.changed(i // 2) }} {% endfor %}",
    "{% for a, b in {'x': 1, 'y': [2]}.items() %}{{ a ~ b }}{% else %}none{% endfor %}",
    "{% for i in range(9) if i is odd %}{% if i == 7 %}{% break %}{% endif %}{{ i }}{{ loop.revindex }}{% endfor %}",
    "{% for x in messages|map(attribute='role') %}{{ loop.length }}{{ x }}{% endfor %}",
    "{% for x in undefined_name %}x{% else %}empty{% endfor %}{{ undefined_name }}{{ undefined_name is defined }}",
    "{% macro f(a, b=2) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{% endmacro %}{{ f(1, 3, 4, c=5) }}{{ f('x') }}",
    "{% macro f() %}<{{ caller('é') }}>{% endmacro %}{% call(x) f() %}{{ x }}{{ x|length }}{% endcall %}",
    "{% set ns = namespace(a=1, items=[]) %}{% for i in [1, 2] %}{% set ns.items = ns.items + [i] %}{% endfor %}{{ ns['items'] }}",
    "{% set x %}a {{ 1 + 1 }}{% endset %}{{ x }}{% filter upper %}b{{ x }}{% endfilter %}{% with y = 3 %}{{ y }}{% endwith %}",
    "{{ 'a,b,,c'.split(',') }}{{ 'a b  c'.split() }}{{ 'a-b-c'.rsplit('-', 1) }}",
    "{{ 'x\ny'.splitlines() }}{{ 'aXb'.partition('X') }}",
    "{{ ' a '.strip() }}|{{ 'xxaxx'.strip('x') }}|{{ 'abc'.replace('b', 'BB') }}|{{ 'abc'.title().find('B') }}|{{ 'a'.center(5) }}",
    "{{ '%s-%05.1f-%(' % ('a', 2) if false else '%s-%05.1f' % ('a', 2) }}{{ '%(k)s' % {'k': 1} }}{{ '%d%%'|format(5) }}",
    "{{ '{} {0!r:>5}'.format('a') if false else '{} {!r:>5} {k[0].x}'.format('a', 'b', k=[{'x': 3}]) }}",
    "{{ [3, 1, 2]|sort }}{{ [1, 1, 2]|unique|list }}",
    "{{ [1, 2, 3, 4]|batch(3, 0)|list }}{{ [1, 2, 3]|slice(2)|list }}{{ [1, 2.5]|sum }}",
    "{{ messages|groupby('role') }}{% for g in messages|groupby('role') %}{{ g.grouper }}{{ g.list|length }}{% endfor %}",
    "{{ messages|selectattr('role', 'in', ['user'])|map(attribute='content')|join('|') }}{{ messages|rejectattr('role')|list }}",
    "{{ messages|sum(attribute='content', start='') if false else [{'n': 1}, {'n': 2}]|sum(attribute='n') }}",
    "{{ [[1], [2]]|sum(start=[]) }}",
    "{{ {'b': 1, 'a': {'c': [1.5, none, true]}}|tojson }}",
    "{{ {'b': '<é>\"\\u0007'}|tojson(indent=2) }}{{ [1]|tojson(ensure_ascii=true) }}",
    "{{ {'b': 1, 'a': 2}|tojson(sort_keys=true, separators=(',', ':')) }}",
    "{{ {'a': 1}|dictsort }}{{ {'a': 1}|items|list }}{{ {}|tojson }}",
    "{{ 'a<b>'|e }}{{ 'x'|safe }}{{ 7.6|round|int }}{{ '5'|int + 2 }}{{ -3|abs }}{{ none|default('d', true) }}{{ nope|d('e') }}",
    "{{ 'line\nline'|indent(2, true) }}{{ 'text here'|truncate(6) }}",
    "{{ 'abc'|reverse }}{{ 'abc'|first }}{{ [1, 2]|last }}{{ 'ab cd'|title }}",
    "{{ [1, 2][-1] }}{{ 'abcdef'[1:5:2] }}{{ messages[0:1][0].role }}",
    "{{ (1, 2) + (3,) }}{{ [0] * 3 }}{{ 'ab' * 2 }}{{ 2 ** 10 }}{{ 7 // 2 }}",
    "{{ 1 if x else 2 }}{{ 'a' in 'abc' }}{{ 1 < 2 < 3 }}{{ not true or false }}",
    "{{ 3 is divisibleby 3 }}{{ 'a' is eq 'a' }}{{ [] is sequence }}",
    "{{ dict(a=1) }}{{ dict([('x', 2)]) }}{{ range(5)|list }}{{ range(0, 9, 4)|join(',') }}{{ 5|string ~ none ~ 1.0 ~ [1, 'a'] }}",
    "{%- set c = cycler('a', 'b') %}{{ c.next() }}{{ c.next() }}{{ c.current }}{% set j = joiner('+') %}{{ j() }}x{{ j() }}y",
    "  {% if true %}\n  kept\n  {% endif %}\n{#- gone -#}\n  {% raw %}{{ as it is }}{% endraw %}\n\nend\n",
    "{% generation %}{% set inner = 1 %}said{% endgeneration %}{{ inner is defined }}{{ tools }}{{ documents }}{{ bos_token }}",
    "{{ messages[0].get('nope', 'd') }}{{ messages[0].keys()|list }}",
    "{{ messages[0].content.upper() }}{{ messages[0]['role']|length }}",
    "{{ messages|map('items')|map('list')|list|length }}{{ ['a', 'B']|map('upper')|join }}",
    "{{ ['b', 'a']|min }}{{ [1, 'x', none]|select('string')|list }}",
]


@pytest.mark.parametrize("template", EXPRESSIONS)
def test_what_templates_use_works_as_in_transformers(template):
    messages = [USER, ANSWER]
    assert theirs(template, messages) == render(template, messages, **SPECIAL)


def test_the_date_is_the_one_given_or_now():
    day = datetime.datetime(2024, 7, 26, 12, 0)
    assert "26 Jul 2024" == render("{{ strftime_now('%d %b %Y') }}", [], now=day)
    assert str(datetime.date.today().year) in {render("{{ strftime_now('%Y') }}", []), str(datetime.date.today().year)}


def test_a_token_that_is_not_given_is_not_defined():
    assert "False" == render("{{ bos_token is defined }}", [])


def test_further_variables_reach_the_template():
    assert "[1, {'a': 2}]" == render("{{ extra }}", [], extra=[1, {"a": 2}])


def test_reasoning_is_found_under_all_its_names():
    for name in ("reasoning_content", "thinking", "reasoning"):
        message = {"role": "assistant", "content": "4", name: "why"}
        template = "{{ messages[0].reasoning_content }} {{ messages[0].thinking }}"
        assert theirs(template, [message]) == render(template, [message])


def test_the_messages_given_are_not_changed():
    messages = [{"role": "assistant", "content": [{"type": "text", "text": "a"}], "thinking": "t"}]
    copy = [dict(message) for message in messages]
    render("{{ messages[0].content }}", messages)
    assert copy == messages


def test_long_conversations_render():
    messages = [USER, ANSWER] * 2000
    for name in ("headers", "chatml", "turns"):
        assert len(render(TEMPLATES[name], messages, date_string="", **SPECIAL)) > 100_000


def test_a_long_message_renders():
    messages = [{"role": "user", "content": "word " * 400_000}]
    for template in TEMPLATES.values():
        assert messages[0]["content"].strip() in render(template, messages, date_string="", **SPECIAL)


REFUSED = [
    ("{{ raise_exception('no ' + 'way') }}", "TM-RAISED", "'no way'"),
    ("{{ raise_exception(5) }}", "TM-RAISED", "int"),
    ("line\n{% for m in messages %}", "TM-SYNTAX", "line 2"),
    ("{{ messages | no_such_filter }}", "TM-SYNTAX", "no_such_filter"),
    ("{% if true %}{{ messages | no_such_filter }}{% endif %}", "TM-SYNTAX", "no_such_filter"),
    ("{{ messages is no_such_test }}", "TM-SYNTAX", "no_such_test"),
    ("{{ nothing.at.all }}", "TM-INPUT", "'nothing' is undefined"),
    ("\n\n{{ nothing() }}", "TM-INPUT", "line 3"),
    ("{{ messages[0].content + none }}", "TM-INPUT", "TypeError"),
    ("{{ 1 / 0 }}", "TM-INPUT", "ZeroDivisionError"),
    ("{{ messages[0].nope.more }}", "TM-INPUT", "no attribute 'nope'"),
]


@pytest.mark.parametrize(("template", "code", "said"), REFUSED)
def test_a_failure_has_a_code_and_says_why(template, code, said):
    with pytest.raises(TemplateError) as caught:
        render(template, [USER], path="/model/chat_template.jinja")
    assert (code, "/model/chat_template.jinja") == (caught.value.code, caught.value.path)
    assert said in str(caught.value)


MESSAGES = [
    ("text", "messages"),
    (None, "messages"),
    ({"role": "user"}, "messages"),
    (["text"], "messages[0]"),
    ([USER, {"content": "x"}], "messages[1].role"),
    ([{"role": 5, "content": "x"}], "messages[0].role"),
    ([{"role": "", "content": "x"}], "messages[0].role"),
    ([{"role": "user"}], "messages[0].content"),
    ([{"role": "user", "content": None}], "messages[0].content"),
    ([{"role": "user", "content": 5}], "messages[0].content"),
    ([{"role": "user", "content": ["x"]}], "messages[0].content[0]"),
    ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], "messages[0].content[0]"),
    ([{"role": "user", "content": "x", "extra": {"a": [object()]}}], "messages[0].extra.a[0]"),
    ([{"role": "user", "content": "x", 5: "y"}], "messages[0]"),
    ([{"role": "user", "content": b"x"}], "messages[0].content"),
]


@pytest.mark.parametrize(("messages", "locus"), MESSAGES, ids=str)
def test_messages_no_template_can_take_are_named(messages, locus):
    with pytest.raises(TemplateError) as caught:
        render("x", messages)
    assert ("TM-INPUT", locus) == (caught.value.code, caught.value.locus)


def test_messages_that_hold_themselves_are_refused():
    message = {"role": "user", "content": "x"}
    message["self"] = message
    with pytest.raises(TemplateError, match="levels deep"):
        render("x", [message])


def test_jinja_is_imported_only_to_render():
    code = "import sys, modelrig.generation.chat_template, modelrig.generation.tokenizer; sys.exit('jinja2' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode


@pytest.mark.parametrize("name", TEMPLATES)
def test_no_template_loses_the_parts_of_a_message(name):
    prompt = render(TEMPLATES[name], [SYSTEM, PARTS], date_string="", **SPECIAL)
    assert "one" in prompt and "two" in prompt
