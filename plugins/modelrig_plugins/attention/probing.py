"""What a child process is asked about a kernel: does it load, does it compute what `eager` computes, for these layers, here?"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from attrs import asdict

from modelrig.planning.needs import AttentionNeed
from modelrig.planning.probes import Probe

MODULE = "modelrig_plugins.attention.probe"


def attention_probe(name: str, need: AttentionNeed, options: Mapping[str, Any], packages: tuple[str, ...]) -> Probe:
    """The trial of the kernel `name`; its answer has `error` (text or None), `versions` and, of those that can say, `kernels`."""
    gpu = need.gpu
    return Probe(
        module=MODULE,
        arguments={
            "name": name,
            "options": dict(options),
            "device": gpu.device if gpu is not None else need.device,
            "dtype": need.dtype,
            "layers": [asdict(spec) for spec in need.layers],
        },
        packages=packages,
        machine=(gpu.name if gpu is not None else need.device, need.driver or ""),
    )
