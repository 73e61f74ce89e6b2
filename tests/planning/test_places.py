from __future__ import annotations

import pytest

from modelrig.errors import PlanError
from modelrig.planning.environment import Environment
from modelrig.planning.places import place
from modelrig.planning.request import Request
from rigs import gpu, machine


def devices(environment: Environment, device_map: str = "auto") -> list[str]:
    return [one.device for one in place(Request(device_map=device_map), environment)]


def test_auto_tries_the_first_gpu_and_then_the_cpu() -> None:
    assert ["cuda:0", "cpu"] == devices(machine(1, gpu(0), gpu(1)))
    assert ["cpu"] == devices(machine())


def test_a_gpu_that_this_torch_cannot_use_is_not_tried_and_the_reason_says_so() -> None:
    environment = machine(1, gpu(), torch="2.13.0+cpu", torch_cuda=False)
    (only,) = place(Request(), environment)
    assert "cpu" == only.device
    assert "2.13.0+cpu is built without GPU support" in only.why


def test_a_device_that_is_asked_for_is_the_only_one_tried() -> None:
    environment = machine(1, gpu(0), gpu(1))
    assert [["cpu"], ["cuda:0"], ["cuda:1"]] == [devices(environment, one) for one in ("cpu", "cuda", "cuda:1")]


@pytest.mark.parametrize(
    ("environment", "part"),
    [
        (machine(), "no GPU is visible"),
        (machine(hidden_gpus=2), "2 hidden by CUDA_VISIBLE_DEVICES"),
        (machine(1, gpu(), torch_cuda=False), "without GPU support"),
        (machine(1, gpu()), "there is cuda:0 (H200)"),
    ],
)
def test_a_device_that_is_not_there_is_an_error_that_says_what_is(environment: Environment, part: str) -> None:
    with pytest.raises(PlanError) as caught:
        devices(environment, "cuda:5")
    assert ("PN-DEVICE", True) == (caught.value.code, part in str(caught.value))
