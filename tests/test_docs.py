"""Documentation that is true: its code runs, its outputs are today's, its links and names exist, and nothing public is left out."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import pkgutil
import re
import runpy
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import documents
import modelrig
import modelrig_plugins
from documents import LANGUAGES, ROOT, Block, alike, blocks
from modelrig import components, errors, hookspecs
from modelrig.components import KINDS, PLANNED
from modelrig.encoding.encoder import Encoded
from modelrig.generation.loop import Generation, Piece, Stats
from modelrig.generation.options import GenerateOptions
from modelrig.generation.session import Session
from modelrig.planning.plan import RigPlan
from modelrig.planning.request import OTHER_VARIABLES, PARSERS, PREFIX
from modelrig.registry import PluginRow, current

DOCS = ROOT / "docs"
REFERENCE = DOCS / "reference"
GENERATOR = runpy.run_path(str(DOCS / "generate.py"))
WRITTEN = documents.pages()
PAGES = [*WRITTEN, *sorted(REFERENCE.glob("*.md"))]


def named(pages: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("page", pages, ids=lambda page: str(page.relative_to(ROOT)))


def runs(block: Block) -> bool:
    return block.is_run and (block.language == "console" or (block.language == "python" and block.title is None))


@functools.cache
def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def prose(page: Path) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text_of(page), flags=re.M | re.S)


@functools.cache
def sources(*folders: str) -> str:
    return "\n".join(text_of(file) for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))


# ------------------------------------------------------------------------------------------------ code blocks


@named([page for page in WRITTEN if any(map(runs, blocks(page)))])
def test_a_page_runs_and_shows_the_outputs_it_has_today(page: Path) -> None:
    for shown in documents.run(page):
        assert shown.is_right, (
            f"line {shown.block.line}: `{shown.command}` shows (`make docs` writes it)\n{alike(shown.expected)}\nbut gives\n"
            + alike(shown.actual)
        )


@named(WRITTEN)
def test_every_block_has_a_language_and_one_that_is_not_run_a_reason(page: Path) -> None:
    assert text_of(page).count("\n```") == 2 * len(blocks(page)), "a block is not closed, or is indented"
    for block in blocks(page):
        assert block.language in LANGUAGES, f"line {block.line}"
        assert not block.note or re.fullmatch(r"not run: .{10,}|exit code: [1-4]", block.note), f"line {block.line}: {block.note}"


@pytest.mark.parametrize(
    ("expected", "actual", "is_right"),
    [
        ("one\n", "one  \n\n", True),
        ("one\n", "two\n", False),
        ("one\n...\nfour\n", "one\ntwo\nthree\nfour\n", True),
        ("one\n...\n", "two\none\n", False),
        ("  cpu: 24.87 GB (23.16 GiB) available\n", "  cpu: 903.10 MB (861.26 MiB) available\n", True),
        (".../modelrig_plugins/sources\n", "/somewhere/modelrig_plugins/sources\n", True),
        ("weights: 3.80 MB\n", "weights: 3.81 MB\n", False),
    ],
)
def test_outputs_are_compared_apart_from_what_differs_between_machines(expected: str, actual: str, is_right: bool) -> None:
    block = Block("console", None, "", "", 1, (0, 0))
    assert is_right == documents.Shown(block, "some command", expected, actual).is_right


# ------------------------------------------------------------------------------------------------ generated pages


@pytest.mark.parametrize("name", GENERATOR["PAGES"])
def test_a_generated_page_is_current(name: str) -> None:
    assert GENERATOR["PAGES"][name]() == text_of(REFERENCE / name), "run: make docs"


def test_the_page_of_architectures_is_from_a_run_of_the_tests_there_are() -> None:
    found = json.loads((ROOT / "docs/architectures.json").read_text())["architectures"]
    assert {one.name for one in current().components("architectures") if one.is_ours} == set(found)
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "tests/parity"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    there = Counter(re.findall(r"::(\w+)", listed))
    counted: Counter[str] = Counter()
    for one in found.values():
        counted.update({check: sum(counts.values()) for check, counts in one["checks"].items()})
        assert not any("failed" in counts for counts in one["checks"].values())
    assert {check: there[check] for check in GENERATOR["CHECKS"]} == {check: counted[check] for check in GENERATOR["CHECKS"]}, (
        "run: make docs"
    )


def test_every_page_of_the_reference_is_generated() -> None:
    assert sorted(GENERATOR["PAGES"]) == sorted(page.name for page in REFERENCE.iterdir())


# ------------------------------------------------------------------------------------------------ links and names


def anchors(page: Path) -> set[str]:
    """Anchors as GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: Path) -> Iterator[tuple[str, str]]:
    """(target, anchor) of every link that does not leave the repository."""
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if not re.match(r"https?:", target):
            path, _, anchor = target.partition("#")
            yield path, anchor


@named(PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for path, anchor in links(page):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors(target), f"{path}#{anchor}"


def test_every_page_can_be_reached_from_the_index() -> None:
    reached, waiting = set(), [DOCS / "index.md"]
    while waiting:
        page = waiting.pop()
        if page not in reached and page.suffix == ".md":
            reached.add(page)
            waiting += [(page.parent / path).resolve() for path, _ in links(page) if path]
    assert set() == {page for page in PAGES if page.is_relative_to(DOCS) or page.is_relative_to(ROOT / "examples")} - reached
    assert ROOT / "README.md" in reached


#: files of checkpoints, projects and users that pages speak of
NOT_OURS = {
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "vocab.txt",
    "modelrig.json",
    "tokenizer.json",
    "modelrig.toml",
    "pyproject.toml",
    "rig.toml",
    "__init__.py",
}
HOMES = ("", "core/modelrig", "plugins/modelrig_plugins", "plugins/modelrig_plugins/caches")


@named(WRITTEN)
def test_a_file_a_page_speaks_of_exists(page: Path) -> None:
    titles = {Path(block.title).name for block in blocks(page) if block.title}
    homes = [*(ROOT / home for home in HOMES), page.parent]
    for name in re.findall(r"`([\w./*-]+(?:\.(?:py|md|toml|txt|json)|/))`", prose(page)):
        known = Path(name).name in NOT_OURS | titles
        assert known or any((home / name).exists() for home in homes), f"there is no {name}"


def test_the_tree_in_the_readme_is_the_tree() -> None:
    tree = re.search(r"^## The tree\n\n```text\n(.*?)^```$", text_of(ROOT / "README.md"), re.M | re.S)
    assert tree is not None
    above: list[Path] = [ROOT]
    shown = set()
    for line in tree[1].splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()  # type: ignore[union-attr]
        depth = len(indent) // 2
        above[depth + 1 :] = [above[depth] / name]
        shown.add(above[-1])
        assert above[-1].exists(), f"there is no {name}"
        assert name.endswith("/") == above[-1].is_dir(), name
    top = {Path(*path.relative_to(ROOT).parts[:1]).name for path in shown}
    assert folders(ROOT) - {"build", "dist"} == top
    for parent in ("core/modelrig", "plugins/modelrig_plugins"):
        assert folders(ROOT / parent) == {path.name for path in shown if path.parent == ROOT / parent and path.is_dir()}


def folders(parent: Path) -> set[str]:
    return {path.name for path in parent.iterdir() if path.is_dir() and path.name[0] not in "._"}


def test_the_readme_lists_the_components_that_ship() -> None:
    rows = dict(re.findall(r"^\| (\w+) \| ((?:`\w+` ?)+) \|$", text_of(ROOT / "README.md"), re.M))
    assert {kind: [one.name for one in current().components(kind) if one.is_ours] for kind in PLANNED} == {
        kind: re.findall(r"`(\w+)`", names) for kind, names in rows.items()
    }


# ------------------------------------------------------------------------------------------------ nothing is left out


def test_every_hook_and_its_arguments_are_documented() -> None:
    hooks = {name: hook for name, hook in vars(hookspecs).items() if name.startswith("modelrig_")}
    assert [f"modelrig_{kind}" for kind in KINDS] == list(hooks)
    page = text_of(REFERENCE / "hooks.md")
    for name, hook in hooks.items():
        heading = re.search(rf"^## `{name}\((.*?)\)", page, re.M)
        assert heading is not None, name
        assert list(inspect.signature(hook).parameters) == re.findall(r"(\w+)(?=[:,]|$)", heading[1])


@pytest.mark.parametrize("code", errors.CODES)
def test_every_error_code_is_documented_and_raised(code: str) -> None:
    assert f"| `{code}` |" in text_of(REFERENCE / "errors.md")
    raised = sources("core", "plugins").replace(text_of(ROOT / "core/modelrig/errors.py"), "")
    # Codes such as CF-JSON are put together from a prefix; then a test must have seen one.
    assert f'"{code}"' in raised or code in sources("tests")


def test_every_error_class_is_in_the_drawn_tree() -> None:
    classes = [name for name, value in vars(errors).items() if isinstance(value, type) and value.__module__ == errors.__name__]
    drawn = text_of(REFERENCE / "errors.md")
    assert [] == [name for name in classes if name not in drawn]


def test_every_reason_code_is_documented() -> None:
    page = text_of(REFERENCE / "reasons.md")
    given = set(re.findall(r"\bReason\(\"([\w.]+)\"", sources("core"))) | {rule.code for rule in GENERATOR["RULES"]}
    assert len(given) > 20
    assert set() == {code for code in given if f"| `{code}` |" not in page and not code.startswith("plugin.")}
    assert "`plugin.STATE`" in page


def test_every_variable_is_documented() -> None:
    used = set(re.findall(r"\bMODELRIG_[A-Z]+(?:_[A-Z]+)*\b", sources("core", "plugins"))) - {"MODELRIG_API"}
    used |= {PREFIX + key.upper() for key in (*PARSERS, *OTHER_VARIABLES)}
    page = text_of(REFERENCE / "configuration.md")
    assert set() == {name for name in used if f"| `{name}` |" not in page}


def test_every_request_key_says_what_it_decides_and_accepts() -> None:
    assert list(PARSERS) == list(GENERATOR["DECIDES"])
    assert [] == [key for key, read in PARSERS.items() if not inspect.getdoc(read)]


# ------------------------------------------------------------------------------------------------ the public API


def modules() -> Iterator[ModuleType]:
    for package in (modelrig, modelrig_plugins):
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not found.name.endswith("__main__"):
                yield importlib.import_module(found.name)


def test_what_modelrig_offers_is_sorted_complete_and_there() -> None:
    assert sorted(modelrig.__all__) == modelrig.__all__
    assert {*modelrig._HOMES, "errors", "__version__"} == set(modelrig.__all__)
    for name in modelrig.__all__:
        assert getattr(modelrig, name) is not None


def test_lists_of_exported_names_are_sorted_and_true() -> None:
    for module in modules():
        exported = list(getattr(module, "__all__", ()))
        assert sorted(exported) == exported, module.__name__
        assert [] == [name for name in exported if not hasattr(module, name)], module.__name__


def test_the_error_module_exports_all_it_defines() -> None:
    defined = {name for name, value in vars(errors).items() if getattr(value, "__module__", None) == errors.__name__}
    assert {name for name in defined if not name.startswith("_")} | {"CODES"} == set(errors.__all__)


def test_every_module_says_what_it_is() -> None:
    assert [] == [module.__name__ for module in modules() if not module.__doc__]


def public() -> Iterator[tuple[str, object]]:
    """Functions and classes of the API, with their public methods and properties."""
    handed_out = (Encoded, Generation, GenerateOptions, Piece, PluginRow, RigPlan, Session, Stats)
    offered = [getattr(modelrig, name) for name in modelrig.__all__]
    for home in (components, errors, hookspecs):
        offered += [value for value in vars(home).values() if getattr(value, "__module__", None) == home.__name__]
    for thing in (*handed_out, *offered):
        if inspect.isfunction(thing) or inspect.isclass(thing):
            yield thing.__qualname__, thing
        if inspect.isclass(thing):
            for name, member in vars(thing).items():
                plain = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if inspect.isfunction(plain) and not name.startswith("_"):
                    yield f"{thing.__qualname__}.{name}", plain


def test_everything_public_has_a_docstring() -> None:
    things = [(name, thing) for name, thing in public() if not name.startswith("_")]
    assert len(things) > 100
    assert [] == [name for name, thing in things if not (getattr(thing, "__doc__", None) or "").strip()]
