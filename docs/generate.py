"""Write the generated pages of docs/reference: `make docs`. A test fails when a page is not what this would write."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import attrs
from click.testing import CliRunner

import modelrig
from modelrig import errors, hookspecs
from modelrig.cli import COMMANDS, group
from modelrig.components import DESCRIPTORS, KINDS, SLOTS
from modelrig.encoding.encoder import Encoded
from modelrig.generation.loop import Generation, Piece, Stats
from modelrig.generation.options import GenerateOptions
from modelrig.generation.session import Session
from modelrig.planning.plan import RigPlan
from modelrig.planning.request import OTHER_VARIABLES, PARSERS, PREFIX, Request
from modelrig.planning.rules import RULES, SINGULAR
from modelrig.registry import PluginRow, Registered, current

REFERENCE = Path(__file__).parent / "reference"
NOTE = "<!-- Written by docs/generate.py (make docs); changes here are lost. -->\n"


def table(*rows: tuple[str, ...]) -> str:
    """A table; the first row is its head."""
    head, *body = rows
    lines = (head, ("---",) * len(head), *body)
    return (
        "\n".join("| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in line) + " |" for line in lines) + "\n"
    )


def errors_page() -> str:
    _, _, tree = (inspect.getdoc(errors) or "").partition("\n\n")
    drawn, _, _ = tree.partition("\n\nCodes are")
    rows = ((f"`{code}`", meaning) for code, meaning in errors.CODES.items())
    return (
        f"# Errors\n\n{NOTE}\nEvery error raised on purpose is a class of `modelrig.errors` with a stable code.\n\n"
        f"```text\n{inspect.cleandoc(drawn)}\n```\n\n{table(('code', 'meaning'), *rows)}"
    )


def hooks_page() -> str:
    introduction, _, example = (inspect.getdoc(hookspecs) or "").partition("\n    MODELRIG_API")
    parts = [f"# Hooks\n\n{NOTE}\n{_fenced(introduction + chr(10) + '    MODELRIG_API' + example)}\n"]
    for kind in KINDS:
        hook = getattr(hookspecs, f"modelrig_{kind}")
        text, _, example = (inspect.getdoc(hook) or "").partition("Example:\n")
        parts.append(f"## `modelrig_{kind}{_signature(hook)}`\n\n{text.strip()}\n\n```python\n{inspect.cleandoc(example)}\n```\n")
    return "\n".join(parts)


#: of a kind that a call chooses
NONE_SHIPS = "None ships with Modelrig; [this page](../how-to/constrain-output.md) names one to install.\n"


def components_page() -> str:
    parts = [f"# Components\n\n{NOTE}\nWhat ships with Modelrig; `modelrig plugins` lists what is installed on your machine.\n"]
    for kind in KINDS:
        ours = [one for one in current().components(kind) if one.is_ours]
        rows = (
            (f"`{one.name}`", one.descriptor.summary, _tokens(one.descriptor.offers), _needs(one.descriptor.needs)) for one in ours
        )
        described = (inspect.getdoc(DESCRIPTORS[kind]) or "").splitlines()[0]
        shown = table(("name", "what", "offers", "needs"), *rows) if ours else NONE_SHIPS
        parts.append(f"## {kind}\n\n{described}\n\n{shown}")
        parts += [text for one in ours if (text := _options(one))]
    return "\n".join(parts)


#: test function → (what a reader of the page calls it, column of decoders)
CHECKS = {
    "test_logits_without_a_cache": "logits",
    "test_prompts_that_arrive_in_chunks": "in chunks",
    "test_padded_batches": "padded",
    "test_greedy_tokens_over_64_steps_alone_and_in_a_batch": "64 tokens",
    "test_half_precision_is_within_the_references_own_error": "16 bits",
    "test_v4_spellings_mean_the_same": "old keys",
    "test_shards_are_read_and_what_is_saved_here_is_read_there": "shards, saved",
    "test_bin_files_are_read": ".bin",
    "test_planned_bytes_are_measured_ones": "bytes",
}
FOUND = Path(__file__).with_name("architectures.json")


def architectures_page() -> str:
    found = json.loads(FOUND.read_text())
    summaries = {one.name: one.descriptor.summary for one in current().components("architectures") if one.is_ours}
    decoders = [
        name for name in summaries if "test_logits_without_a_cache" in found["architectures"].get(name, {}).get("checks", {})
    ]
    head = ("architecture", "largest error", *CHECKS.values())
    rows = [(f"`{name}`", *_cells(found["architectures"][name])) for name in decoders]
    others = [name for name in summaries if name not in decoders]
    versions = " and ".join(f"{package} {version}" for package, version in found["versions"].items())
    introduction = (
        "Families of models that ship with Modelrig, identified by `model_type` in config.json. Every cell is a count of tests "
        f"against the reference implementation at the same random weights ({versions}), from the run that wrote this page; one "
        "that failed would say so."
    )
    return (
        f"# Architectures\n\n{NOTE}\n{introduction}\n\n"
        + table(("architecture", "what"), *((f"`{name}`", text) for name, text in summaries.items()))
        + "\n## Decoders\n\n"
        + table(head, *rows)
        + ARCHITECTURE_NOTES
        + "".join(f"\n## {name}\n\n{_checks(found['architectures'].get(name, {}))}" for name in others)
    )


ARCHITECTURE_NOTES = """
* *largest error*: of any float32 logit, as a part of the largest logit, over all configs and attention kernels; 1e-5 fails.
* *logits*: whole prompts, without a cache, by each attention kernel. *in chunks*: prompts fed in five parts, by each kernel and
  cache. *padded*: batches padded on either side; each row gives what it gives alone.
* *64 tokens*: greedy decoding with each cache, alone and in a batch: the same tokens.
* *16 bits*: bfloat16 and float16; the error against float64 is at most 1.2 times the reference's own (in brackets: the largest
  ratio).
* *old keys*: the config in the spelling of transformers 4.
* *shards, saved*: sharded safetensors read; what is saved here, in both formats, read there. *.bin*: with the names of the
  checkpoint and of the module. *bytes*: planned weights and cache are the measured ones.
* Skipped, in brackets with a dash: an attention kernel that cannot cap scores is refused when the plan is made.

An unknown `model_type` is an error that names the nearest known one, and code that a checkpoint brings is never run. How to add a
family: [add an architecture](../how-to/add-an-architecture.md). How fast each decodes: `benchmarks/LOG.md`.
"""


def _cells(found: Mapping[str, Any]) -> Iterator[str]:
    yield f"{found['error']:.1e}"
    for check in CHECKS:
        counts = found["checks"].get(check, {})
        cell = _count(counts)
        yield cell + (f" ({found['half']:.2f})" if check.startswith("test_half") else "")


def _count(counts: Mapping[str, int]) -> str:
    failed = f", {counts['failed']} FAILED" if counts.get("failed") else ""
    skipped = f" (–{counts['skipped']})" if counts.get("skipped") else ""
    return f"{counts.get('passed', 0)}{failed}{skipped}"


def _checks(found: Mapping[str, Any]) -> str:
    rows = ((name.removeprefix("test_").replace("_", " "), _count(counts)) for name, counts in found.get("checks", {}).items())
    return table(("what the tests say", "passed"), *rows)


def _options(component: Registered) -> str:
    """What `--set` may set of a component."""
    made = getattr(component.planner(), "Options", None)
    if made is None:
        return ""
    fields = ", ".join(f"`{one.name} = {one.default!r}`" for one in attrs.fields(made))
    return f"Options of `{component.name}`: {fields}. {' '.join((inspect.getdoc(made) or '').split())}\n"


def _tokens(tokens: frozenset[str]) -> str:
    return ", ".join(f"`{token}`" for token in sorted(tokens))


def _needs(needs: Mapping[str, frozenset[str]]) -> str:
    return "; ".join(f"of {kind}: {_tokens(tokens)}" for kind, tokens in needs.items())


def generation_page() -> str:
    fields = attrs.fields(GenerateOptions)
    rows = ((f"`{one.name}`", f"`{one.default!r}`", one.metadata["accepts"], one.metadata["help"]) for one in fields)
    return (
        f"# Options of generate\n\n{NOTE}\n`model.generate`, `model.stream`, `session.generate` and `session.send` take them by "
        "name; the command line with dashes (`--max-new-tokens`). Some that a call leaves out are as the checkpoint's "
        "generation_config.json says: [text and generation](../how-to/text-and-generation.md).\n\n"
        + table(("option", "default", "accepts", "meaning"), *rows)
    )


def cli_page() -> str:
    shown = {name: _help(name) for name in ("", *COMMANDS)}
    return f"# Command line\n\n{NOTE}\n" + "\n".join(
        f"## modelrig{' ' + name if name else ''}\n\n```text\n{text}\n```\n" for name, text in shown.items()
    )


def _help(command: str) -> str:
    arguments, name = [*command.split(), "--help"], "modelrig"
    return CliRunner().invoke(group, arguments, prog_name=name, terminal_width=100, max_content_width=100).output.strip()


#: request key → what it decides; what a value may be is said by its parser
DECIDES = {
    **{slot: f"the component of kind {kind}" for slot, kind in SLOTS.items()},
    "device_map": "where the model lives",
    "dtype": "what it computes in",
    "context": "the longest sequence planned for",
    "batch": "sequences planned for",
    "max_memory": "bytes the plan may take",
    "variant": "which set of tensor files is read",
    "prefer": "components that come first where `auto` chooses",
    "disable": "plugins (`plugin`) and components (`plugin:name`) that are switched off before they are imported",
    "set": "options of the chosen components",
}
#: variables that other software defines and Modelrig honours
FOREIGN_VARIABLES = {
    "HF_HOME": "where the hub's library keeps its cache, token and settings",
    "HF_HUB_CACHE": "where the cache alone is",
    "HF_HUB_OFFLINE": "1: ask for nothing over the network",
    "HF_TOKEN": "the token for gated and private models",
    "HF_ENDPOINT": "another server than the hub's own",
    "CUDA_VISIBLE_DEVICES": "the GPUs that are there for this process",
    "XDG_CACHE_HOME": "below it, in modelrig/probes, is what trials of kernels found",
    "CXX": "the C++ compiler, where something is compiled; g++ without it",
    "OMP_NUM_THREADS": "threads torch computes with on the CPU",
}


def configuration_page() -> str:
    defaults = {one.name: one.default for one in attrs.fields(Request)}
    rows = (
        (
            f"`{key}`",
            f"`{PREFIX}{key.upper()}`",
            DECIDES[key],
            (inspect.getdoc(read) or "").split("\n\n")[0],
            _default(defaults.get(key)),
        )
        for key, read in PARSERS.items()
    )
    others = ((f"`{PREFIX}{name}`", meaning) for name, meaning in OTHER_VARIABLES.items())
    foreign = ((f"`{name}`", meaning) for name, meaning in FOREIGN_VARIABLES.items())
    return (
        f"# Configuration and environment\n\n{NOTE}\n"
        "The keys of a request: arguments of `modelrig.plan` and `modelrig.load`, keys of `modelrig.toml`, and environment "
        "variables. "
        "Arguments win over variables, variables over the file, the file over the defaults. On the command line they are "
        "flags (`--device-map`); [how to use them](../how-to/select-parts-by-config.md).\n\n"
        f"{table(('key', 'variable', 'decides', 'accepts', 'default'), *rows)}\n"
        'A variable holds TOML (`64`, `true`, `["a", "b"]`, `{name = "none"}`) or plain text; lists of names may be written `a,b`. '
        "One that is empty counts as not set, and an unknown one that begins with `MODELRIG_` is an error.\n\n"
        f"## Other variables of ours\n\n{table(('variable', 'meaning'), *others)}\n"
        f"## Variables of others that are honoured\n\n{table(('variable', 'meaning'), *foreign)}"
    )


def _default(value: Any) -> str:
    made = value.factory() if isinstance(value, attrs.Factory) else value  # type: ignore[arg-type]
    plain = made.to_json() if hasattr(made, "to_json") else made
    return f"`{plain}`" if plain else ""


#: the first part of reason codes that no rule of the table has, and what they mean
OTHER_REASONS = {
    "auto.order": "it fits too; another one comes first",
    "auto.optional": "it fits, but needs an optional package, and `auto` takes nothing of that sort while something else fits",
    "auto.outside": "it fits, but is not ours, and `auto` takes nothing from outside while something else fits",
    "auto.lossy": "`auto` never makes a model lossier than the checkpoint is",
    "model.generates": "the model is an encoder, which has neither cache nor decoder",
    "request.pinned": "another component was asked for by name",
    "request.excluded": "it was excluded (`!name`)",
    "request.unknown": "a name of an ordered wish that nothing installed has",
    "plugin.STATE": "its plugin is not active; STATE is its state in `modelrig plugins`",
    "plugin.failed": "its planner raised something",
    "KIND.options": "the options given do not suit it",
    "KIND.needs": "it needs something of a kind that there is not",
    "KIND.link.OTHER": "it does not fit beside the component of kind OTHER: one needs what the other does not offer",
}


def reasons_page() -> str:
    rules = ((f"`{rule.code}`", rule.kind, rule.text) for rule in RULES)
    others = ((f"`{code}`", meaning) for code, meaning in OTHER_REASONS.items())
    singular = ", ".join(f"`{SINGULAR[kind]}`" for kind in SLOTS.values())
    return (
        f"# Reasons of refusals\n\n{NOTE}\nWhy a component was not chosen, by the code at the end of a reason in a plan. "
        f"[Debug a refusal](../how-to/debug-a-refusal.md) shows where they stand.\n\n"
        f"## Needs that a capability does not meet\n\n{table(('code', 'kind', 'what is said'), *rules)}\n"
        f"## The rest\n\nKIND and OTHER stand for {singular}.\n\n{table(('code', 'meaning'), *others)}\n"
        "A component's own planner may give further reasons; their codes begin with the kind too.\n"
    )


def python_page() -> str:
    parts = [
        f"# Python\n\n{NOTE}\nWhat `import modelrig` offers, and the objects it hands out. Names are imported at first use: "
        "neither torch nor a plugin is before it is needed.\n"
    ]
    parts += [_function(f"modelrig.{name}", getattr(modelrig, name)) for name in ("plan", "load", "plugins", "register")]
    for shown in (modelrig.Plan, modelrig.Model, Session, Generation, Stats, Piece, Encoded, PluginRow):
        described = inspect.getdoc(RigPlan if issubclass(shown, RigPlan) else shown) or ""
        fields = ", ".join(f"`{one.name}`" for one in attrs.fields(shown)) if attrs.has(shown) else ""
        parts += [f"## {shown.__name__}\n\n{_fenced(described)}\n" + (f"\nAttributes in order: {fields}.\n" if fields else "")]
        parts += list(_members(shown))
    return "\n".join(parts)


def _members(shown: type) -> Iterator[str]:
    inherited = vars(RigPlan) if issubclass(shown, RigPlan) else {}
    me = shown.__name__.lower()
    for name, member in {**inherited, **vars(shown)}.items():
        if name.startswith("_") and name != "__call__":
            continue
        if inspect.isfunction(member):
            yield _function(me if name == "__call__" else f"{me}.{name}", member, level=3)
        elif isinstance(member, property):
            yield f"### `{me}.{name}`\n\n{_fenced(inspect.getdoc(member) or '')}\n"


def _function(name: str, function: Callable[..., Any], level: int = 2) -> str:
    return f"{'#' * level} `{name}{_signature(function)}`\n\n{_fenced(inspect.getdoc(function) or '')}\n"


def _signature(function: Callable[..., Any]) -> str:
    signature = inspect.signature(function)
    parameters = [one for one in signature.parameters.values() if one.name != "self"]
    return str(signature.replace(parameters=parameters)).replace("'", "")


def _fenced(text: str) -> str:
    """A docstring as Markdown: its indented parts (examples, tables of arguments) as they are."""
    out: list[str] = []
    is_open = False
    for line in text.splitlines():
        if line.startswith("    ") != is_open and line.strip():
            out.append("```" if is_open else "```text")
            is_open = not is_open
        out.append(line.removeprefix("    ") if is_open else line)
    return "\n".join([*out, "```"] if is_open else out).replace("\n\n```\n", "\n```\n\n")


PAGES: dict[str, Callable[[], str]] = {
    "architectures.md": architectures_page,
    "cli.md": cli_page,
    "components.md": components_page,
    "configuration.md": configuration_page,
    "errors.md": errors_page,
    "generation.md": generation_page,
    "hooks.md": hooks_page,
    "python.md": python_page,
    "reasons.md": reasons_page,
}


def main() -> None:
    REFERENCE.mkdir(exist_ok=True)
    for name, page in PAGES.items():
        (REFERENCE / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
