from __future__ import annotations

import os
from pathlib import Path

import pytest

from modelrig.errors import RequestError
from modelrig.planning.request import PARSERS, Request, read_request
from modelrig.planning.values import Wish


def read(directory: Path, config: object = None, environ: dict[str, str] | None = None, **arguments: object) -> Request:
    return read_request(arguments, config, environ=environ or {}, directory=directory)  # type: ignore[arg-type]


def test_without_anything_every_key_has_its_default(tmp_path: Path) -> None:
    request = read(tmp_path)
    assert Request() == request
    assert {"default"} == {request.origin(key) for key in PARSERS}
    assert (Wish(), Wish(("none",), False), 1) == (request.attention, request.compiler, request.batch)


def test_arguments_win_over_variables_over_the_file(tmp_path: Path) -> None:
    (tmp_path / "modelrig.toml").write_text('dtype = "float16"\ncontext = 10\nbatch = 2\n')
    request = read(tmp_path, environ={"MODELRIG_DTYPE": "float64", "MODELRIG_CONTEXT": "20"}, dtype="bf16")
    assert ("bfloat16", 20, 2) == (request.dtype, request.context, request.batch)
    file = str(tmp_path / "modelrig.toml")
    assert ["argument", "MODELRIG_CONTEXT", file] == [request.origin(key) for key in ("dtype", "context", "batch")]


def test_a_mapping_or_another_file_replaces_the_one_in_the_working_directory(tmp_path: Path) -> None:
    (tmp_path / "modelrig.toml").write_text("batch = 2\n")
    (tmp_path / "other.toml").write_text("context = 5\n")
    assert (1, 7) == ((mapped := read(tmp_path, {"context": 7})).batch, mapped.context)
    assert (1, 5) == ((filed := read(tmp_path, tmp_path / "other.toml")).batch, filed.context)


@pytest.mark.parametrize("place", ["", "sub"])
def test_a_file_in_the_checkpoints_own_folder_is_not_read_and_a_note_says_so(tmp_path: Path, place: str) -> None:
    directory = tmp_path / place
    directory.mkdir(exist_ok=True)
    (directory / "modelrig.toml").write_text("this is no TOML")
    request = read_request({}, environ={}, directory=directory, checkpoint=tmp_path)
    assert Request(notes=request.notes) == request
    assert "own folder" in request.notes[0]


def test_a_link_into_the_checkpoints_folder_is_not_read_either(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "work").mkdir()
    (tmp_path / "model" / "modelrig.toml").write_text("batch = 3")
    (tmp_path / "work" / "modelrig.toml").symlink_to("../model/modelrig.toml")
    (tmp_path / "linked").symlink_to("model")
    for directory in ("work", "linked"):
        request = read_request({}, environ={}, directory=tmp_path / directory, checkpoint=tmp_path / "model")
        assert 1 == request.batch


@pytest.mark.parametrize("kind", ["a folder", "a named pipe", "a link that points to nothing", "symbolic links"])
def test_a_file_that_cannot_be_read_is_an_error_and_not_as_if_there_were_none(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "modelrig.toml"
    if kind == "a folder":
        path.mkdir()
    elif kind == "a named pipe":
        os.mkfifo(path)
    else:
        path.symlink_to(path.name if kind == "symbolic links" else "gone")
    with pytest.raises(RequestError, match=kind) as caught:
        read(tmp_path)
    assert ("RQ-FILE", str(path)) == (caught.value.code, caught.value.path)


def test_none_means_the_doing_nothing_part_for_a_slot_and_not_given_for_the_rest(tmp_path: Path) -> None:
    request = read(tmp_path, quantizer=None, dtype=None, context=None)
    assert (Wish(("none",), False), "auto", "auto") == (request.quantizer, request.dtype, request.context)


def test_options_may_come_from_elsewhere_than_the_name(tmp_path: Path) -> None:
    config = {"quantizer": {"name": "int4", "group_size": 64, "symmetric": True}}
    request = read(tmp_path, config, set={"quantizer.group_size": 32})
    assert {"group_size": 32, "symmetric": True} == request.quantizer.options_of("int4")
    assert "argument" == request.origins["quantizer.group_size"]


def test_a_name_in_an_argument_drops_the_options_of_the_file(tmp_path: Path) -> None:
    request = read(tmp_path, {"quantizer": {"name": "int4", "group_size": 64}}, quantizer="int8")
    assert {} == request.quantizer.options_of("int8")


def test_variables_take_lists_with_commas_and_empty_ones_count_as_unset(tmp_path: Path) -> None:
    request = read(tmp_path, environ={"MODELRIG_ATTENTION": "a, b", "MODELRIG_CACHE": "", "MODELRIG_PLUGINS": "x", "OTHER": "1"})
    assert (("a", "b"), Wish()) == (request.attention.names, request.cache)


def test_all_problems_of_all_places_are_told_at_once_with_the_nearest_name(tmp_path: Path) -> None:
    (tmp_path / "modelrig.toml").write_text('atention = "sdpa"\ncontext = "x"\n')
    with pytest.raises(RequestError) as caught:
        read(tmp_path, environ={"MODELRIG_BATCH": "0", "MODELRIG_CONTXT": "1"}, dtype="int8", cash="static")
    text = str(caught.value)
    assert "RQ-UNKNOWN" == caught.value.code
    for part in (
        "6 problems",
        "did you mean 'attention'",
        "MODELRIG_BATCH",
        "'MODELRIG_CONTEXT'",
        "did you mean 'cache'",
        "int8",
        "modelrig.toml",
    ):
        assert part in text, part


def test_one_problem_names_its_key_and_file(tmp_path: Path) -> None:
    file = tmp_path / "modelrig.toml"
    file.write_text("batch = 0")
    with pytest.raises(RequestError) as caught:
        read(tmp_path)
    assert ("RQ-VALUE", str(file), "batch") == (caught.value.code, caught.value.path, caught.value.locus)


@pytest.mark.parametrize("content", [b"a = ", b"\xff\xfe", b"a = 1\na = 2", b"x = " + b"[" * 100_000, b"#" * (2 << 20)])
def test_a_file_that_is_no_toml_is_one_typed_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "modelrig.toml").write_bytes(content)
    with pytest.raises(RequestError) as caught:
        read(tmp_path)
    assert ("RQ-FILE", str(tmp_path / "modelrig.toml")) == (caught.value.code, caught.value.path)


def test_a_file_that_is_asked_for_must_be_there_and_regular(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("missing.toml", "pipe", "."):
        with pytest.raises(RequestError) as caught:
            read(tmp_path, tmp_path / name)
        assert "RQ-FILE" == caught.value.code
    with pytest.raises(RequestError) as caught:
        read(tmp_path, 7)
    assert "RQ-VALUE" == caught.value.code


def test_the_request_as_json_is_what_a_config_file_would_hold(tmp_path: Path) -> None:
    given = {"attention": ["a", "b"], "quantizer": {"name": "int4", "group_size": 64}, "max_memory": "1kB", "context": 8}
    document = read(tmp_path, **given).to_json()
    again = read(tmp_path, {key: entry["value"] for key, entry in document.items()})
    assert document == {key: entry | {"origin": document[key]["origin"]} for key, entry in again.to_json().items()}
