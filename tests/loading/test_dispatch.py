"""Any module over devices and disk: the results that accelerate and memory give, by maps that mean what they say."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelrig
from distributions import run_python
from modelrig.errors import LoadError, PlanError, RequestError, ResourceLimitError
from modelrig.loading.dispatch import block_names
from models import HUGGING_FACE, Attention, build, inputs, result, skeleton, transformers_models
from residue import held
from streamed import NET_IDS, WIDTH, Block, Net, saved, streamed, streamer_of

BLOCKS = {
    "llama": ["LlamaDecoderLayer"], "llama, tied": ["LlamaDecoderLayer"], "bert": ["BertLayer"], "gpt2": ["GPT2Block"],
    "vit": ["ViTLayer"], "clip": ["CLIPEncoderLayer"], "mixtral": ["MixtralDecoderLayer"],
}  # fmt: skip


def kept(folder: Path, model: nn.Module) -> Path:
    """Saved by the names of its state dict, ties once, as safetensors does it."""
    from safetensors.torch import save_model

    save_model(model, str(folder / "model.safetensors"), metadata={"format": "pt"})  # accelerate insists
    return folder


# ------------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("blocks", [True, False], ids=["whole blocks", "divided"])
@pytest.mark.parametrize("device_map", ["cpu", "disk", "auto", "sequential"])
@pytest.mark.parametrize("name", ["parts", "attention", *HUGGING_FACE])
def test_results_are_those_of_the_saved_model(tmp_path: Path, name: str, device_map: str, blocks: bool) -> None:
    original, module = build(name), skeleton(name)
    kept(tmp_path, original)
    chosen = BLOCKS.get(name, []) if blocks else []
    found = modelrig.load_and_dispatch(module, tmp_path, device_map, chosen, strict=True)
    assert found is module and not module.training
    for _ in range(2):
        assert torch.equal(result(name, original), result(name, module))
    assert {"disk" if device_map == "disk" else "cpu"} == set(module.hf_device_map.values())


@pytest.mark.parametrize("way", ["paged", "on_network", "around"])
@pytest.mark.parametrize("name", ["attention", *HUGGING_FACE])
def test_results_are_accelerates(tmp_path: Path, request: pytest.FixtureRequest, name: str, way: str) -> None:
    if way != "paged":
        request.getfixturevalue(way)
    original = build(name)
    kept(tmp_path, original)
    blocks = BLOCKS.get(name, ["TransformerEncoderLayer"])
    ours = modelrig.load_and_dispatch(skeleton(name), tmp_path, "disk", blocks)
    with accelerate.init_empty_weights():
        theirs = Attention() if name == "attention" else transformers_models()[name]()
    if hasattr(theirs, "tie_weights"):
        theirs.tie_weights()
    theirs = accelerate.load_checkpoint_and_dispatch(theirs, str(tmp_path / "model.safetensors"), device_map={"": "cpu"}).eval()
    assert torch.equal(result(name, theirs), result(name, ours))


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float64])
@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_floats_are_cast(tmp_path: Path, dtype: Any, device_map: str) -> None:
    """The frequencies of the rotary embedding are in no file, and stay float32: only what is loaded is cast."""
    original = build("llama")
    original.save_pretrained(tmp_path)
    module = modelrig.load_and_dispatch(skeleton("llama"), tmp_path, device_map, dtype=dtype)
    theirs = type(original).from_pretrained(tmp_path, dtype=dtype).eval()
    assert torch.equal(result("llama", theirs), result("llama", module))


def test_experts_that_are_stored_one_by_one_are_streamed_as_a_stack(tmp_path: Path) -> None:
    from modelrig.checkpoint.mapping import Concat, Rename, Stack

    original = build("mixtral")
    original.save_pretrained(tmp_path)
    moe, mlp = "model.layers.{i}.block_sparse_moe", "model.layers.{i}.mlp"
    rules = [
        Rename(f"{moe}.gate.weight", f"{mlp}.gate.weight"),
        Stack(f"{moe}.experts.{{e}}.w1.weight", f"{mlp}.gate_stack", "e"),
        Stack(f"{moe}.experts.{{e}}.w3.weight", f"{mlp}.up_stack", "e"),
        Concat([f"{mlp}.gate_stack", f"{mlp}.up_stack"], f"{mlp}.experts.gate_up_proj", 1),
        Stack(f"{moe}.experts.{{e}}.w2.weight", f"{mlp}.experts.down_proj", "e"),
    ]
    module = modelrig.load_and_dispatch(skeleton("mixtral"), tmp_path, "disk", ["MixtralDecoderLayer"], mapping=rules)
    theirs = type(original).from_pretrained(tmp_path).eval()
    for _ in range(2):
        assert torch.equal(result("mixtral", theirs), result("mixtral", module))


@pytest.mark.parametrize("shards", [False, True])
@pytest.mark.parametrize("how", ["safetensors", "bin"])
def test_all_sorts_of_files_are_streamed(tmp_path: Path, how: str, shards: bool) -> None:
    original = build("gpt2")
    if how == "safetensors":
        original.save_pretrained(tmp_path, max_shard_size="30KB" if shards else "5GB")
    elif shards:
        accelerate.Accelerator(cpu=True).save_model(original, str(tmp_path), max_shard_size="30KB", safe_serialization=False)
    else:
        torch.save(original.state_dict(), tmp_path / "pytorch_model.bin")
    assert shards == any(tmp_path.glob("*.index.json"))
    module = modelrig.load_and_dispatch(skeleton("gpt2"), tmp_path, "disk", ["GPT2Block"])
    for _ in range(2):
        assert torch.equal(result("gpt2", original), result("gpt2", module))


def test_transposed_tensors_of_a_bin_file_are_streamed(tmp_path: Path) -> None:
    original = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6)).eval()
    tensors = original.state_dict()
    tensors["0.weight"] = tensors["0.weight"].T.contiguous().T
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with modelrig.empty_weights():
        module = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    modelrig.load_and_dispatch(module, tmp_path, "disk")
    with torch.no_grad():
        assert torch.equal(original(torch.eye(6)), module(torch.eye(6)))


# ------------------------------------------------------------------------------------------------ maps


class Many(nn.Module):
    """Twelve layers, so that one name begins like another, and bare parameters beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(12))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x * self.scale) / 2
        return x


@pytest.fixture
def many(tmp_path: Path) -> Many:
    torch.manual_seed(3)
    made = Many().eval()
    saved(tmp_path, made)
    return made


def on_disk(module: nn.Module) -> set[str]:
    return {state.unit.name for state in streamer_of(module)._states}


@torch.no_grad()
def test_a_name_covers_its_children_and_not_what_begins_alike(tmp_path: Path, many: Many) -> None:
    module = streamed(tmp_path, Many, device_map={"": "cpu", "layers.1": "disk"})
    assert {"layers.1"} == on_disk(module)
    module = streamed(tmp_path, Many, device_map={"layers": "disk", "layers.1": "cpu", "scale": "cpu"})
    assert {f"layers.{number}" for number in range(12)} - {"layers.1"} == on_disk(module)
    x = torch.randn(2, WIDTH)
    assert torch.equal(many(x), module(x))
    assert "cpu" == module.hf_device_map["layers.1"]
    assert "disk" == module.hf_device_map["layers.10"]


REFUSED: dict[str, tuple[Any, type[Exception], str]] = {
    "a layer is left out": ({"layers.0": "cpu", "scale": "cpu"}, PlanError, r"layers\.1"),
    "a bare parameter is left out": ({"layers": "cpu"}, PlanError, "scale"),
    "a name that is nowhere": ({"": "cpu", "layers.12": "disk"}, PlanError, r"layers\.12"),
    "a name that is nearly right": ({"": "cpu", "layer": "disk"}, PlanError, r"did you mean 'layers'"),
    "half of a block": ({"": "cpu", "layers.3.up": "disk"}, PlanError, r"layers\.3"),
    "a device that is not there": ({"": "cuda:7"}, PlanError, "cuda:7"),
    "a word that is no device": ("everywhere", RequestError, "everywhere"),
    "a number that is no device": ({"": -1}, RequestError, "-1"),
}


@pytest.mark.parametrize(("device_map", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_maps_that_do_not_fit_are_refused_before_anything_is_read(
    tmp_path: Path, many: Many, device_map: Any, error: type[Exception], text: str
) -> None:
    with modelrig.empty_weights():
        module = Many()
    with pytest.raises(error, match=text):
        modelrig.load_and_dispatch(module, tmp_path, device_map, ["Block"])
    assert all(parameter.is_meta for parameter in module.parameters())
    assert ([], []) == held(tmp_path)


def test_ties_stay_together(tmp_path: Path, net: Net) -> None:
    with pytest.raises(PlanError, match="weights that are one tensor stay together"):
        streamed(tmp_path, device_map={"": "cpu", "head": "disk"})


NOWHERE: list[Any] = [(["Blok"], "did you mean 'Block'"), (["Linear", "LlamaDecoderLayer"], "LlamaDecoderLayer"), ([""], "''")]


@pytest.mark.parametrize(("classes", "suggestion"), NOWHERE)
def test_a_class_that_is_nowhere_is_refused(tmp_path: Path, many: Many, classes: list[str], suggestion: str) -> None:
    with pytest.raises(RequestError, match=suggestion) as caught:
        streamed(tmp_path, Many, no_split_module_classes=classes)
    assert ("RQ-VALUE", "no_split_module_classes") == (caught.value.code, caught.value.locus)


@pytest.mark.parametrize("given", ["Block", Block, ["Block"], (Block,), {"Block"}])
def test_classes_may_be_named_or_given(tmp_path: Path, many: Many, given: Any) -> None:
    assert [f"layers.{number}" for number in range(12)] == block_names(many, given)


def test_by_default_the_module_says_what_stays_whole() -> None:
    assert [f"model.layers.{number}" for number in range(3)] == block_names(skeleton("llama"), ())


def test_blocks_inside_of_blocks_are_part_of_the_outer_one(many: Many) -> None:
    assert ["layers"] == block_names(many, ["ModuleList", "Block"])


def test_what_uses_the_weights_of_its_children_stays_whole(tmp_path: Path) -> None:
    assert {"encoder.layers.0", "encoder.layers.1", "attend"} == set(block_names(Attention(), ()))


def test_a_hundred_thousand_names_take_no_square(tmp_path: Path) -> None:
    """Calls of Python's functions grow with the names, not with names times blocks."""
    import sys

    def calls(count: int) -> int:
        module, found = nn.Module(), 0
        module.layers = nn.ModuleList(nn.Sequential(*[nn.Identity() for _ in range(8)]) for _ in range(count))

        def note(frame: Any, event: str, argument: Any) -> None:
            nonlocal found
            found += event in ("call", "c_call")

        sys.setprofile(note)
        try:
            assert count == len(block_names(module, ["Sequential"]))
        finally:
            sys.setprofile(None)
        return found

    assert calls(800) < 2.2 * calls(400)


# ------------------------------------------------------------------------------------------------ memory


@torch.no_grad()
def test_what_does_not_fit_in_memory_goes_to_the_disk(tmp_path: Path, many: Many) -> None:
    block = sum(tensor.numel() * 4 for tensor in many.layers[0].state_dict().values())
    module = streamed(tmp_path, Many, device_map="auto", max_memory={"cpu": 8 * block})
    devices = list(module.hf_device_map.values())
    assert {"cpu", "disk"} == set(devices)
    streamed_bytes = block * len([name for name in on_disk(module) if name.startswith("layers")])
    assert sum(one.nbytes for one in many.state_dict().values()) - streamed_bytes + 2 * block <= 8 * block
    x = torch.randn(2, WIDTH)
    for _ in range(2):
        assert torch.equal(many(x), module(x))


def test_what_fits_nowhere_is_refused(tmp_path: Path, many: Many) -> None:
    with pytest.raises(ResourceLimitError, match="RL-MEM"):
        streamed(tmp_path, Many, device_map="auto", max_memory={"cpu": 100, "disk": 100})


def test_memory_of_a_module_that_goes_to_the_disk_is_given_back(tmp_path: Path) -> None:
    """In a process of its own: what other tests left to the allocator comes and goes."""
    done = run_python("-c", GIVEN_BACK, str(tmp_path), path=[Path(__file__).parents[1], Path(modelrig.__file__).parents[1]])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 60 << 20


# 40 MiB each: above any threshold of malloc, which gives only such blocks back to the system at once.
GIVEN_BACK = """
import gc, sys
from safetensors.torch import save_file
from torch import nn
import modelrig
from residue import resident_bytes
module = nn.Sequential(*[nn.Linear(1024, 10 * 1024, bias=False) for _ in range(2)])
save_file(module.state_dict(), sys.argv[1] + "/model.safetensors")
modelrig.load_and_dispatch  # its imports come before the count
gc.collect()
before = resident_bytes("RssAnon")
modelrig.load_and_dispatch(module, sys.argv[1], "disk")
gc.collect()
print(before - resident_bytes("RssAnon"))
"""


@torch.no_grad()
def test_converted_weights_are_written_once_where_that_is_asked_for(tmp_path: Path, net: Net) -> None:
    folder, offload = tmp_path / "model", tmp_path / "offload"
    folder.mkdir()
    (tmp_path / "model.safetensors").rename(folder / "model.safetensors")
    expected = net.to(torch.bfloat16)(NET_IDS)
    for _ in range(2):
        module = streamed(folder, dtype="bfloat16", offload_folder=offload)
        assert torch.equal(expected, module(NET_IDS)) and torch.equal(expected, module(NET_IDS))
        assert 0 == streamer_of(module).slot_bytes
        written = {path: path.stat().st_mtime_ns for path in offload.rglob("*.safetensors")}
        assert 1 == len(written)
    module = streamed(folder, offload_folder=offload)
    assert written.keys() == set(offload.rglob("*.safetensors"))  # as it is stored: nothing to convert


# ------------------------------------------------------------------------------------------------ names, errors


@torch.no_grad()
def test_without_strict_what_is_stored_is_loaded(tmp_path: Path, many: Many) -> None:
    tensors = {name: tensor for name, tensor in many.state_dict().items() if name != "scale"} | {"extra": torch.zeros(1)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(LoadError) as caught:
        streamed(tmp_path, Many)
    assert (("scale",), ("extra",)) == (caught.value.missing, caught.value.unexpected)
    module = streamed(tmp_path, Many, strict=False)
    assert module.scale.is_meta
    assert torch.equal(many.layers[3](torch.eye(WIDTH)), module.layers[3](torch.eye(WIDTH)))


@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_buffers_that_are_computed_are_left_as_they_are(tmp_path: Path, device_map: str) -> None:
    original, module = build("parts"), skeleton("parts")
    modelrig.load_and_dispatch(module, kept(tmp_path, original), device_map)
    assert torch.equal(original.computed, module.computed)
    assert torch.equal(result("parts", original), result("parts", module))


@pytest.mark.parametrize("around", [torch.inference_mode, torch.no_grad, lambda: torch.device("meta")])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("device_map", ["cpu", "disk"])
def test_the_callers_modes_do_not_matter(tmp_path: Path, net: Net, device_map: str, dtype: str, around: Callable[[], Any]) -> None:
    with modelrig.empty_weights():
        module = Net()
    with around():
        modelrig.load_and_dispatch(module, tmp_path, device_map, ["Block"], dtype=dtype)
    net = net.to(getattr(torch, dtype))
    with torch.no_grad():
        assert torch.equal(net(NET_IDS), module(NET_IDS))
    with torch.inference_mode():
        assert torch.equal(net(NET_IDS), module(NET_IDS))


def test_requires_grad_stays(tmp_path: Path) -> None:
    original = build("parts")
    for device_map in ("cpu", "disk"):
        module = modelrig.load_and_dispatch(skeleton("parts"), kept(tmp_path, original), device_map)
        expected = {name: one.requires_grad for name, one in original.named_parameters()}
        assert expected == {name: one.requires_grad for name, one in module.named_parameters()}


def test_nothing_of_it_is_left_when_the_module_is_gone(tmp_path: Path, net: Net) -> None:
    before = set(threading.enumerate())
    module = streamed(tmp_path, device_map="cpu")
    assert before == set(threading.enumerate())  # nothing is streamed: no threads
    assert not any("_call_impl" in part.__dict__ for part in module.modules())
    del module
    assert ([], []) == held(tmp_path)


def test_what_a_forward_takes_and_gives_may_be_nested(tmp_path: Path) -> None:
    original = build("llama")
    module = modelrig.load_and_dispatch(skeleton("llama"), kept(tmp_path, original), "disk")
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        expected = original.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert torch.equal(expected, module.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0))
