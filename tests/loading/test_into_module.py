"""Checkpoints into any module: what `load_state_dict` would give, and nothing changed where that is refused."""

from __future__ import annotations

import gc
import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import modelrig
from checkpoints import write_llama
from fillers import peak_bytes
from modelrig.checkpoint.mapping import Concat, Drop, PermuteRope, Rename, Split, Stack, Transpose
from modelrig.errors import CheckpointError, FormatError, IndexFileError, LoadError, ModelrigError, RequestError
from models import HUGGING_FACE, Attention, Parts, build, inputs, result, skeleton
from residue import held, mappings
from streamed import raising

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
MIXTRAL = [
    Rename("model.layers.{i}.block_sparse_moe.gate.weight", "model.layers.{i}.mlp.gate.weight"),
    Concat(
        [f"model.layers.{{i}}.block_sparse_moe.experts.{{e}}.{name}.weight" for name in ("w1", "w3")],
        "model.layers.{i}.mlp.experts.{e}.gate_up_proj",
    ),
    Stack("model.layers.{i}.mlp.experts.{e}.gate_up_proj", "model.layers.{i}.mlp.experts.gate_up_proj", "e"),
    Stack("model.layers.{i}.block_sparse_moe.experts.{e}.w2.weight", "model.layers.{i}.mlp.experts.down_proj", "e"),
]


VIT = [
    *[
        Rename(f"vit.encoder.layer.{{i}}.attention.attention.{name}.{{p}}", f"vit.layers.{{i}}.attention.{name[0]}_proj.{{p}}")
        for name in ("query", "key", "value")
    ],
    Rename("vit.encoder.layer.{i}.attention.output.dense.{p}", "vit.layers.{i}.attention.o_proj.{p}"),
    Rename("vit.encoder.layer.{i}.intermediate.dense.{p}", "vit.layers.{i}.mlp.fc1.{p}"),
    Rename("vit.encoder.layer.{i}.output.dense.{p}", "vit.layers.{i}.mlp.fc2.{p}"),
    Rename("vit.encoder.layer.{i}.{*rest}", "vit.layers.{i}.{*rest}"),
]
MAPPINGS = {"mixtral": MIXTRAL, "vit": VIT}


def unique(module: nn.Module) -> dict[str, torch.Tensor]:
    """Each tensor of the state dict by the first of its names."""
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        found.setdefault(id(tensor), (name, tensor.detach().clone()))
    return dict(found.values())


def write(folder: Path, tensors: dict[str, torch.Tensor], how: str = "safetensors", shards: int = 1) -> Path:
    """A checkpoint in Hugging Face's names."""
    folder.mkdir(exist_ok=True)
    base, suffix, save = {
        "safetensors": ("model", ".safetensors", save_file),
        "bin": ("pytorch_model", ".bin", torch.save),
    }[how]
    if shards == 1:
        save(tensors, folder / f"{base}{suffix}")
        return folder
    weight_map = {}
    for number in range(shards):
        name = f"{base}-{number + 1:05}-of-{shards:05}{suffix}"
        part = {key: tensor for place, (key, tensor) in enumerate(tensors.items()) if place % shards == number}
        save(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / f"{base}{suffix}.index.json").write_text(index)
    return folder


def same_state(expected: nn.Module, actual: nn.Module) -> bool:
    one, other = expected.state_dict(), actual.state_dict()
    return list(one) == list(other) and all(
        one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one
    )


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("how", ["safetensors", "bin"])
@pytest.mark.parametrize("name", ["parts", "attention", *HUGGING_FACE])
def test_an_empty_module_becomes_the_saved_one(tmp_path: Path, name: str, how: str, shards: int) -> None:
    original, module = build(name), skeleton(name)
    keys = modelrig.load_checkpoint(module, write(tmp_path, unique(original), how, shards))
    assert ([], []) == keys
    assert same_state(original, module)
    assert torch.equal(result(name, original), result(name, module.eval()))
    wanted = [(key, one.requires_grad) for key, one in original.named_parameters(remove_duplicate=False)]
    assert wanted == [(key, one.requires_grad) for key, one in module.named_parameters(remove_duplicate=False)]
    assert [key for key, _ in original.named_parameters()] == [key for key, _ in module.named_parameters()]  # ties are ties


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_what_transformers_saves_is_loaded(tmp_path: Path, name: str, dtype: str | None) -> None:
    """Of some models under older names: experts one by one, which become a stack."""
    original, module = build(name), skeleton(name)
    original.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / INDEX).exists()
    assert ([], []) == modelrig.load_checkpoint(module, tmp_path, mapping=MAPPINGS.get(name, ()), dtype=dtype)
    theirs = type(original).from_pretrained(tmp_path, dtype=dtype or torch.float32).eval()
    assert same_state(theirs, module)
    if dtype is None:
        assert torch.equal(result(name, theirs), result(name, module.eval()))


def test_what_is_loaded_can_be_trained(tmp_path: Path) -> None:
    original, module = build("parts"), skeleton("parts")
    with torch.inference_mode():
        modelrig.load_checkpoint(module, write(tmp_path, unique(original)))
    assert not any(tensor.is_inference() for tensor in (*module.parameters(), *module.buffers()))
    losses = []
    for one in (original, module.eval()):
        one(**inputs("parts")).square().mean().backward()
        losses.append([parameter.grad for parameter in one.parameters() if parameter.requires_grad and parameter.numel()])
    assert all(torch.equal(left, right) for left, right in zip(*losses, strict=True))
    assert module.frozen.grad is None


@pytest.mark.parametrize("around", [lambda: torch.device("meta"), torch.no_grad, torch.inference_mode])
def test_the_callers_modes_do_not_matter(tmp_path: Path, around: Callable[[], Any]) -> None:
    original, module = build("parts"), skeleton("parts")
    folder = write(tmp_path, unique(original))
    with around():
        modelrig.load_checkpoint(module, folder, dtype="float64")
    assert same_state(original.double(), module)


@pytest.mark.parametrize("name", ["parts", "attention", "llama, tied"])
def test_modules_with_memory_are_filled_in_place(tmp_path: Path, name: str) -> None:
    original = build(name)
    folder = write(tmp_path, unique(original))
    module = build(name)
    with torch.no_grad():
        for tensor in unique_tensors(module):
            tensor.zero_()
    objects = {key: (id(one), one.data_ptr()) for key, one in named(module)}
    modelrig.load_checkpoint(module, folder)
    assert objects == {key: (id(one), one.data_ptr()) for key, one in named(module)}
    assert same_state(original, module)
    assert [] == mappings(tmp_path)


def named(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]


def unique_tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def test_a_module_made_in_inference_mode_is_filled_too(tmp_path: Path) -> None:
    original = build("parts")
    with torch.inference_mode():
        module = Parts()
    modelrig.load_checkpoint(module, write(tmp_path, unique(original)))
    assert same_state(original, module)


def test_some_tensors_may_have_memory_and_others_not(tmp_path: Path) -> None:
    original, module = build("parts"), skeleton("parts")
    module.conv = nn.Conv1d(2, 2, 3, padding=1)
    kept = module.conv.weight
    modelrig.load_checkpoint(module, write(tmp_path, unique(original)))
    assert kept is module.conv.weight
    assert same_state(original, module)


def test_other_layouts_of_memory_are_filled_where_they_are(tmp_path: Path) -> None:
    module, weight = nn.Conv2d(3, 4, 2), torch.randn(4, 3, 2, 2)
    module.to(memory_format=torch.channels_last)
    stride = module.weight.stride()
    modelrig.load_checkpoint(module, write(tmp_path, {"weight": weight, "bias": torch.zeros(4)}))
    assert stride == module.weight.stride()
    assert torch.equal(weight, module.weight)


@pytest.mark.parametrize("memory", [True, False], ids=["with memory", "empty"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64", torch.float16])
def test_floats_become_the_dtype_that_is_asked_for_and_others_stay(tmp_path: Path, dtype: Any, memory: bool) -> None:
    original = build("parts")
    module = build("parts") if memory else skeleton("parts")
    modelrig.load_checkpoint(module, write(tmp_path, unique(original)), dtype=dtype)
    expected = original.to(dtype if isinstance(dtype, torch.dtype) else getattr(torch, dtype))
    assert same_state(expected, module)
    assert (torch.int64, torch.bool, torch.int64) == (module.counts.dtype, module.mask.dtype, module.norm.num_batches_tracked.dtype)


def test_by_default_the_module_says_the_dtype(tmp_path: Path) -> None:
    original, module = build("parts"), skeleton("parts").to(torch.bfloat16)
    modelrig.load_checkpoint(module, write(tmp_path, unique(original)))
    assert same_state(original.to(torch.bfloat16), module)


def test_tensors_stored_as_they_are_used_are_views_of_the_file(tmp_path: Path) -> None:
    module = skeleton("attention")
    modelrig.load_checkpoint(module, write(tmp_path, unique(build("attention"))))
    ((first, last, _),) = mappings(tmp_path)
    assert all(first <= one.data_ptr() and one.data_ptr() + one.nbytes <= last for one in module.parameters())
    before = (tmp_path / FILE).read_bytes()
    with torch.no_grad():
        module.attend.out_proj.weight.zero_()
    assert before == (tmp_path / FILE).read_bytes()


class Marked(nn.Parameter):
    pass


def test_subclasses_and_attributes_of_parameters_stay(tmp_path: Path) -> None:
    with modelrig.empty_weights():
        module = nn.Linear(2, 2, bias=False)
        module.weight = Marked(torch.zeros(2, 2), requires_grad=False)
        module.weight.shard = 3
    modelrig.load_checkpoint(module, write(tmp_path, {"weight": torch.ones(2, 2)}))
    assert (Marked, 3, False, 4.0) == (
        type(module.weight),
        module.weight.shard,
        module.weight.requires_grad,
        module.weight.sum().item(),
    )


# ------------------------------------------------------------------------------------------------ names

CHANGES: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "nothing": lambda tensors: None,
    "missing": lambda tensors: (tensors.pop("bare"), tensors.pop("norm.running_mean"), tensors.pop("list.1")),
    "unexpected": lambda tensors: tensors.update({"extra": torch.zeros(1), "conv.more": torch.zeros(2), "x.y.z": torch.zeros(())}),
    "both": lambda tensors: tensors.update(renamed=tensors.pop("bare")),
    "not persistent": lambda tensors: tensors.update(computed=torch.zeros(5)),
    "a counter": lambda tensors: tensors.pop("norm.num_batches_tracked"),
    "a tie": lambda tensors: (tensors.pop("shared.weight"), tensors.update({"tied.weight": torch.ones(5, 5)})),
}


@pytest.mark.parametrize("memory", [True, False], ids=["with memory", "empty"])
@pytest.mark.parametrize("change", CHANGES)
def test_names_are_missing_and_unexpected_as_torch_says(tmp_path: Path, change: str, memory: bool) -> None:
    tensors = unique(build("parts"))
    CHANGES[change](tensors)
    write(tmp_path, tensors)
    aliases = {"again.weight": "shared.weight", "again.bias": "shared.bias", "tied.weight": "shared.weight"}
    whole = dict(tensors)  # torch wants every name of a tie
    for alias, name in aliases.items():
        found = whole.get(name, whole.get("tied.weight")) if "weight" in alias else whole.get(name)
        whole |= {key: found for key in (alias, name) if found is not None}
    theirs, ours = build("parts"), build("parts") if memory else skeleton("parts")
    expected = theirs.load_state_dict(whole, strict=False)
    keys = modelrig.load_checkpoint(ours, tmp_path, strict=False)
    assert sorted(expected.missing_keys) == sorted(keys.missing_keys)
    assert sorted(expected.unexpected_keys) == sorted(keys.unexpected_keys)
    assert (keys.missing_keys, keys.unexpected_keys) == tuple(keys)
    if memory:
        assert same_state(theirs, ours)
    if keys.missing_keys or keys.unexpected_keys:
        before = {key: one.clone() for key, one in ours.state_dict().items() if not one.is_meta}
        with pytest.raises(LoadError) as caught:
            modelrig.load_checkpoint(ours, tmp_path)
        assert ("LD-TENSORS", str(tmp_path)) == (caught.value.code, caught.value.path)
        assert (sorted(keys.missing_keys), sorted(keys.unexpected_keys)) == (
            sorted(caught.value.missing),
            sorted(caught.value.unexpected),
        )
        assert all(name in str(caught.value) for name in (*keys.missing_keys, *keys.unexpected_keys))
        assert all(torch.equal(one, ours.state_dict()[key]) for key, one in before.items())


@pytest.mark.parametrize("strict", [True, False])
def test_shapes_must_fit_in_any_case(tmp_path: Path, strict: bool) -> None:
    tensors = unique(build("parts"))
    tensors |= {"bare": torch.zeros(4), "scalar": torch.zeros(1), "conv.bias": torch.zeros(2, 1)}
    module = build("parts")
    before = module.state_dict()["frozen"].clone()
    with pytest.raises(LoadError) as caught:
        modelrig.load_checkpoint(module, write(tmp_path, tensors), strict=strict)
    assert "LD-TENSORS" == caught.value.code
    assert ["bare", "scalar", "conv.bias"] == [line.partition(":")[0] for line in caught.value.misshapen]
    assert "bare: stored as [4], the module has [5]" in str(caught.value)
    assert torch.equal(before, module.frozen)


def test_thousands_of_missing_names_are_all_there_and_few_are_shown(tmp_path: Path) -> None:
    module = nn.Module()
    for number in range(3_000):
        module.register_parameter(f"w{number}", nn.Parameter(torch.zeros(1)))
    with pytest.raises(LoadError) as caught:
        modelrig.load_checkpoint(module, write(tmp_path, {"other": torch.zeros(1)}))
    assert 3_000 == len(caught.value.missing)
    assert len(str(caught.value)) < 2_000


def test_a_tie_that_is_stored_twice_must_be_equal(tmp_path: Path) -> None:
    original = build("llama, tied")
    tensors = unique(original)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    module = skeleton("llama, tied")
    modelrig.load_checkpoint(module, write(tmp_path / "equal", tensors))
    assert same_state(original, module)
    assert module.lm_head.weight is module.model.embed_tokens.weight
    for change in (lambda weight: weight[60, 31].add_(1), lambda weight: weight.fill_(float("nan"))):
        change(tensors["lm_head.weight"])
        for strict in (True, False):
            with pytest.raises(LoadError, match="another one in the checkpoint") as caught:
                modelrig.load_checkpoint(skeleton("llama, tied"), write(tmp_path / "unequal", tensors), strict=strict)
            assert ("LD-TIE", "lm_head.weight") == (caught.value.code, caught.value.locus)


@pytest.mark.parametrize("are_equal", [True, False])
def test_a_tie_of_which_two_cuts_of_one_tensor_are_stored_must_be_equal(tmp_path: Path, are_equal: bool) -> None:
    half = torch.randn(3, 5)
    write(tmp_path, {"both": torch.cat([half, half if are_equal else half + 1])})
    module = nn.Module()
    module.one = module.other = nn.Parameter(torch.empty(3, 5, device="meta"))
    rules = [Split("both", ["one", "other"])]
    if are_equal:
        modelrig.load_checkpoint(module, tmp_path, mapping=rules)
        assert torch.equal(half, module.one) and module.one is module.other
    else:
        with pytest.raises(LoadError, match="LD-TIE"):
            modelrig.load_checkpoint(module, tmp_path, mapping=rules)


def test_a_tie_that_is_one_tensor_of_a_bin_file_is_read_once(tmp_path: Path) -> None:
    original = build("llama, tied")
    torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")  # under both names
    module = skeleton("llama, tied")
    assert ([], []) == modelrig.load_checkpoint(module, tmp_path)
    assert same_state(original, module)


def test_a_tie_of_the_checkpoint_fills_two_tensors_of_a_module_that_has_none(tmp_path: Path) -> None:
    torch.save(build("llama, tied").state_dict(), tmp_path / "pytorch_model.bin")
    module = skeleton("llama")
    assert ([], []) == modelrig.load_checkpoint(module, tmp_path)
    assert module.lm_head.weight is not module.model.embed_tokens.weight
    with torch.no_grad():
        module.lm_head.weight.zero_()
    assert module.model.embed_tokens.weight.abs().sum() > 0  # a write to one is no write to the other


class Scaled(nn.Module):
    """With a state of its own, of a shape that is not known before."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.history = torch.zeros(0)

    def get_extra_state(self) -> torch.Tensor:
        return self.history

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.history = state.clone()


@pytest.mark.parametrize("empty", [True, False])
def test_extra_states_are_set_by_their_modules(tmp_path: Path, empty: bool) -> None:
    original = nn.Sequential(Scaled(), nn.ReLU(), Scaled())
    original[0].history, original[2].history = torch.tensor([1.0, 2.0]), torch.tensor([3], dtype=torch.int32)
    write(tmp_path, original.state_dict())
    with modelrig.empty_weights() if empty else torch.no_grad():
        module = nn.Sequential(Scaled(), nn.ReLU(), Scaled())
    assert ([], []) == modelrig.load_checkpoint(module, tmp_path)
    assert same_state(original, module)
    save_file({key: one for key, one in original.state_dict().items() if key != "0._extra_state"}, tmp_path / FILE)
    assert (["0._extra_state"], []) == modelrig.load_checkpoint(module, tmp_path, strict=False)


def test_a_module_that_has_not_seen_its_input_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoadError, match=r"weight: stored as \[2, 3\], the module has yet to see its first input"):
        modelrig.load_checkpoint(nn.LazyLinear(2, bias=False), write(tmp_path, {"weight": torch.zeros(2, 3)}))


def test_what_stays_without_data_is_an_error_unless_asked_for(tmp_path: Path) -> None:
    write(tmp_path, unique(build("parts")))
    with modelrig.empty_weights(include_buffers=True):
        module = Parts()
    with pytest.raises(LoadError, match="computed") as caught:
        modelrig.load_checkpoint(module, tmp_path)
    assert ("LD-META", ("computed",)) == (caught.value.code, caught.value.missing)
    assert ([], []) == modelrig.load_checkpoint(module, tmp_path, strict=False)
    assert module.computed.is_meta and not module.bare.is_meta


# ------------------------------------------------------------------------------------------------ mapping


def test_rules_rename_cut_and_put_together(tmp_path: Path) -> None:
    module = nn.ModuleDict({"fused": nn.Linear(6, 12, bias=False), "left": nn.Linear(4, 3), "right": nn.Linear(4, 2, bias=False)})
    q, k, both, bias = torch.randn(8, 6), torch.randn(4, 6), torch.randn(4, 5), torch.randn(3)
    stored = {"h.q": q, "h.k": k, "h.both": both, "h.bias": bias, "h.inv_freq": torch.zeros(3)}
    rules = [
        Rename("h.{*rest}", "{*rest}"),
        PermuteRope("q", "q", 2),
        Concat(["q", "k"], "fused.weight"),
        Transpose("both", "both"),
        Rename("bias", "left.bias"),
        Drop("inv_freq", "computed"),
    ]
    with pytest.raises(LoadError, match="cannot be cut after it was permuted") as caught:
        modelrig.load_checkpoint(module, write(tmp_path, stored), mapping=[*rules, Split("both", ["l", "r"], (3, 2))])
    assert "LD-MAPPING" == caught.value.code
    rules[3:4] = [
        Split("both", ["l", "r"], (3, 2), 1), Transpose("l", "left.weight"), Transpose("r", "right.weight"),
    ]  # fmt: skip
    assert ([], []) == modelrig.load_checkpoint(module, tmp_path, mapping=rules)
    permuted = q.view(2, 2, 2, 6).transpose(1, 2).reshape(8, 6)
    assert torch.equal(torch.cat([permuted, k]), module["fused"].weight)
    assert torch.equal(both[:, :3].T, module["left"].weight) and torch.equal(both[:, 3:].T, module["right"].weight)


def test_a_mapping_that_makes_other_names_is_reported_by_them(tmp_path: Path) -> None:
    write(tmp_path, {"a": torch.zeros(2, 2), "b": torch.zeros(2)})
    with pytest.raises(LoadError) as caught:
        modelrig.load_checkpoint(nn.Linear(2, 2), tmp_path, mapping=[Rename("a", "weight"), Rename("b", "bais")])
    assert (("bias",), ("bais",)) == (caught.value.missing, caught.value.unexpected)


# ------------------------------------------------------------------------------------------------ files


def test_of_two_formats_safetensors_is_read_unless_the_other_is_preferred(tmp_path: Path) -> None:
    write(tmp_path, {"weight": torch.zeros(1, 1)})
    write(tmp_path, {"weight": torch.ones(1, 1)}, "bin")
    module = nn.Linear(1, 1, bias=False)
    modelrig.load_checkpoint(module, tmp_path)
    assert 0.0 == module.weight.item()
    modelrig.load_checkpoint(module, tmp_path, True, False)
    assert 1.0 == module.weight.item()
    (tmp_path / "pytorch_model.bin").unlink()
    modelrig.load_checkpoint(module, tmp_path, prefer_safe=False)  # a preference, no demand
    assert 0.0 == module.weight.item()


def test_variants_are_sets_of_files_of_their_own(tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(1, 1)}, tmp_path / FILE)
    save_file({"weight": torch.ones(1, 1, dtype=torch.float16)}, tmp_path / "model.fp16.safetensors")
    module = nn.Linear(1, 1, bias=False)
    modelrig.load_checkpoint(module, str(tmp_path), variant="fp16")
    assert (1.0, torch.float32) == (module.weight.item(), module.weight.dtype)
    with pytest.raises(ModelrigError, match="fp8"):
        modelrig.load_checkpoint(module, tmp_path, variant="fp8")


def remove_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def cut_shard(folder: Path) -> None:
    file = folder / "model-00003-of-00003.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def put_pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"
    (folder / "model-00001-of-00003.safetensors").write_text(text)


def edit_index(change: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        change(index["weight_map"])
        (folder / INDEX).write_text(json.dumps(index))

    return edit


def two_homes(folder: Path) -> None:
    one, other = folder / "model-00001-of-00003.safetensors", folder / "model-00002-of-00003.safetensors"
    first = load_file(one)
    save_file(load_file(other) | {key: first[key].clone() for key in first}, other)


BROKEN: dict[str, Callable[[Path], None]] = {
    "a shard is missing": remove_shard,
    "the last shard is cut by a byte": cut_shard,
    "a pointer in place of a shard": put_pointer,
    "the index names a tensor that is nowhere": edit_index(lambda table: table.update(extra="model-00001-of-00003.safetensors")),
    "the index leads out of the folder": edit_index(lambda table: table.update(bare="../model-00001-of-00003.safetensors")),
    "a tensor is in two shards": two_homes,
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN)
def test_broken_checkpoints_are_refused_before_anything_is_changed(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write(tmp_path, unique(build("parts")), shards=3)
    damage(tmp_path)
    module = Parts()
    before = {key: one.clone() for key, one in module.state_dict().items()}
    for strict in (True, False):
        with pytest.raises(CheckpointError) as caught:
            modelrig.load_checkpoint(module, tmp_path, strict=strict)
        assert isinstance(caught.value, FormatError | IndexFileError | CheckpointError)
        assert str(tmp_path) in str(caught.value.path)
    assert all(torch.equal(one, module.state_dict()[key]) for key, one in before.items())
    assert ([], []) == held(tmp_path)


def test_what_the_index_does_not_name_is_not_there(tmp_path: Path) -> None:
    write(tmp_path, unique(build("parts")), shards=3)
    edit_index(lambda table: table.pop("bare"))(tmp_path)
    module = skeleton("parts")
    assert (["bare"], []) == modelrig.load_checkpoint(module, tmp_path, strict=False)
    assert module.bare.is_meta


@pytest.mark.parametrize("folder", ["nowhere", ""])
def test_a_folder_that_is_none_is_an_error_of_ours(tmp_path: Path, folder: str) -> None:
    with pytest.raises(ModelrigError):
        modelrig.load_checkpoint(nn.Linear(1, 1), tmp_path / folder)  # the second is there, and empty


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", "floaty", torch.int64, 16])
def test_only_floating_dtypes_can_be_asked_for(tmp_path: Path, dtype: Any) -> None:
    write(tmp_path, {"weight": torch.zeros(1, 1)})
    with pytest.raises(RequestError) as caught:
        modelrig.load_checkpoint(nn.Linear(1, 1, bias=False), tmp_path, dtype=dtype)
    assert ("RQ-VALUE", "dtype") == (caught.value.code, caught.value.locus)


def test_a_stored_integer_is_no_weight(tmp_path: Path) -> None:
    write(tmp_path, {"weight": torch.zeros(1, 1, dtype=torch.int32)})
    with pytest.raises(LoadError) as caught:
        modelrig.load_checkpoint(nn.Linear(1, 1, bias=False), tmp_path)
    assert ("LD-DTYPE", "weight", str(tmp_path / FILE)) == (caught.value.code, caught.value.locus, caught.value.path)


def test_headers_that_end_anywhere_are_read(tmp_path: Path) -> None:
    """Older writers did not pad them, so no tensor lies where its dtype wants it."""
    original, module = build("parts"), skeleton("parts")
    write(tmp_path, unique(original))
    raw = (tmp_path / FILE).read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = raw[8 : 8 + length].rstrip() + b" " * 3
    header += b" " * (1 - len(header) % 2)
    (tmp_path / FILE).write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + length :])
    modelrig.load_checkpoint(module, tmp_path)
    assert same_state(original, module)


# ------------------------------------------------------------------------------------------------ what it takes


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
def test_an_interruption_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    write_llama(tmp_path)
    module = skeleton("llama")
    with modelrig.empty_weights():
        from transformers import AutoConfig, LlamaForCausalLM

        module = LlamaForCausalLM(AutoConfig.from_pretrained(tmp_path))
    for dtype in (None, "float64"):
        with pytest.raises(error) as caught:
            modelrig.load_checkpoint(module, tmp_path, dtype=dtype, progress=raising(error))
        assert ([], []) == held(tmp_path)  # although `caught` still holds the traceback
        assert [] == [thread for thread in threading.enumerate() if "modelrig-read" in thread.name]
        assert "fails" == caught.traceback[-1].name
    assert all(parameter.is_meta for parameter in module.parameters())
    modelrig.load_checkpoint(module, tmp_path)


def test_progress_is_in_bytes(tmp_path: Path) -> None:
    write(tmp_path, unique(build("parts")), shards=2)
    total = sum(tensor.nbytes for tensor in unique(build("parts")).values())
    for dtype in (None, "float64"):
        calls: list[tuple[int, int]] = []
        modelrig.load_checkpoint(skeleton("parts"), tmp_path, dtype=dtype, progress=lambda *done, calls=calls: calls.append(done))
        assert (total, total) == calls[-1]
        assert calls == sorted(calls)


@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_it_takes_the_module_and_little_more(tmp_path: Path, how: str) -> None:
    """From float32 to bfloat16, shard by shard; and in place, next to nothing."""
    tensors = {f"{number}.weight": torch.full((1024, 1024), float(number)) for number in range(24)}  # 96 MiB
    write(tmp_path, tensors, how, 3)
    tensors.clear()
    gc.collect()

    def make() -> nn.Module:
        return nn.Sequential(*[nn.Linear(1024, 1024, bias=False) for _ in range(24)])

    with modelrig.empty_weights():
        module, other = make(), make()
    modelrig.load_checkpoint(other, tmp_path, dtype="bfloat16")
    del other
    assert peak_bytes(lambda: modelrig.load_checkpoint(module, tmp_path, dtype="bfloat16")) < (48 + 14) << 20
    assert list(range(24)) == [int(layer.weight[-1, -1]) for layer in module]
    full = make()
    modelrig.load_checkpoint(full, tmp_path)
    assert peak_bytes(lambda: modelrig.load_checkpoint(full, tmp_path)) < 14 << 20


def test_attention_of_torch_has_a_fast_path_that_agrees(tmp_path: Path) -> None:
    """It uses the weights of modules that it does not call."""
    original = build("attention")
    with modelrig.empty_weights():
        module = Attention()
    modelrig.load_checkpoint(module, write(tmp_path, unique(original)))
    x = inputs("attention")["x"]
    module.eval()
    with torch.inference_mode():
        fast = module.encoder(x)
    slow = module.encoder(x.requires_grad_())
    assert torch.allclose(slow, fast, atol=1e-5)
