from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import rigs
from modelrig.components import Architecture, Catalog, Format, Snapshot, Source
from modelrig.errors import CodeRefused, ConfigError, ModelrigError, PluginError, RequestError, SourceError
from modelrig.planning.identify import (
    catalog,
    check_reference,
    config_notes,
    describe,
    identify_architecture,
    read_config,
    resolve,
)
from modelrig.registry import Registry, current
from tensorfiles import write_valid


class Claims:
    @staticmethod
    def claims(subject: Any) -> str | None:
        return "everything"

    @staticmethod
    def resolve(reference: str) -> Snapshot:
        raise ZeroDivisionError("a bug")

    @staticmethod
    def names() -> list[str]:
        return ["a-model"]


class Silent(Claims):
    @staticmethod
    def claims(subject: Any) -> str | None:
        return None


class Fails(Silent):
    @staticmethod
    def claims(subject: Any) -> str | None:
        raise RuntimeError("no service")


rigs.Claims, rigs.Silent, rigs.FailsToClaim = Claims, Silent, Fails  # type: ignore[attr-defined]


def source(name: str, planner: str) -> Source:
    return Source(name=name, summary=f"the {name} source", planner=f"rigs:{planner}", implementation="rigs:none")


def format_(name: str, planner: str) -> Format:
    return Format(name=name, summary="", planner=f"rigs:{planner}", implementation="rigs:none")


def refused(call: Callable[..., Any], *arguments: Any) -> ModelrigError:
    with pytest.raises(ModelrigError) as caught:
        call(*arguments)
    return caught.value


# ------------------------------------------------------------------------------------------------ sources


def test_a_folder_is_resolved_by_the_one_source_that_claims_it(llama_folder: Path) -> None:
    found, snapshot = resolve(str(llama_folder), current())
    assert ("local", llama_folder) == (found.registered.name, snapshot.root)


def test_a_reference_nobody_claims_names_what_was_tried_and_the_nearest() -> None:
    error = refused(resolve, "a-modle", rigs.registry(source("shop", "Silent"), source("down", "FailsToClaim")))
    assert (SourceError, "SR-UNKNOWN") == (type(error), error.code)
    for part in ("did you mean 'a-model'", "modelrig:down could not be asked, failed: RuntimeError: no service"):
        assert part in error.reason
    assert "shop: the shop source" in str(error.hint)


def test_the_nearest_path_is_suggested(tmp_path: Path) -> None:
    (tmp_path / "my-model").mkdir()
    error = refused(resolve, f"{tmp_path}/my-modle", rigs.registry(source("shop", "Silent")))
    assert f"did you mean '{tmp_path}/my-model'" in error.reason


def test_two_claims_are_an_error_that_names_both() -> None:
    error = refused(resolve, "x", rigs.registry(source("one", "Claims"), source("two", "Claims")))
    assert "SR-CLAIMS" == error.code
    assert "modelrig:one (everything); modelrig:two (everything)" in error.reason


def test_a_source_that_fails_to_resolve_is_a_plugin_error() -> None:
    error = refused(resolve, "x", rigs.registry(source("one", "Claims")))
    assert (PluginError, "PL-CONTRACT") == (type(error), error.code)
    assert "ZeroDivisionError: a bug" in error.reason


def test_a_source_that_is_not_usable_is_told_with_its_reason() -> None:
    error = refused(resolve, "x", rigs.registry(source("cloud", "Claims"), cloud=("unavailable", "needs cloudlib")))
    assert "modelrig:cloud could not be asked, unavailable: needs cloudlib" in error.reason


@pytest.mark.parametrize("reference", ["", "a\0b", 7, None, b"x"])
def test_what_can_be_no_reference_is_an_error_of_the_request(reference: Any) -> None:
    error = refused(check_reference, reference)
    assert (RequestError, "RQ-VALUE") == (type(error), error.code)


def test_a_path_serves_as_a_reference(tmp_path: Path) -> None:
    assert str(tmp_path) == check_reference(tmp_path)


# ------------------------------------------------------------------------------------------------ formats


def test_a_folder_no_format_reads_says_what_is_there(tmp_path: Path) -> None:
    for name in ("model.gguf", "pytorch_model.bin", "README.md"):
        (tmp_path / name).touch()
    error = refused(catalog, Snapshot(reference="x", root=tmp_path, source="local"), rigs.registry(format_("one", "Silent")))
    assert ("SR-FORMAT", str(tmp_path)) == (error.code, error.path)
    assert "'model.gguf', 'pytorch_model.bin'); installed: one" in error.reason


def test_a_folder_without_tensor_files_says_so(tmp_path: Path) -> None:
    error = refused(catalog, Snapshot(reference="x", root=tmp_path, source="local"), current())
    assert "no tensor files" in error.reason


# ------------------------------------------------------------------------------------------------ architectures


def architectures(**model_types: set[str]) -> Registry:
    made = [
        Architecture(name=name, summary="", planner="rigs:Plain", implementation="rigs:none", model_types=types)
        for name, types in model_types.items()
    ]
    return rigs.registry(*made)


CONFIG = Path("config.json")


def test_the_architecture_is_the_one_that_lists_the_model_type() -> None:
    found = identify_architecture({"model_type": "b"}, CONFIG, architectures(one={"a"}, two={"b", "c"}))
    assert ("two", "model_type 'b' in config.json") == (found.registered.name, found.why)


@pytest.mark.parametrize(
    ("config", "kind", "code", "locus"),
    [
        ({"model_type": "lama"}, ConfigError, "CF-ARCH", "model_type"),
        ({}, ConfigError, "CF-MISSING", "model_type"),
        ({"model_type": 7}, ConfigError, "CF-TYPE", "model_type"),
        ({"model_type": "own", "auto_map": {"AutoModel": "x.Y"}}, CodeRefused, "CR-CODE", "auto_map"),
    ],
)
def test_a_config_nobody_implements_is_one_typed_error(config: dict[str, Any], kind: type, code: str, locus: str) -> None:
    error = refused(identify_architecture, config, CONFIG, architectures(one={"llama"}))
    assert (kind, code, locus, "config.json") == (type(error), error.code, error.locus, error.path)


def test_an_unknown_model_type_is_told_with_the_nearest_and_with_who_would_serve_it() -> None:
    made = Architecture(name="mamba", summary="", planner="rigs:Plain", implementation="rigs:none", model_types={"mamba"})
    registry = rigs.registry(made, mamba=("unavailable", "needs mamba-ssm"))
    assert "did you mean 'mamba'" in refused(identify_architecture, {"model_type": "mambo"}, CONFIG, registry).reason
    assert "unavailable: needs mamba-ssm" in refused(identify_architecture, {"model_type": "mamba"}, CONFIG, registry).reason


def test_code_of_the_checkpoint_is_ignored_and_noted_when_the_architecture_is_known() -> None:
    config = {"model_type": "llama", "auto_map": {"AutoModel": "x.Y"}, "architectures": ["LlamaForCausalLM"]}
    (note,) = config_notes(config, "llama")
    assert "auto_map" in note


@pytest.mark.parametrize(
    ("model_type", "classes", "notes"),
    [
        ("llama", ["LlamaForCausalLM"], 0),
        ("qwen2_moe", ["Qwen2MoeForCausalLM"], 0),
        ("llama", ["MistralForCausalLM"], 1),
        ("llama", "nonsense", 0),
        ("llama", [3], 0),
    ],
)
def test_a_class_of_another_family_is_noted(model_type: str, classes: Any, notes: int) -> None:
    assert notes == len(config_notes({"model_type": model_type, "architectures": classes}, "x"))


def test_a_planner_that_fails_to_describe_is_a_plugin_error() -> None:
    error = refused(describe, {"model_type": "a"}, CONFIG, Catalog(format="x", files=(), entries={}), architectures(one={"a"}))
    assert "PL-CONTRACT" == error.code


def test_a_folder_without_a_config_is_one_typed_error(tmp_path: Path) -> None:
    error = refused(read_config, Snapshot(reference="x", root=tmp_path, source="local"))
    assert ("CF-MISSING", str(tmp_path / "config.json")) == (error.code, error.path)


# ------------------------------------------------------------------------------------------------ several formats, and variants


class Holds(Silent):
    @staticmethod
    def claims(subject: Any) -> str | None:
        return "its file"

    @staticmethod
    def catalog(snapshot: Snapshot) -> Catalog:
        return Catalog(format="made up", files=(), entries={}, notes=("its own",))


rigs.Holds = Holds  # type: ignore[attr-defined]


def yielding(**formats: set[str]) -> Registry:
    made = [
        Format(name=name, summary="", planner="rigs:Holds", implementation="rigs:none", yields_to=others)
        for name, others in formats.items()
    ]
    return rigs.registry(*made)


NOWHERE = Snapshot(reference="x", root=Path("nowhere"), source="local")


@pytest.mark.parametrize(
    ("formats", "firm", "soft"),
    [
        ({"a": set(), "b": {"a"}}, "a", "b"),
        ({"b": {"a"}, "a": set()}, "a", "b"),
        ({"a": set(), "b": {"a"}, "c": {"a", "b"}}, "a", "c"),
        ({"a": set(), "b": {"a"}, "c": {"b"}}, "a", "c"),
        ({"b": {"a"}}, "b", "b"),
        ({"a": set()}, "a", "a"),
    ],
)
def test_a_format_that_yields_leaves_the_claim_unless_the_yielding_one_is_asked_for(
    formats: dict[str, set[str]], firm: str, soft: str
) -> None:
    registry = yielding(**formats)
    assert firm == catalog(NOWHERE, registry)[0].registered.name
    assert soft == catalog(NOWHERE, registry, prefer_yielding=True)[0].registered.name


def test_what_another_format_would_have_read_is_noted() -> None:
    _, found = catalog(NOWHERE, yielding(a=set(), b={"a"}))
    assert ("its own", "its file is not used: b yields to a") == found.notes
    _, found = catalog(NOWHERE, yielding(a=set(), b={"a"}), prefer_yielding=True)
    assert "its file is not used: b was asked for" == found.notes[1]


@pytest.mark.parametrize("formats", [{"a": set(), "b": set()}, {"a": {"b"}, "b": {"a"}}, {"a": set(), "b": {"a"}, "c": set()}])
def test_claims_that_no_yielding_settles_are_an_error(formats: dict[str, set[str]]) -> None:
    assert "SR-CLAIMS" == refused(catalog, NOWHERE, yielding(**formats)).code


def test_safetensors_goes_before_a_bin_file_which_is_then_never_opened(tmp_path: Path) -> None:
    write_valid(tmp_path / "model.safetensors", a=("F32", [1]))
    (tmp_path / "pytorch_model.bin").write_bytes(b"whatever it is")
    snapshot = Snapshot(reference="x", root=tmp_path, source="local")
    chosen, found = catalog(snapshot, current())
    assert ("safetensors", ["a"]) == (chosen.registered.name, list(found.entries))
    assert ("pytorch_model.bin is not used: pytorch_bin yields to safetensors",) == found.notes
    with pytest.raises(ModelrigError) as caught:
        catalog(snapshot, current(), prefer_yielding=True)
    assert ("ZP-MAGIC", str(tmp_path / "pytorch_model.bin")) == (caught.value.code, caught.value.path)


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_numbered_files_without_their_index_are_told_to_be_a_part(tmp_path: Path, variant: str | None) -> None:
    mark = "" if variant is None else f".{variant}"
    name = f"model{mark}-00001-of-00002.safetensors"
    write_valid(tmp_path / name, a=("F16", [1]))
    snapshot = Snapshot(reference="x", root=tmp_path, source="local", variant=variant)
    error = refused(lambda: catalog(snapshot, current()))
    assert ("SR-FORMAT", str(tmp_path)) == (error.code, error.path)
    assert f"{name!r} is one of several files" in error.reason
    (tmp_path / f"model.safetensors.index{mark}.json").write_text("{}")
    assert "is one of several" not in refused(lambda: catalog(snapshot, current())).reason


def test_a_variant_is_read_where_it_is_asked_for_and_told_where_nothing_else_is(tmp_path: Path) -> None:
    def made(variant: str | None) -> Any:
        return catalog(Snapshot(reference="x", root=tmp_path, source="local", variant=variant), current())

    write_valid(tmp_path / "model.fp16.safetensors", a=("F16", [1]))
    assert "float16" == made("fp16")[1].entries["a"].dtype
    error = refused(made, None)
    assert ("SR-FORMAT", str(tmp_path)) == (error.code, error.path)
    assert "of a variant: fp16" in error.reason
    assert "--variant fp16" in str(error.hint)
    error = refused(made, "bf16")
    assert "no tensor files of the variant 'bf16'; variants there: fp16" in error.reason
    assert "did you mean 'fp16'" in str(error.hint)
    write_valid(tmp_path / "model.safetensors", a=("F32", [1]))
    assert ("float32", "float16") == (made(None)[1].entries["a"].dtype, made("fp16")[1].entries["a"].dtype)
    assert "and files without a mark" in refused(made, "bf16").reason


def test_a_source_that_fetches_is_told_the_variant_and_every_snapshot_bears_it() -> None:
    class Fetches(Claims):
        @staticmethod
        def resolve(reference: str) -> Snapshot:
            return Snapshot(reference=reference, root=Path("plain"), source="shop")

        @staticmethod
        def resolve_variant(reference: str, variant: str) -> Snapshot:
            return Snapshot(reference=reference, root=Path(variant), source="shop")

    rigs.Fetches = Fetches  # type: ignore[attr-defined]
    registry = rigs.registry(source("shop", "Fetches"))
    assert [("plain", None), ("fp16", "fp16")] == [
        (str(one.root), one.variant) for one in (resolve("x", registry)[1], resolve("x", registry, "fp16")[1])
    ]
