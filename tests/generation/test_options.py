"""GenerateOptions: what is accepted, and that every problem is named."""

import math
import subprocess
import sys

import attrs
import numpy as np
import pytest

from modelrig.errors import GenerateError
from modelrig.generation.options import GenerateOptions

NAN, INF = math.nan, math.inf

REFUSED = {
    "max_new_tokens": [0, -3, 10**12, 1.5, True, "8", NAN],
    "min_new_tokens": [-1, 1.0, True, None],
    "temperature": [-1, -0.001, NAN, INF, True, "1", 10**400],
    "top_k": [0, -1, 1e6, True],
    "top_p": [0, 1.5, -1, NAN, INF, True],
    "min_p": [-0.1, 2, NAN, True],
    "repetition_penalty": [0, -1, NAN, INF, 1e-300, 1e300],
    "presence_penalty": [NAN, INF, True, "0"],
    "frequency_penalty": [-INF, NAN, False],
    "logit_bias": [[1, 2], {"3": 1.0}, {-1: 1.0}, {3: NAN}, {3: INF}, {True: 1.0}, 5],
    "stop": ["", ["a", ""], [1], 7, {"a": 1}, b"a"],
    "stop_ids": [-1, [1.5], True, "1", [2**31]],
    "seed": [-1, 1.5, True, [], [1, None], 2**63, "1"],
    "ignore_eos": [1, None, "yes"],
    "num_return_sequences": [0, -1, True, 1.0, 10**6],
    "pad_to_multiple_of": [0, -8, True, 1.5, "8", 1 << 30],
    "constraint": ["a+", 7, {}, {"regex": 7}, {"regex": "a", "lark": "b"}],
}

ACCEPTED = [
    ("max_new_tokens", 1, 1),
    ("max_new_tokens", np.int64(7), 7),
    ("temperature", 0, 0.0),
    ("temperature", np.float32(0.5), 0.5),
    ("top_p", 1, 1.0),
    ("min_p", 0, 0.0),
    ("min_p", 1, 1.0),
    ("logit_bias", {np.int32(3): -2}, {3: -2.0}),
    ("stop", "end", ("end",)),
    ("stop", ["a", "b"], ("a", "b")),
    ("stop", None, ()),
    ("stop_ids", 5, (5,)),
    ("stop_ids", [5, 6], (5, 6)),
    ("seed", 0, 0),
    ("seed", [1, 2], (1, 2)),
    ("ignore_eos", True, True),
]


def test_every_option_has_help_a_range_and_refused_examples():
    fields = attrs.fields(GenerateOptions)
    assert all(field.metadata["help"] and field.metadata["accepts"] for field in fields)
    assert set(REFUSED) == {field.name for field in fields}


def test_the_defaults_are_greedy_and_valid():
    options = GenerateOptions.make()
    assert options == GenerateOptions()
    assert options.is_greedy and options.max_new_tokens is None and options.stop == () and options.num_return_sequences == 1


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in REFUSED.items() for value in values])
def test_a_value_out_of_range_is_named_with_its_range(name, value):
    with pytest.raises(GenerateError) as caught:
        GenerateOptions.make(**{name: value})
    accepts = attrs.fields_dict(GenerateOptions)[name].metadata["accepts"]
    assert ("GN-ARGS", name) == (caught.value.code, caught.value.locus)
    assert f"{name}=" in caught.value.reason and accepts in caught.value.reason


@pytest.mark.parametrize(("name", "value", "expected"), ACCEPTED)
def test_a_value_is_normalised(name, value, expected):
    actual = getattr(GenerateOptions.make(**{name: value}), name)
    assert (expected, type(expected)) == (actual, type(actual))


def test_all_problems_come_in_one_error():
    with pytest.raises(GenerateError) as caught:
        GenerateOptions.make(temperature=-1, top_p=2, seed=True, top_k=5)
    assert [True] * 3 == [f"{name}=" in caught.value.reason for name in ("temperature", "top_p", "seed")]
    assert "top_k" not in caught.value.reason


def test_an_unknown_option_gets_the_nearest_name():
    with pytest.raises(GenerateError) as caught:
        GenerateOptions.make(temprature=1)
    assert "GN-UNKNOWN" == caught.value.code
    assert "'temperature'" in caught.value.reason


def test_min_new_tokens_cannot_exceed_max_new_tokens():
    with pytest.raises(GenerateError, match="min_new_tokens=9"):
        GenerateOptions.make(min_new_tokens=9, max_new_tokens=8)
    assert 9 == GenerateOptions.make(min_new_tokens=9).min_new_tokens


def test_the_constructor_and_evolve_check_too():
    with pytest.raises(GenerateError):
        GenerateOptions(top_p=3)
    with pytest.raises(GenerateError):
        attrs.evolve(GenerateOptions(), top_p=3)


@pytest.mark.parametrize("option", [{"stop_ids": [3, 99]}, {"logit_bias": {99: 1}}])
def test_ids_beyond_the_vocabulary_are_refused_once_it_is_known(option):
    options = GenerateOptions.make(**option)
    options.check_ids(100)
    with pytest.raises(GenerateError, match="99: accepted is 0 to 98"):
        options.check_ids(99)


def test_options_need_no_torch():
    code = "import sys, modelrig.generation.options; sys.exit('torch' in sys.modules)"
    assert 0 == subprocess.run([sys.executable, "-c", code], check=False).returncode
