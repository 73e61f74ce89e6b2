"""Caches and sessions in files: what is saved goes on elsewhere, and nothing else is taken for it."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import modelrig
from checkpoints import write_llama
from modelrig.checkpoint.headers import read_header
from modelrig.checkpoint.saving.vfs import Vfs
from modelrig.errors import CacheError, ResourceLimitError

CACHES: dict[str, Any] = {
    "dynamic": "dynamic",
    "static": "static",
    "sliding": "sliding",
    "offloaded": "offloaded",
    "quantized": {"name": "quantized", "group": 4, "residual": 3, "headroom": 4},
}
PROMPT = list(range(5, 45))


def load(folder: Path, cache: Any = "static", **request: Any) -> modelrig.Model:
    return modelrig.load(folder, cache=CACHES[cache] if isinstance(cache, str) else cache, **{"context": 100, **request})


@pytest.fixture(scope="module")
def model(llama_folder: Path) -> Any:
    with load(llama_folder) as loaded:
        yield loaded


@pytest.fixture
def saved(model: modelrig.Model, tmp_path: Path) -> Path:
    cache = model.new_cache(2, padding=[0, 2])
    model([PROMPT, PROMPT], cache=cache)
    return model.save_cache(cache, tmp_path / "held.safetensors")


def edited(saved: Path, metadata: dict[str, Any] | None = None, **tensors: Any) -> Path:
    """The file with other metadata and tensors (`cache_length` for `cache.length`); None for what is left out."""
    names = {name.replace("_", ".", 1): tensor for name, tensor in tensors.items()}
    kept = {name: one for name, one in {**load_file(saved), **names}.items() if one is not None}
    said = {**read_header(saved).metadata, **(metadata or {})}
    save_file(kept, saved, {name: text for name, text in said.items() if text is not None})
    return saved


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_goes_on_where_it_was_saved(llama_folder: Path, tmp_path: Path, name: str) -> None:
    with load(llama_folder, name) as model:
        cache = model.new_cache(2, padding=[0, 2])
        model([PROMPT, PROMPT], cache=cache)
        model.save_cache(cache, tmp_path / "held")
        again = model.load_cache(tmp_path / "held", max_len=60)
        assert (2, 40, 60) == (again.batch, again.length, again.capacity)
        assert torch.equal(model([[1, 2, 3]] * 2, cache=cache), model([[1, 2, 3]] * 2, cache=again))
        assert ["held"] == [file.name for file in tmp_path.iterdir()]
        assert (tmp_path / "held").stat().st_size < again.nbytes + 10_000


GO_ON = """
import json, sys, torch, modelrig
folder, path, cache = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
with modelrig.load(folder, cache=cache, context=100) as model:
    session = model.session(path=path)
    answer = session.generate([[7, 8]], max_new_tokens=6)
    print(json.dumps([answer.tokens, answer.stats.prompt_tokens, session.messages]))
"""


@pytest.mark.parametrize("name", CACHES)
def test_a_session_goes_on_in_another_process(llama_folder: Path, tmp_path: Path, name: str) -> None:
    with load(llama_folder, name) as model:
        session = model.session()
        session.generate([PROMPT], max_new_tokens=5)
        session.messages = [{"role": "user", "content": "é \u2028"}]
        path = session.save(tmp_path / "talk")
        expected = session.generate([[7, 8]], max_new_tokens=6)
    command = [sys.executable, "-c", GO_ON, str(llama_folder), str(path), json.dumps(CACHES[name])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert "" == done.stderr
    tokens, prefilled, messages = json.loads(done.stdout)
    assert (list(expected.tokens), expected.stats.prompt_tokens) == (tokens, prefilled)
    assert 3 == prefilled and [{"role": "user", "content": "é \u2028"}] == messages


def test_a_finetune_of_the_same_shapes_is_another_checkpoint_and_a_copy_is_not(
    saved: Path, llama_folder: Path, tmp_path: Path
) -> None:
    copy, tuned = tmp_path / "copy", tmp_path / "tuned"
    for folder in (copy, tuned):
        folder.mkdir()
    for file in llama_folder.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    write_llama(tuned, seed=1)
    with load(copy) as model:
        assert 40 == model.load_cache(saved).length
    with load(tuned) as model, pytest.raises(CacheError, match="belongs to another checkpoint") as caught:
        model.load_cache(saved)
    assert ("CA-FILE", str(saved), "checkpoint") == (caught.value.code, caught.value.path, caught.value.locus)


@pytest.mark.parametrize(
    ("request_", "what"),
    [({"cache": "dynamic"}, "cache"), ({"dtype": "bfloat16"}, "dtype"), ({"dtype": "float64"}, "dtype")],
)
def test_a_cache_of_another_rig_is_refused(saved: Path, llama_folder: Path, request_: dict[str, Any], what: str) -> None:
    with load(llama_folder, **request_) as model, pytest.raises(CacheError, match=f"belongs to another {what}"):
        model.load_cache(saved)


def test_other_options_of_a_cache_are_another_form(llama_folder: Path, tmp_path: Path) -> None:
    with load(llama_folder, "quantized") as model:
        path = model.save_cache(model.new_cache(), tmp_path / "held")
    with load(llama_folder, {**CACHES["quantized"], "residual": 9}) as model, pytest.raises(CacheError, match="residual"):
        model.load_cache(path)


@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.999])
def test_a_cut_file_is_refused(model: modelrig.Model, saved: Path, part: float) -> None:
    os.truncate(saved, int(part * saved.stat().st_size))
    with pytest.raises(CacheError, match="CA-FILE") as caught:
        model.load_cache(saved)
    assert str(saved) == caught.value.path


@pytest.mark.parametrize("place", range(0, 4000, 250))
def test_a_damaged_header_is_refused_or_changes_nothing_that_counts(model: modelrig.Model, saved: Path, place: int) -> None:
    data = bytearray(saved.read_bytes())
    data[place] ^= 0x15
    saved.write_bytes(data)
    try:
        assert 40 == model.load_cache(saved).length
    except CacheError as error:
        assert error.code in ("CA-FILE", "CA-FULL")


HUGE = torch.tensor([1 << 60])


@pytest.mark.parametrize(
    ("changes", "code", "text"),
    [
        ({"metadata": {"format": None}}, "CA-FILE", "not a cache"),
        ({"metadata": {"version": "2"}}, "CA-FILE", "version"),
        ({"metadata": {"architecture": "gpt2"}}, "CA-FILE", "another architecture"),
        ({"metadata": {"layers": None}}, "CA-FILE", "another layers"),
        ({"cache_padding": None}, "CA-FILE", "padding"),
        ({"cache_padding": torch.zeros(0, dtype=torch.int64)}, "CA-FILE", "padding"),
        ({"cache_padding": torch.zeros(3, dtype=torch.int64)}, "CA-FILE", "0.keys"),
        ({"cache_padding": torch.tensor([-1, 0])}, "CA-FILE", "padding"),
        ({"cache_length": HUGE}, "CA-FULL", "length"),
        ({"cache_length": torch.tensor([39])}, "CA-FILE", "0.keys"),
        ({"cache_more": torch.zeros(2)}, "CA-FILE", "more"),
        ({"more": torch.zeros(2)}, "CA-FILE", "more"),
    ],
)
def test_a_file_that_says_something_else_is_refused(
    model: modelrig.Model, saved: Path, changes: dict[str, Any], code: str, text: str
) -> None:
    with pytest.raises(CacheError) as caught:
        model.load_cache(edited(saved, **changes))
    assert code == caught.value.code and text in str(caught.value)
    assert str(saved) == caught.value.path


@pytest.mark.parametrize(
    "changes",
    [
        {"session_tokens": None},
        {"session_tokens": torch.tensor([1.0])},
        {"session_tokens": torch.tensor([97] * 50)},
        {"session_tokens": torch.tensor([-1] * 50)},
        {"session_tokens": torch.tensor([1] * 3)},
        {"metadata": {"messages": "{"}},
        {"metadata": {"messages": '{"role": "user"}'}},
        {"metadata": {"messages": "[" * 100_000}},
        {"metadata": {"messages": "[3]"}},
        {"cache_padding": torch.zeros(2, dtype=torch.int64)},
        {"cache_length": torch.tensor([float("nan")])},
        {"cache_length": torch.tensor([float("inf")])},
        {"cache_length": torch.tensor([1 + 2j])},
    ],
)
def test_a_session_that_makes_no_sense_is_refused(model: modelrig.Model, tmp_path: Path, changes: dict[str, Any]) -> None:
    session = model.session()
    session.generate([PROMPT], max_new_tokens=2)
    path = edited(session.save(tmp_path / "talk"), **changes)
    with pytest.raises(CacheError, match="CA-FILE"):
        model.session(path=path)


def test_a_cache_longer_than_there_is_room_says_so(model: modelrig.Model, saved: Path) -> None:
    with pytest.raises(CacheError, match="give a larger max_len"):
        model.load_cache(saved, max_len=39)


def test_what_is_not_finite_is_kept_as_it_is(model: modelrig.Model, tmp_path: Path) -> None:
    cache = model.new_cache()
    model([[1, 2]], cache=cache)
    cache.layers[0].keys[..., 0] = float("nan")
    again = model.load_cache(model.save_cache(cache, tmp_path / "held"))
    assert again.layers[0].keys[:, :, :2, 0].isnan().all()


@pytest.mark.parametrize("path", ["missing/held", "folder", "a\0b", 7, None])
def test_a_place_that_cannot_be_written_or_read_is_an_error(model: modelrig.Model, tmp_path: Path, path: Any) -> None:
    (tmp_path / "folder").mkdir()
    place = tmp_path / path if isinstance(path, str) else path
    for action in (lambda: model.save_cache(model.new_cache(), place), lambda: model.load_cache(place)):
        with pytest.raises(CacheError, match="CA-FILE"):
            action()
    assert ["folder"] == [file.name for file in tmp_path.iterdir()] and not list((tmp_path / "folder").iterdir())


@pytest.mark.parametrize("operation", ["create", "fsync", "rename"])
def test_a_save_that_fails_leaves_what_was_there(
    model: modelrig.Model, saved: Path, monkeypatch: pytest.MonkeyPatch, operation: str
) -> None:
    before, call = saved.read_bytes(), Vfs.call

    def fail(self: Vfs, name: str, path: Path, action: Any, *arguments: Any) -> Any:
        def broken(*_: Any) -> None:
            raise OSError(28, "No space left on device")

        return call(self, name, path, broken if name == operation else action, *arguments)

    monkeypatch.setattr(Vfs, "call", fail)
    with pytest.raises(CacheError, match=r"CA-FILE.*No space left"):
        model.save_cache(model.new_cache(), saved)
    assert before == saved.read_bytes()
    assert [saved] == list(saved.parent.iterdir())


def test_a_link_stays_and_what_it_leads_to_is_written(model: modelrig.Model, saved: Path) -> None:
    link = saved.with_name("link")
    link.symlink_to(saved)
    model.save_cache(model.new_cache(), link)
    assert link.is_symlink() and 0 == model.load_cache(saved).length


def test_a_checkpoint_that_changed_can_not_be_told(tmp_path: Path) -> None:
    write_llama(tmp_path / "own")
    with load(tmp_path / "own") as model:
        (weights,) = (tmp_path / "own").glob("*.safetensors")
        weights.rename(tmp_path / "away")
        weights.write_bytes((tmp_path / "away").read_bytes())
        with pytest.raises(CacheError, match=r"CA-FILE.*IO-CHANGED"):
            model.save_cache(model.new_cache(), tmp_path / "held")


@pytest.mark.parametrize(("batch", "max_len"), [(2, None), (1, 101), (1, 10**7), (3, 160)])
def test_a_cache_beyond_the_plan_is_said_or_refused_with_its_bytes(
    model: modelrig.Model, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, batch: int, max_len: int | None
) -> None:
    planner = model.plan.choices["caches"].registered.planner()
    needed = planner.nbytes(model.plan.facts.cached_layers, batch, max_len or 100, "float32", None)
    monkeypatch.setattr(type(model.plan.environment), "available_bytes", lambda self, device: needed - 1)
    with pytest.raises(ResourceLimitError, match=f"RL-MEM.*{needed:,} bytes on cpu; {needed - 1:,} are available"):
        model.new_cache(batch, max_len)
    if needed < 10**7:
        monkeypatch.setattr(type(model.plan.environment), "available_bytes", lambda self, device: needed)
        with caplog.at_level(logging.INFO, "modelrig"):
            assert needed == model.new_cache(batch, max_len).nbytes
        assert f"{needed:,} bytes" in caplog.text
    monkeypatch.setattr(type(model.plan.environment), "available_bytes", lambda self, device: 0)
    assert 100 == model.new_cache().capacity  # as planned
