"""How a folder makes one vector of a text: what the files of sentence-transformers beside the model say.

    modules.json                        which steps: Transformer, Pooling, Normalize
    1_Pooling/config.json               which tokens' states, and how they become one
    sentence_bert_config.json           how many tokens of a text are read
    config_sentence_transformers.json   what is put before each text

Without them the states of all tokens are averaged. A step or a pooling that is not served is an error, never left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from attrs import frozen

from modelrig.checkpoint.config import ConfigReader
from modelrig.checkpoint.paths import inside, name_problem, optional
from modelrig.checkpoint.strict_json import load_json, load_json_value
from modelrig.components import Snapshot
from modelrig.errors import ConfigError, quoted
from modelrig.planning.tokenizer_files import CONFIG as TOKENIZER_CONFIG
from modelrig.planning.tokenizer_files import MAX_DIGITS

MODULES, LENGTHS, PROMPTS = "modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"
MODE, FLAG = "pooling_mode", "pooling_mode_"
#: key of a pooling's config → what it is called here; of several that are true, vectors are put side by side in this order
POOLINGS = {"pooling_mode_cls_token": "cls", "pooling_mode_max_tokens": "max", "pooling_mode_mean_tokens": "mean"}


@frozen(kw_only=True)
class Recipe:
    """From a text to its vector.

    Attributes:
        poolings: of cls, max, mean.
        normalize: the vector is divided by its length.
        max_tokens: how many tokens of a text are read, special ones among them; None for as many as the model takes.
        lower: the text is written in small letters first.
        prompt: what is put before the text.
    """

    poolings: tuple[str, ...] = ("mean",)
    normalize: bool = False
    max_tokens: int | None = None
    lower: bool = False
    prompt: str = ""


def read_recipe(snapshot: Snapshot, hidden_size: int) -> Recipe:
    """The recipe of the snapshot's folder, for a model of this width.

    Raises:
        ConfigError: naming the file and key that is wrong, or not served.
        FileError: something there is not a regular readable file, or a link that leaves the folder.
    """
    path = optional(snapshot, MODULES)
    if path is None:
        return Recipe(max_tokens=_longest(snapshot))
    pooling, normalize = _steps(path)
    max_tokens, lower = _lengths(snapshot)
    prompt = _prompt(snapshot)
    poolings = _poolings(inside(snapshot, f"{pooling}/config.json"), hidden_size, has_prompt=bool(prompt))
    return Recipe(poolings=poolings, normalize=normalize, max_tokens=max_tokens, lower=lower, prompt=prompt)


def _steps(path: Path) -> tuple[str, bool]:
    """(the folder of the pooling's config, whether a vector is normalised)"""
    items = load_json_value(path, error=ConfigError, prefix="CF")
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise ConfigError("CF-TYPE", f"a list of objects is needed, this is {quoted(items)}", path=path)
    steps, folders = [], []
    for place, item in enumerate(items):
        with ConfigReader(item, path, f"[{place}].") as read:
            steps.append(read.string("type").rpartition(".")[2])
            folders.append(read.string("path"))
    if steps not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        text = f"the steps {', '.join(map(quoted, steps)) or 'none'}; Transformer, Pooling and then Normalize or nothing are served"
        raise ConfigError("CF-ENUM", text, path=path, locus="type")
    if folders[0]:
        text = f"{quoted(folders[0])}; a model in the folder itself is served, whose path is empty"
        raise ConfigError("CF-ENUM", text, path=path, locus="[0].path")
    if problem := name_problem(folders[1]):
        raise ConfigError("CF-ENUM", f"{quoted(folders[1])} {problem}", path=path, locus="[1].path")
    return folders[1], len(steps) == 3


def _poolings(path: Path, hidden_size: int, *, has_prompt: bool) -> tuple[str, ...]:
    values = load_json(path, error=ConfigError, prefix="CF")
    with ConfigReader(values, path) as read:
        for key in ("embedding_dimension", "word_embedding_dimension"):
            width = read.integer(key, 1, 1 << 24, default=hidden_size)
            text = f"{width}, but the model's states have {hidden_size} numbers"
            read.require(width == hidden_size, "CF-REL", key, text)
        names = _named(read) if MODE in read else _flagged(read)
        leaves_out = has_prompt and not read.boolean("include_prompt", default=True)
        read.require(not leaves_out, "CF-ENUM", "include_prompt", "false; a prompt's tokens are pooled with the text's")
    return names


def _named(read: ConfigReader) -> tuple[str, ...]:
    """`pooling_mode`, as newer sentence-transformers write it: a name, or several whose vectors are put side by side."""
    names = read.strings(MODE, single=True)
    served = ", ".join(POOLINGS.values())
    for name in names:
        read.require(name in POOLINGS.values(), "CF-ENUM", MODE, f"{quoted(name)}; served are {served}")
    read.require(bool(names) or bool(read.problems), "CF-MISSING", MODE, f"no pooling; served are {served}")
    return names


def _flagged(read: ConfigReader) -> tuple[str, ...]:
    """The older `pooling_mode_*_tokens`, of which those that are true are put side by side."""
    asked = [key for key in read.values if key.startswith(FLAG) and read.boolean(key, default=False)]
    served = ", ".join(POOLINGS)
    for key in asked:
        read.require(key in POOLINGS, "CF-ENUM", key, f"true; served are {served}")
    read.require(bool(asked) or bool(read.problems), "CF-MISSING", f"{FLAG}mean_tokens", f"no pooling is true of {served}")
    return tuple(name for key, name in POOLINGS.items() if key in asked)


def _lengths(snapshot: Snapshot) -> tuple[int | None, bool]:
    with _reader(snapshot, LENGTHS) as read:
        return read.integer("max_seq_length", 1, 1 << 31, default=_longest(snapshot)), read.boolean("do_lower_case", default=False)


def _longest(snapshot: Snapshot) -> int | None:
    """What the tokenizer says: often a number that is no length at all."""
    with _reader(snapshot, TOKENIZER_CONFIG, MAX_DIGITS) as read:
        return read.integer("model_max_length", 1, 10**MAX_DIGITS, default=None)


def _prompt(snapshot: Snapshot) -> str:
    with _reader(snapshot, PROMPTS) as read:
        name = read.string("default_prompt_name", default=None)
        if name is None:
            return ""
        prompts = read.child("prompts")
        read.require(
            prompts is not None and name in prompts, "CF-REL", "default_prompt_name", f"{quoted(name)} is not among prompts"
        )
        return "" if prompts is None else prompts.string(name, default="")


def _reader(snapshot: Snapshot, name: str, max_digits: int = 19) -> ConfigReader:
    """A reader of a file of the folder; of nothing if it is not there."""
    path = optional(snapshot, name)
    values: dict[str, Any] = {} if path is None else load_json(path, error=ConfigError, prefix="CF", max_digits=max_digits)
    return ConfigReader(values, snapshot.root / name)
