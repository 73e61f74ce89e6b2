"""How fast a loaded model reads prompts and decodes, and how fast this machine reads memory, which bounds decoding.

torch is imported by the functions, not by this module.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from attrs import asdict, frozen

from modelrig.planning.bound import StepBytes, step_bytes
from modelrig.planning.environment import Environment

if TYPE_CHECKING:
    from torch import Tensor

    from modelrig.model import Model
    from modelrig.planning.plan import RigPlan

SECONDS = 60.0  # after which a setting is not measured again, whatever repeats were asked for
WARM_TOKENS = 24  # decoded before anything is measured: kernels settle, compilers compile
BUFFER_BYTES = 512 << 20  # read to measure the bandwidth; more where caches are large
MOST_BUFFER_BYTES = 1 << 30
USUAL_PROMPT, USUAL_NEW = 512, 64
#: options of generate under which tokens are the most likely ones and nothing but the model takes time
PLAIN: dict[str, Any] = {"ignore_eos": True, "repetition_penalty": None, "min_new_tokens": 0}


@frozen(kw_only=True)
class Speed:
    """Of a prompt, or of the tokens after the first: the median of the `runs`, tokens of all sequences a second."""

    tokens: int
    tokens_per_second: float
    runs: tuple[float, ...]


@frozen(kw_only=True)
class Figures:
    """One setting, measured.

    Attributes:
        read: bytes that a step reads half way through the answer.
        bound_tokens_per_second: decoding if it did nothing but read them at the measured bandwidth.
        share: of the bound that was reached. Above 1 where weights stay in the processor's caches, or tokens were guessed.
        kernels: what multiplies the weights in a step, by `Model.kernels`.
    """

    prefill: Speed
    decode: Speed
    read: StepBytes
    bound_tokens_per_second: float
    share: float
    kernels: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "read": {**asdict(self.read), "total": self.read.total}}


def lengths(plan: RigPlan, prompt: int | None, new: int | None) -> tuple[int, int]:
    """Tokens of the prompt and of the answer: those asked for, else the usual ones as far as the planned context has room."""
    new = new if new is not None else max(2, min(USUAL_NEW, (plan.context + 1 - (prompt or 1)) // (1 if prompt else 2)))
    return prompt if prompt is not None else max(1, min(USUAL_PROMPT, plan.context + 1 - new)), new


def measure(model: Model, prompt_tokens: int, new_tokens: int, repeat: int, bytes_per_second: float) -> Figures:
    """Generate `new_tokens` from random ids `repeat` times, after once to warm up; not again after `SECONDS`.

    Raises:
        GenerateError: GN-CONTEXT when both together do not fit into the planned context.
    """
    import torch

    batch = model.plan.batch
    dice = torch.Generator().manual_seed(0)
    prompts = torch.randint(model.plan.facts.vocab_size, (batch, prompt_tokens), generator=dice).tolist()
    _generate(model, prompts, min(new_tokens, WARM_TOKENS))
    begun = time.perf_counter()
    prefill, decode = [], []
    for _ in range(repeat):
        read, decoded = _generate(model, prompts, new_tokens)
        prefill.append(read)
        decode.append(decoded)
        if time.perf_counter() - begun > SECONDS:
            break
    bytes_read = step_bytes(model.plan, prompt_tokens + new_tokens // 2)
    bound = batch * bytes_per_second / bytes_read.total
    speed = statistics.median(decode)
    return Figures(
        prefill=Speed(tokens=prompt_tokens * batch, tokens_per_second=statistics.median(prefill), runs=tuple(prefill)),
        decode=Speed(tokens=(new_tokens - 1) * batch, tokens_per_second=speed, runs=tuple(decode)),
        read=bytes_read,
        bound_tokens_per_second=bound,
        share=speed / bound,
        kernels=model.kernels(rows=batch),
    )


def _generate(model: Model, prompts: list[list[int]], new_tokens: int) -> tuple[float, float]:
    """(tokens of prompts a second, new tokens after the first of each a second)"""
    results = model.generate(prompts, max_new_tokens=new_tokens, **PLAIN)
    assert isinstance(results, list)
    stats = [one.stats for one in results]
    prefill, decode = stats[0].prefill_seconds, stats[0].decode_seconds
    read, new = sum(one.prompt_tokens for one in stats), sum(one.new_tokens - 1 for one in stats)
    return read / max(prefill, 1e-9), new / max(decode, 1e-9)


# ------------------------------------------------------------------------------------------------ the machine


def read_bandwidth(environment: Environment, device: str = "cpu", seconds: float = 1.0) -> float:
    """Bytes a second that all threads read from the memory of `device`: the best pass, of several ways to read, in `seconds`.

    The buffer is larger than the processor's caches as far as they are known and memory allows (`MOST_BUFFER_BYTES`).
    """
    import torch

    size = buffer_bytes(environment, device)
    buffer = torch.ones(size // 4, dtype=torch.float32, device=device)  # written, so that each page is there
    ways: list[Callable[[], Any]] = [buffer.sum, *_more_ways(buffer)]
    best, begun, turn = 0.0, time.perf_counter(), 0
    while turn < 2 * len(ways) or time.perf_counter() - begun < seconds:
        started = time.perf_counter()
        ways[turn % len(ways)]()
        if buffer.is_cuda:
            torch.cuda.synchronize(buffer.device)
        best, turn = max(best, buffer.nbytes / (time.perf_counter() - started)), turn + 1
    return best


def buffer_bytes(environment: Environment, device: str = "cpu", root: Path = Path("/")) -> int:
    """How much to read: twice the last-level cache, within bounds and a quarter of what is free; whole rows of 16 KiB."""
    available = environment.available_bytes(device)
    size = min(MOST_BUFFER_BYTES, max(BUFFER_BYTES, 2 * _last_cache_bytes(root) if device == "cpu" else 0))
    return max(1 << 14, (size if available is None else min(size, available // 4)) >> 14 << 14)


def _last_cache_bytes(root: Path) -> int:
    sizes = [0]
    for path in sorted(root.glob("sys/devices/system/cpu/cpu0/cache/index*/size"))[:16]:
        try:
            text = path.read_text(encoding="ascii", errors="replace").strip()
        except OSError:
            continue
        number, unit = text.rstrip("KM"), text[-1:]
        sizes.append(int(number) << {"K": 10, "M": 20}.get(unit, 0) if number.isdecimal() and len(number) < 9 else 0)
    return max(sizes)


def _more_ways(buffer: Tensor) -> list[Callable[[], Any]]:
    import torch

    matrix = buffer.view(-1, 4096)
    vector = torch.ones(4096, device=buffer.device)
    ways: list[Callable[[], Any]] = [lambda: torch.mv(matrix, vector)]
    if not buffer.is_cuda and (search := _memchr()) is not None:
        threads = torch.get_num_threads()
        part, start = buffer.nbytes // threads, buffer.data_ptr()
        pool = ThreadPoolExecutor(threads)
        # 1.0 in float32 has no byte 7, so that each thread reads to its end; ctypes lets the others run meanwhile.
        ways.append(lambda: list(pool.map(lambda place: search(start + place * part, 7, part), range(threads))))
    return ways


def _memchr() -> Callable[[int, int, int], Any] | None:
    try:
        search = ctypes.CDLL(None).memchr
    except (OSError, AttributeError, TypeError):
        return None
    search.restype, search.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
    return search
