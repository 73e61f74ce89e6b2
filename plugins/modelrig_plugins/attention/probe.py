"""Run in a child process: tries a kernel on each distinct layer of a model and compares it with `eager` (see `probing`)."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import Any

from modelrig.components import AttentionSpec
from modelrig.planning import probes
from modelrig.planning.options import structure
from modelrig.registry import current

COUNT, PAST = 24, 40  # tokens of a prompt, and before a step
#: largest error, as a part of the largest value
BOUNDS = {"float32": 1e-4, "float64": 1e-4, "bfloat16": 4e-2, "float16": 8e-3}


def kernel_of(name: str, options: dict[str, Any]) -> Any:
    """The kernel called `name`. Only what is tried is imported."""
    component = current().find("attention", name)
    return component.implementation()(structure(component.planner(), options))


def trial(name: str, options: dict[str, Any], device: str, dtype: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """What the kernel does with prompts and steps, padded and not, of each layer: `kernels` it says it used, `error` or None."""
    import torch

    from modelrig.modules.slots import Visibility
    from modelrig_plugins.attention.eager import EagerAttention

    kernel, eager = kernel_of(name, options), EagerAttention()
    used: dict[str, str] = {}
    for fields in layers:
        spec = AttentionSpec(**fields)
        for what, past, count, starts in (
            ("a prompt", 0, COUNT, None),
            ("a padded prompt", 0, COUNT, [0, 5]),
            ("a step", PAST, 1, None),
            ("a padded step", PAST, 1, [0, 5]),
        ):
            if past and not spec.causal:
                continue
            generator = torch.Generator().manual_seed(1)
            shapes = (
                (2, spec.num_heads, count, spec.head_dim),
                (2, spec.num_key_value_heads, past + count, spec.head_dim),
                (2, spec.num_key_value_heads, past + count, spec.value_dim),
            )
            q, k, v = (torch.randn(shape, generator=generator).to(device, getattr(torch, dtype)) for shape in shapes)
            index = torch.arange(past + count, device=device)
            start = None if starts is None else torch.tensor(starts, device=device)
            visible = Visibility(index[past:], index, start, spec.window, spec.causal, past)
            lowered = kernel.prepare(spec, visible)
            actual = kernel.attend(q, k, v, lowered, spec)
            expected = eager.attend(q, k, v, eager.prepare(spec, visible), spec)
            if start is not None and past == 0:  # what rows of padding give is nobody's business
                actual, expected = actual[:, max(starts or [0]) :], expected[:, max(starts or [0]) :]
            error = (actual.double() - expected.double()).abs().max().item() / v.double().abs().max().item()
            if not error <= BOUNDS[dtype]:
                return {"error": f"{what} differs from eager by {error:.1e} of the largest value", "kernels": used}
            if (taken := getattr(kernel, "taken", None)) is not None:  # it can say which of several computed this
                used[what] = taken[spec, lowered.mask is None, lowered.is_causal]
    return {"error": None, "kernels": used}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def main() -> None:
    given = probes.arguments()
    try:
        found = trial(**given)
    except Exception as error:  # the answer is that it does not work, and why
        found = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
    found["versions"] = {package: _version(package) for package in ("torch", "flash-attn")}
    probes.answer(found)


if __name__ == "__main__":
    main()
