"""Chat templates made to hurt, with the code of the error each must end in.

As a program it renders them all with little memory, and prints what became of each as a line of JSON.
"""

import json
import resource
import time
from pathlib import Path

from modelrig.errors import ModelrigError
from modelrig.generation.chat_template import render

ROOM_BYTES = 256 << 20

DEEP = "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60
NEST = "{% for a in range(99999) %}"

BUDGET = {
    "repeats a text": "{{ 'a' * 300000000 }}",
    "repeats a text from the left": "{{ 300000000 * 'a' }}",
    "repeats a list": "{{ [1] * 300000000 }}",
    "repeats step by step": "{% set a = 'a' * 1000000 %}{% set b = [a] * 1000 %}{{ b | join }}",
    "pads with printf": "{{ '%300000000d' % 1 }}",
    "pads with printf, precision": "{{ '%.300000000f' % 1 }}",
    "pads with printf, star": "{{ '%*d' % (300000000, 1) }}",
    "pads with the format filter": "{{ '%300000000d' | format(1) }}",
    "names one value often": "{{ ('%(a)s' * 100000) % {'a': 'x' * 100000} }}",
    "pads with str.format": "{{ '{:>300000000}'.format(1) }}",
    "pads with a nested width": "{{ '{:>{w}}'.format(1, w=300000000) }}",
    "names one field often": "{{ ('{0}' * 100000).format('x' * 100000) }}",
    "names one field often, from a map": "{{ ('{a}' * 100000).format_map({'a': 'x' * 100000}) }}",
    "converts a field": "{{ '{0!r:>300000000}'.format(1) }}",
    "centers": "{{ 'a'.center(300000000) }}",
    "centers by filter": "{{ 'a' | center(300000000) }}",
    "centers by keyword": "{{ 'a' | center(width=300000000) }}",
    "justifies": "{{ 'a'.ljust(300000000) }}{{ 'a'.rjust(300000000) }}",
    "fills with zeros": "{{ 'a'.zfill(300000000) }}",
    "expands tabs": "{{ '\t'.expandtabs(300000000) }}",
    "replaces by more": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replaces nothing by more": "{{ ('a' * 100000).replace('', 'b' * 100000) }}",
    "replaces by filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "joins": "{{ ('b' * 100000).join('a' * 100000) }}",
    "joins by filter": "{{ range(60000) | join('b' * 100000) }}",
    "joins lazily": "{{ ('b' * 100000).join(range(30000) | map('string')) }}",
    "joins references": "{% set b = 'b' * 1000000 %}{{ range(10000) | map('replace', '', b) | join }}",
    "indents": "{{ 'a\n' | indent(300000000) }}",
    "indents by a text": "{{ ('a\n' * 100000) | indent('b' * 100000) }}",
    "indents JSON": "{{ [1] | tojson(indent=300000000) }}",
    "separates JSON": "{{ ([1] * 1000) | tojson(separators=('x' * 100000, ':')) }}",
    "batches": "{{ [1] | batch(300000000, 0) | list }}",
    "slices": "{{ [1] | slice(300000000, 0) | list }}",
    "rounds": "{{ 1 | round(300000000, 'ceil') }}",
    "counts far": "{% for i in range(300000000) %}{% endfor %}",
    "counts farther than an index": "{{ range(10 ** 30) | length }}",
    "loops in loops": NEST * 4 + "{% endfor %}" * 4,
    "loops in loops over texts": "{% for a in 'x' * 90000 %}{% for b in 'y' * 90000 %}{% endfor %}{% endfor %}",
    "loops over what loops": "{% for i in range(99999) %}{{ range(99999) | map('string') | list | length }}{% endfor %}",
    "filters in loops": "{% for i in range(99999) %}{{ range(99999) | select('odd') | list | length }}{% endfor %}",
    "a loop with a long body": NEST + "{% if a %}{% endif %}" * 3000 + "{% endfor %}",
    "a chain of lazy filters": "{{ range(99999)" + " | select" * 2000 + " | list | length }}",
    "many lazy filters that give nothing": "{% set r = range(60000) | list %}" + "{{ r|select('none')|list }}" * 2000,
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macros that call each other twice": "{% macro f(n) %}{% if n %}"
    "{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(40) }}",
    "a caller that calls itself": "{% macro f() %}{{ caller() }}{% endmacro %}"
    "{% macro g() %}{% call f() %}{{ g() }}{% endcall %}{% endmacro %}{{ g() }}",
    "squares integers": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "raises to a power": "{{ 9 ** 99999999 }}",
    "raises powers to powers": "{{ 9 ** 9 ** 9 ** 9 ** 9 ** 9 }}",
    "a long hexadecimal integer": "{{ ('f' * 900000) | int(0, 16) % 7 }}",
    "a long integer from a text": "{{ ('f' * 1200) | int(0, 16) % 7 }}",
    "doubles a text": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubles a text with ~": "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubles a list": "{% set ns = namespace(x=[1]) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubles a tuple": "{% set ns = namespace(x=(1,)) %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubles a block": "{% set x = 'a' %}" + "{% set x %}{{ x }}{{ x }}{% endset %}" * 60,
    "doubles by a macro": "{% macro f(x) %}{{ x }}{{ x }}{% endmacro %}"
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = f(ns.x) %}{% endfor %}",
    "doubles by a filter block": "{% set x = 'ab' * 9 %}"
    + "{% set x %}{% filter replace('a', x) %}{{ x }}{% endfilter %}{% endset %}" * 20,
    "nests lists exponentially": DEEP + "{{ a }}",
    "compares nested lists": DEEP + DEEP.replace(" a ", " b ").replace("[a, a]", "[b, b]") + "{{ a == b }}",
    "hashes nested tuples": "{% set a = (1, 2) %}" + "{% set a = (a, a) %}" * 60 + "{{ {a: 1} }}",
    "nests mappings exponentially": "{% set a = {'x': 1} %}" + "{% set a = {'x': a, 'y': a} %}" * 60 + "{{ a | tojson }}",
    "nests by calls": "{% set a = dict(x=1) %}" + "{% set a = dict(x=a, y=a) %}" * 60 + "{{ a }}",
    "sums lists": "{% set l = [1] * 10000 %}{{ range(99999) | map('default', l) | list | sum(start=[]) }}",
    "sums lists to lists": "{% set l = [1] * 10000 %}{{ [l, l, l, l, l, l, l, l, l, l, l, l, l, l, l] | sum(start=l * 100) }}",
    "keeps long texts alive": "{% set ns = namespace(l=[]) %}{% set s = 'a' * 1000000 %}"
    "{% for i in range(9999) %}{% set ns.l = [ns.l, s ~ i] %}{% endfor %}",
    "keeps long texts in variables": "{% set s = 'a' * 1000000 %}" + "".join(f"{{% set v{i} = s ~ {i} %}}" for i in range(1800)),
    "writes without end": "{% for i in range(99999) %}" + "lots of text " * 1000 + "{% endfor %}",
    "writes without end in a macro": "{% macro f() %}{% for i in range(99999) %}"
    + "text " * 10000
    + "{% endfor %}{% endmacro %}{{ f() }}",
    "writes without end in a block": "{% set x %}{% for i in range(99999) %}" + "text " * 10000 + "{% endfor %}{% endset %}",
    "writes one value often": "{% set s = 'a' * 1000000 %}{% for i in range(99999) %}{{ s }}{% endfor %}",
    "splits into characters": "{{ ('a' * 1000000) | list | length }}",
    "splits everywhere": "{{ ('a ' * 400000).split() | length }}{{ ('a ' * 400000).split() | length }}",
    "searches backwards": "{% set n = 'ab' + 'a' * 400000 %}{% set h = 'a' * 1000000 %}{{ h.rfind(n) }}",
    "splits backwards": "{% set n = 'ab' + 'a' * 400000 %}{% set h = 'a' * 1000000 %}{{ h.rsplit(n) | length }}",
    "strips what is not there": "{{ ('b' * 1000000).strip('a' * 900000 + 'b') }}",
    "trims what is not there": "{{ ('b' * 1000000) | trim('a' * 900000 + 'b') }}",
    "compares in a chain": "{% set a = range(60000) | list %}{% set b = range(60000) | list %}{{ a == b"
    + " == a == b" * 3000
    + " }}",
    "slices in one line": "{% set a = 'x' * 1000000 %}" + "{{ a[1:]|length }}" * 2500,
    "sorts again and again": "{% set r = range(60000) | list | reverse | list %}" + "{{ r|sort|length }}" * 2500,
    "a date format of a megabyte": "{{ strftime_now('%A' * 500000) }}",
    "a source of a megabyte": "x" * (1 << 20),
    "expressions nested deeply": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "operators in a long row": "{{ 1" + " + 1" * 9000 + " }}",
    "blocks nested deeply": "{% if 1 %}" * 2800 + "{% endif %}" * 2800,
    "only braces": "{{" * 30000,
    "filters in a long row": "{{ 'a'" + "|upper" * 9000 + " }}",
}

SANDBOX = {
    "a class": "{{ ''.__class__ }}",
    "a class by subscript": "{{ ''['__class__'] }}",
    "a class by filter": "{{ '' | attr('__class__') }}",
    "a class by map": "{{ [''] | map(attribute='__class__') | list }}",
    "a class by sort": "{{ ['', 'a'] | sort(attribute='__class__') }}",
    "a class by format": "{{ '{0.__class__}'.format('') }}",
    "a class by format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "a class by format and subscript": "{{ '{0[__class__]}'.format('') }}",
    "a format method found another way": "{% set f = [''] | map(attribute='format') | first %}{{ f._env }}",
    "subclasses": "{{ ().__class__.__base__.__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a class": "{{ cycler.__init__.__globals__.os.system('id') }}",
    "globals of a joiner": "{{ joiner('').__init__ }}",
    "globals of a namespace": "{{ namespace.__init__.__globals__ }}",
    "a namespace's class": "{% set ns = namespace() %}{{ ns.__class__ }}",
    "setting a namespace's class": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "a namespace made with a class": "{% set ns = namespace(__class__=1) %}",
    "a namespace made from a mapping": "{% set ns = namespace({'__init__': 1}) %}",
    "a namespace with private names": "{% set ns = namespace(_Namespace__attrs=1) %}",
    "the code of a generator": "{{ (messages | map('upper')).gi_frame }}",
    "the environment of a macro": "{% macro f() %}{% endmacro %}{{ f._environment }}",
    "the function of a macro": "{% macro f() %}{% endmacro %}{{ f._func }}",
    "the context of a loop": "{% for i in messages %}{{ loop._iterator }}{% endfor %}",
    "self": "{{ self._TemplateReference__context }}",
    "self's class": "{{ self.__class__ }}",
    "changing a message": "{{ messages[0].update({'role': 'x'}) }}",
    "changing a list": "{{ messages.append(1) }}",
    "popping": "{{ messages.pop() }}",
    "clearing a message": "{{ messages[0].clear() }}",
    "bytes of a text": "{{ 'a'.encode() }}",
    "translation of a text": "{{ 'a'.translate({97: 'b'}) }}",
    "bytes of an integer": "{{ (1).to_bytes(300000000, 'big') }}",
    "a loop that calls itself": "{% for a in [[1]] recursive %}{{ loop(a) }}{% endfor %}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'x' as y %}",
    "from import": "{% from 'x' import y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block b %}{{ self.b() }}{% endblock %}",
    "autoescape": "{% autoescape true %}{{ '<' * 10 }}{% endautoescape %}",
    "calling a text": "{{ 'a'() }}",
}

SYNTAX = {
    "an open tag": "{% for",
    "an open comment": "{# " * 10000,
    "an open raw block": "{% raw %}" * 5000,
    "an open text": "{{ '" + "a" * 60000,
    "an unknown tag": "{% do x %}",
    "a filter that is not offered": "{{ 'a' | xmlattr }}",
    "a function that is not offered twice": "{{ 'a' | urlize | pprint }}",
    "an integer of too many digits": "{{ " + "9" * 60000 + " }}",
    "a hexadecimal integer of too many digits": "{{ 0x" + "f" * 60000 + " }}",
    "only spaces in a tag": "{%" + " " * 60000,
    "a name with a NUL": "{{ a\x00b }}",
}

INPUT = {
    "lipsum": "{{ lipsum(n=1000000) }}",
    "a missing template variable": "{{ config.items() }}",
    "a power that overflows": "{{ 10.0 ** 1000 }}",
}

CASES = {
    **{f"budget: {name}": (source, "TM-BUDGET") for name, source in BUDGET.items()},
    **{f"sandbox: {name}": (source, "TM-SANDBOX") for name, source in SANDBOX.items()},
    **{f"syntax: {name}": (source, "TM-SYNTAX") for name, source in SYNTAX.items()},
    **{f"input: {name}": (source, "TM-INPUT") for name, source in INPUT.items()},
}


def main() -> None:
    messages = [{"role": "user", "content": "hello"}]
    render("{{ messages[0].content }}", messages)  # what is imported lazily is no growth
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM_BYTES, used + ROOM_BYTES))
    for name, (source, _) in CASES.items():
        before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        try:
            found, reason = "rendered", render(source, messages)[:200]
        except ModelrigError as error:
            found, reason = error.code, str(error)
        except BaseException as error:
            found, reason = type(error).__name__, str(error)[:200]
        seconds = time.perf_counter() - started
        grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        print(json.dumps([name, found, reason, seconds, grown_kib << 10]), flush=True)


if __name__ == "__main__":
    main()
