"""From a plan to parameters: in place where the dtype stays, exactly cast where it does not, and nothing left after an error."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import pytest
import torch
from safetensors.torch import load, save_file

import modelrig
from checkpoints import write_llama
from modelrig.components import Parameter
from modelrig.errors import FileError, LoadError, PluginError, TokenizerError
from modelrig.loading import pieces, transport
from residue import held, mappings, resident_bytes

FILE = "model.safetensors"


@pytest.fixture
def folder(llama_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(llama_folder, tmp_path / "model"))


@pytest.fixture
def reading(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network file system: nothing is mapped."""
    monkeypatch.setattr(transport, "is_on_network", lambda path: True)


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Tensors of the folder by the format's own library; copies, so that no mapping is theirs."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load(file.read_bytes()).items()}


def parameters(model: modelrig.Model) -> dict[str, torch.Tensor]:
    return dict(model.module.named_parameters())


def weight_bytes(plan: modelrig.Plan) -> int:
    return sum(line.bytes for line in plan.ledger if line.moment == "steady" and line.what.startswith("weights"))


def rewrite_header(path: Path, edit: Callable[[str], str]) -> None:
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = edit(raw[8 : 8 + length].decode()).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])


# ------------------------------------------------------------------------------------------------ in place


def test_parameters_of_the_stored_dtype_are_views_of_the_file(folder: Path) -> None:
    model = modelrig.load(folder)
    ((first, last, path),) = mappings(folder)
    assert str(folder / FILE) == path
    for name, tensor in stored(folder).items():
        actual = parameters(model)[name]
        assert torch.equal(tensor, actual)
        assert first <= actual.data_ptr() and actual.data_ptr() + actual.nbytes <= last
    total = sum(tensor.nbytes for tensor in stored(folder).values())
    assert (total, 0) == (model.load_report.mapped_bytes, model.load_report.copied_bytes)


def test_loading_in_place_allocates_next_to_nothing(tmp_path: Path) -> None:
    write_llama(tmp_path, hidden_size=512, intermediate_size=2048, vocab_size=8000, num_attention_heads=8, num_hidden_layers=4)
    plan = modelrig.plan(tmp_path)
    modelrig.load("tiny").close()  # what is imported and allocated once does not count
    before = resident_bytes("RssAnon")
    model = plan.load()
    assert weight_bytes(plan) > 80 << 20
    assert resident_bytes("RssAnon") - before < 8 << 20
    assert weight_bytes(plan) == model.load_report.mapped_bytes


def test_a_write_to_a_parameter_stays_in_this_process(folder: Path) -> None:
    before = (folder / FILE).read_bytes()
    model = modelrig.load(folder)
    model.module.get_parameter("model.norm.weight").zero_()
    assert before == (folder / FILE).read_bytes()
    assert 1 == int(modelrig.load(folder).module.get_parameter("model.norm.weight").ne(0).all())


def test_sharded_checkpoints_are_mapped_shard_by_shard(tmp_path: Path) -> None:
    write_llama(tmp_path, max_shard_size="40KB")
    shards = sorted(str(path) for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    model = modelrig.load(tmp_path)
    assert shards == sorted({path for *_, path in mappings(tmp_path)})
    for name, tensor in stored(tmp_path).items():
        assert torch.equal(tensor, parameters(model)[name])
    assert 0 == model.load_report.copied_bytes


def test_tensors_at_addresses_their_dtype_does_not_allow_are_copied(folder: Path) -> None:
    rewrite_header(folder / FILE, lambda text: text.rstrip() + " " * (8 - len(text.rstrip()) % 8 + 3))
    plan = modelrig.plan(folder)
    model = plan.load()
    total = sum(tensor.nbytes for tensor in stored(folder).values())
    assert (0, total) == (model.load_report.mapped_bytes, model.load_report.copied_bytes)
    assert [] == mappings(folder)
    assert total == weight_bytes(plan)
    for name, tensor in stored(folder).items():
        assert torch.equal(tensor, parameters(model)[name])


# ------------------------------------------------------------------------------------------------ copied


@pytest.mark.parametrize("to", ["float64", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("piece", [pieces.PIECE_BYTES, 264], ids=["", "in small pieces"])
def test_casting_equals_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, to: str, piece: int) -> None:
    monkeypatch.setattr(pieces, "PIECE_BYTES", piece)
    write_llama(tmp_path, dtype=dtype)
    plan = modelrig.plan(tmp_path, dtype=to)
    model = plan.load()
    for name, tensor in stored(tmp_path).items():
        actual = parameters(model)[name]
        assert tensor.to(getattr(torch, to)).dtype == actual.dtype
        assert torch.equal(tensor.to(actual.dtype), actual)
    assert (dtype == to) == bool(mappings(tmp_path))
    assert weight_bytes(plan) == sum(parameter.nbytes for parameter in model.module.parameters())


def test_float8_weights_are_cast_like_torch_does(folder: Path) -> None:
    tensors = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in stored(folder).items()}
    save_file(tensors, folder / FILE)
    model = modelrig.load(folder, dtype="bfloat16")
    for name, tensor in tensors.items():
        assert torch.equal(tensor.to(torch.bfloat16), parameters(model)[name])


def test_casting_takes_the_model_and_little_more(tmp_path: Path) -> None:
    write_llama(
        tmp_path, dtype="bfloat16", hidden_size=512, intermediate_size=2048, vocab_size=8000, num_attention_heads=8,
        num_hidden_layers=4,
    )  # fmt: skip
    plan = modelrig.plan(tmp_path, dtype="float32")
    modelrig.load("tiny").close()
    peaks: list[int] = []
    before = resident_bytes()
    model = plan.load(progress=lambda done, total: peaks.append(resident_bytes()))
    assert max(peaks) - before - weight_bytes(plan) < 16 << 20
    assert weight_bytes(plan) == 2 * model.load_report.copied_bytes


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_files_that_are_not_mapped_give_the_same_model(folder: Path, reading: None, dtype: str) -> None:
    model = modelrig.load(folder, dtype=dtype)
    for name, tensor in stored(folder).items():
        assert torch.equal(tensor.to(getattr(torch, dtype)), parameters(model)[name])
    assert 0 == model.load_report.mapped_bytes
    assert sum(tensor.nbytes for tensor in stored(folder).values()) == model.load_report.copied_bytes
    assert ([], []) == held(folder)


# ------------------------------------------------------------------------------------------------ dtypes, ties, bytes


@pytest.mark.parametrize(
    ("config", "stored_as", "asked", "expected"),
    [
        ("bfloat16", "float32", "auto", "bfloat16"),
        (..., "float16", "auto", "float16"),
        (None, "bfloat16", "auto", "bfloat16"),
        ("bfloat16", "bfloat16", "float32", "float32"),
    ],
)
def test_the_dtype_is_the_requests_then_the_configs_then_the_files(
    edited_checkpoint: Callable[..., Path], config: Any, stored_as: str, asked: str, expected: str
) -> None:
    folder = edited_checkpoint(dtype=config)
    save_file({name: tensor.to(getattr(torch, stored_as)) for name, tensor in stored(folder).items()}, folder / FILE)
    model = modelrig.load(folder, dtype=asked)
    assert {getattr(torch, expected)} == {parameter.dtype for parameter in model.module.parameters()}
    assert getattr(torch, expected) == model([[1, 2]]).dtype


def test_tied_embeddings_are_one_tensor_and_counted_once(tmp_path: Path) -> None:
    write_llama(tmp_path, tie_word_embeddings=True)
    plan = modelrig.plan(tmp_path)
    model = plan.load()
    assert model.module.lm_head.weight is model.module.model.embed_tokens.weight
    assert weight_bytes(plan) == model.memory()["weights"] == model.load_report.mapped_bytes


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_predicted_bytes_are_the_measured_ones(dtype: str, cache: str) -> None:
    plan = modelrig.plan("tiny", dtype=dtype, cache=cache, context=300, batch=2)
    model = plan.load()
    measured = model.new_cache(batch=2)
    model([[7] * 300] * 2, cache=measured)
    assert weight_bytes(plan) == model.memory()["weights"]
    assert [measured.nbytes] == [line.bytes for line in plan.ledger if line.what == "key/value cache"]


def test_parameters_are_ready_for_use_and_ask_for_no_gradient(llama_folder: Path) -> None:
    model = modelrig.load(llama_folder)
    assert not model.module.training
    assert not any(parameter.requires_grad or parameter.is_meta for parameter in model.module.parameters())


def test_a_model_loaded_in_inference_mode_serves_outside_of_it(llama_folder: Path) -> None:
    with torch.inference_mode():
        model = modelrig.load(llama_folder, dtype="bfloat16")
    assert not any(parameter.is_inference() for parameter in model.module.parameters())
    assert 3 == len(model.generate([1, 2], max_new_tokens=3).tokens)


def test_progress_is_in_bytes_and_reaches_the_total(llama_folder: Path) -> None:
    calls: list[tuple[int, int]] = []
    modelrig.load(llama_folder, progress=lambda done, total: calls.append((done, total)))
    total = sum(tensor.nbytes for tensor in stored(llama_folder).values())
    assert {total} == {total for _, total in calls}
    assert sorted({done for done, _ in calls}) == [done for done, _ in calls]
    assert total == calls[-1][0]


# ------------------------------------------------------------------------------------------------ errors


def test_every_missing_unexpected_and_misshapen_tensor_is_listed(folder: Path) -> None:
    tensors = stored(folder)
    missing = ["model.layers.0.mlp.up_proj.weight", "model.norm.weight"]
    for name in missing:
        del tensors[name]
    tensors |= {"extra.a": torch.zeros(1), "extra.b": torch.zeros(2)}
    misshapen = ["lm_head.weight", "model.layers.1.self_attn.k_proj.weight"]
    for name in misshapen:
        tensors[name] = tensors[name].T.contiguous()
    save_file(tensors, folder / FILE)
    with pytest.raises(LoadError) as caught:
        modelrig.load(folder)
    error = caught.value
    assert ("LD-TENSORS", str(folder)) == (error.code, error.path)
    assert missing == sorted(error.missing)
    assert ["extra.a", "extra.b"] == sorted(error.unexpected)
    assert misshapen == sorted(line.partition(":")[0] for line in error.misshapen)
    for name in [*missing, *misshapen, "extra.a", "extra.b"]:
        assert name in str(error)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64])
def test_a_weight_that_is_no_number_with_a_point_is_refused(folder: Path, dtype: torch.dtype) -> None:
    tensors = stored(folder)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name] = tensors[name].to(dtype)
    save_file(tensors, folder / FILE)
    with pytest.raises(LoadError) as caught:
        modelrig.load(folder)
    error = caught.value
    assert ("LD-DTYPE", str(folder / FILE), name) == (error.code, error.path, error.locus)
    assert str(dtype).removeprefix("torch.") in error.reason
    assert ([], []) == held(folder)


def append(path: Path) -> None:
    with path.open("ab") as stream:
        stream.write(b"\0" * 8)


def touch(path: Path) -> None:
    os.utime(path, ns=(1, 1))


def shorten(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 3)


def exchange(path: Path) -> None:
    copy = path.with_name("copy")
    shutil.copy2(path, copy)
    copy.replace(path)


CHANGES = [append, touch, shorten, exchange]


@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changed_since_the_plan_is_refused(folder: Path, change: Callable[[Path], None]) -> None:
    plan = modelrig.plan(folder)
    change(folder / FILE)
    with pytest.raises(FileError, match="IO-CHANGED") as caught:
        plan.load()
    assert str(folder / FILE) == caught.value.path
    assert ([], []) == held(folder)


@pytest.mark.parametrize("how", ["mapped", "cast", "read"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_file_that_changes_while_it_is_read_is_refused(
    folder: Path, request: pytest.FixtureRequest, change: Callable[[Path], None], how: str
) -> None:
    if how == "read":
        request.getfixturevalue("reading")
    plan = modelrig.plan(folder, dtype="bfloat16" if how == "cast" else "float32")
    calls: list[int] = []

    def interfere(done: int, total: int) -> None:
        calls.append(done)
        if len(calls) == 3:
            change(folder / FILE)

    with pytest.raises(FileError, match="IO-CHANGED") as caught:
        plan.load(progress=interfere)
    assert str(folder / FILE) == caught.value.path
    assert ([], []) == held(folder)  # although `caught` still holds the traceback


def test_a_shard_that_changes_after_its_turn_is_refused(tmp_path: Path) -> None:
    write_llama(tmp_path, max_shard_size="40KB")
    plan = modelrig.plan(tmp_path)
    first = plan.catalog.files[0].path
    with pytest.raises(FileError, match="IO-CHANGED") as caught:
        plan.load(progress=lambda done, total: append(first) if done == total else None)
    assert str(first) == caught.value.path
    assert ([], []) == held(tmp_path)


def test_a_file_that_is_gone_is_named(folder: Path) -> None:
    plan = modelrig.plan(folder)
    (folder / FILE).unlink()
    with pytest.raises(FileError, match="does not exist") as caught:
        plan.load()
    assert ("IO-READ", str(folder / FILE)) == (caught.value.code, caught.value.path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError, MemoryError])
def test_an_interruption_frees_everything(folder: Path, error: type[BaseException], dtype: str) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise error

    plan = modelrig.plan(folder, dtype=dtype)
    living = count_tensors()
    with pytest.raises(error) as caught:
        plan.load(progress=stop)
    assert ([], []) == held(folder)
    assert living == count_tensors()
    assert stop.__name__ == caught.traceback[-1].name  # the traceback still says where it was
    assert 2 == len(plan.load().generate([1], max_new_tokens=2).tokens)


def count_tensors() -> int:
    import gc

    gc.collect()
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


def test_what_the_caller_was_handling_keeps_its_frames(folder: Path) -> None:
    def fails() -> None:
        precious = "kept"
        raise ValueError(precious)

    try:
        fails()
    except ValueError as outer:
        (folder / FILE).unlink()
        with pytest.raises(modelrig.errors.ModelrigError):
            modelrig.Plan.load(modelrig.plan("tiny"), progress=raising)
        assert {"precious": "kept"} == outer.__traceback__.tb_next.tb_frame.f_locals


def raising(done: int, total: int) -> None:
    raise LoadError("LD-META", "made up")


def test_a_wrong_tokenizer_is_found_before_weights_are_read(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    calls: list[int] = []
    with pytest.raises(TokenizerError):
        modelrig.load(folder, progress=lambda done, total: calls.append(done))
    assert [] == calls


# ------------------------------------------------------------------------------------------------ builders gone wrong


class Builder:
    """Builds what llama builds, then breaks it."""

    def __init__(self, harm: Callable[[torch.nn.Module], None]) -> None:
        self.harm = harm

    def build(self, facts: Any, context: Any) -> torch.nn.Module:
        from modelrig_plugins.architectures.decoder_module import DecoderBuilder

        module = DecoderBuilder.build(facts, context)
        self.harm(module)
        return module


def drop_norm(module: torch.nn.Module) -> None:
    del module.model.norm


def drop_weight(module: torch.nn.Module) -> None:
    module.model.norm.weight = None


def widen(module: torch.nn.Module) -> None:
    module.model.norm.weight = torch.nn.Parameter(torch.empty(49, device="meta"), requires_grad=False)


def add(module: torch.nn.Module) -> None:
    module.forgotten = torch.nn.Parameter(torch.empty(3, device="meta"), requires_grad=False)


@pytest.mark.parametrize(
    ("harm", "error", "code", "locus"),
    [
        (drop_norm, PluginError, "PL-CONTRACT", "model.norm.weight"),
        (drop_weight, PluginError, "PL-CONTRACT", "model.norm.weight"),
        (widen, PluginError, "PL-CONTRACT", "model.norm.weight"),
        (add, LoadError, "LD-META", "forgotten"),
    ],
)
def test_a_module_that_is_not_what_its_plan_says_is_refused(
    llama_folder: Path, monkeypatch: pytest.MonkeyPatch, harm: Any, error: type[Exception], code: str, locus: str
) -> None:
    plan = modelrig.plan(llama_folder)
    registered = plan.choices["architectures"].registered
    monkeypatch.setattr(type(registered), "implementation", _implementation(registered, Builder(harm)))
    with pytest.raises(error) as caught:
        plan.load()
    assert (code, locus) == (caught.value.code, caught.value.locus)
    assert ([], []) == held(llama_folder)


def test_a_tie_to_nothing_is_refused(llama_folder: Path) -> None:
    plan = modelrig.plan(llama_folder)
    plan = attrs.evolve(plan, facts=attrs.evolve(plan.facts, ties={"lm_head.weight": "model.nothing.weight"}))
    with pytest.raises(PluginError, match=r"without the parameter model\.nothing\.weight"):
        plan.load()


def test_a_parameter_nobody_stores_must_be_a_tie(llama_folder: Path) -> None:
    plan = modelrig.plan(llama_folder)
    rest = [one for one in plan.facts.parameters if one.name != "lm_head.weight"]
    alone = Parameter("lm_head.weight", (97, 48), "head", None)
    plan = attrs.evolve(plan, facts=attrs.evolve(plan.facts, parameters=(*rest, alone)))
    with pytest.raises(LoadError, match="LD-META") as caught:
        plan.load()
    assert ("lm_head.weight",) == caught.value.missing


def _implementation(registered: Any, replacement: Any) -> Callable[[Any], Any]:
    original = type(registered).implementation

    def implementation(self: Any) -> Any:
        return replacement if self.id == registered.id else original(self)

    return implementation


# ------------------------------------------------------------------------------------------------ many times


def test_a_hundred_models_leave_nothing_behind() -> None:
    folder = modelrig.plan("tiny").snapshot.root

    def cycle(dtype: str) -> None:
        with modelrig.load("tiny", dtype=dtype) as model:
            model.generate([5, 6, 7], max_new_tokens=2)

    for dtype in ("bfloat16", "float32"):
        cycle(dtype)
    files, maps, resident = len(os.listdir("/proc/self/fd")), len(mappings()), resident_bytes()
    for _ in range(50):
        cycle("bfloat16")
        cycle("float32")
    assert ([], []) == held(folder)
    assert (files, maps) == (len(os.listdir("/proc/self/fd")), len(mappings()))
    assert resident_bytes() - resident < 24 << 20  # one float32 tiny has 8 MB, a hundred leaked ones 600


def test_a_closed_model_lets_its_weights_go_while_the_object_lives(folder: Path) -> None:
    model = modelrig.load(folder)
    model.generate([1, 2], max_new_tokens=2)
    cache = model.new_cache()
    model.close()
    assert ([], []) == held(folder)
    assert json.dumps(model.plan.to_json()) and cache.length == 0
