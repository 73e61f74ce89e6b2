"""The top of the house: a plan that can be loaded, and the loaded model.

    plan  = modelrig.plan("tiny")            # no torch, no weights
    model = plan.load()
    out   = model.generate("def add(a, b):", max_new_tokens=32)

torch is imported by `Plan.load`, not by this module.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modelrig.checkpoint.folder import again_if_exchanged
from modelrig.errors import CacheError, GenerateError, LoadError
from modelrig.loading.frames import forgets_frames
from modelrig.planning.identify import check_reference, possible_folder
from modelrig.planning.pipeline import make_plan
from modelrig.planning.placement_maps import require_one_gpu
from modelrig.planning.plan import RigPlan
from modelrig.planning.tokenizer_files import no_text

if TYPE_CHECKING:
    from torch import Tensor, nn

    from modelrig.assembly import Assembled
    from modelrig.checkpoint.saving.protocol import SaveReport
    from modelrig.components import Cache, DecoderMaker
    from modelrig.encoding.batch import Batch
    from modelrig.encoding.encoder import Encoded
    from modelrig.encoding.recipe import Recipe
    from modelrig.generation.calls import Caller
    from modelrig.generation.grammars import Grammars
    from modelrig.generation.loop import Generation, Piece, Run
    from modelrig.generation.session import Session
    from modelrig.loading.progress import ProgressChoice
    from modelrig.planning.negotiation import Choice

Message = Mapping[str, Any]


class Plan(RigPlan):
    """A decision about how to load and run a model. See `modelrig.planning.plan.RigPlan` for what it holds."""

    @forgets_frames
    def load(self, progress: ProgressChoice = False) -> Model:
        """Read the weights and build the model.

        Args:
            progress: True for a bar in bytes on stderr (only on a terminal), or a function called with (done, total).

        Raises:
            SourceError, FileError: a file is missing, or is not what was planned.
            LoadError: the tensors do not fill the model.
            PluginError: a chosen component cannot be imported or broke its contract.
        """
        require_one_gpu(self.device_map)
        from modelrig.assembly import assemble
        from modelrig.loading.progress import progress_bar

        with progress_bar("loading", progress) as report:
            assembled = assemble(self, report)
        companions = {role: plan.load(progress) for role, plan in self.companions.items() if isinstance(plan, Plan)}
        return Model(self, assembled, companions)


def plan(reference: str | Path, config: str | Path | Mapping[str, Any] | None = None, **request: Any) -> Plan:
    """Decide how `reference` would be loaded and run, reading configs and tensor headers only.

    Args:
        reference: a folder, `org/name[@rev]`, or the name of a bundled model (`tiny`); an existing path wins.
        config: a TOML file, or the same keys as a mapping; default `modelrig.toml` in the working directory, if there.
        **request: quantizer, attention, cache, decoder, compiler, device_map, dtype, context, batch, max_memory, prefer, disable,
            set. Arguments win over `MODELRIG_*` variables, these over the config.

    Raises:
        RequestError, CheckpointError, PlanError, PluginError.
    """
    return make_plan(reference, config, cls=Plan, **request)


def load(
    reference: str | Path,
    config: str | Path | Mapping[str, Any] | None = None,
    *,
    progress: ProgressChoice = False,
    **request: Any,
) -> Model:
    """`plan(...)` and `Plan.load` in one; again, where a save replaced the folder in between."""
    return again_if_exchanged(
        possible_folder(check_reference(reference)), lambda: plan(reference, config, **request).load(progress=progress)
    )


class Model:
    """A loaded plan. Use as a context manager, or call `close`, to let go of its memory.

    Attributes:
        plan: what was decided.
        module: the torch module; parameters have Hugging Face's names.
        tokenizer: None when the checkpoint has none that can be used; then prompts are token ids and results have no text.
        load_report: bytes mapped and copied, and seconds.
        companions: role → further model that a part works with.
    """

    def __init__(self, plan: Plan, assembled: Assembled, companions: Mapping[str, Model] | None = None) -> None:
        import torch

        from modelrig.generation.caches import CachePool

        module = assembled.module
        self.plan, self.tokenizer, self.load_report = plan, assembled.tokenizer, assembled.filled.report
        self._other_form = assembled.other_form
        self._streamer = assembled.filled.streamer
        self._module: nn.Module | None = module
        self._parts = dict(assembled.parts)
        self._recipe: Recipe | None = None
        self.companions: Mapping[str, Model] = companions or {}
        self._makers: dict[str, DecoderMaker] = {}
        self._grammars: Grammars | None = None
        self._dtype, self._device = getattr(torch, plan.dtype), torch.device(plan.device)
        self._step: Callable[..., Tensor] | None = self._parts["compilers"].compile(module, plan.choices["compilers"].options)
        self._pool = CachePool(plan, self.new_cache)

    # ------------------------------------------------------------------------------------------ parts

    @property
    def module(self) -> nn.Module:
        """The torch module. Raises `LoadError` (LD-CLOSED) after `close`."""
        if self._module is None:
            raise LoadError("LD-CLOSED", "the model was closed")
        return self._module

    def _require_open(self) -> None:
        _ = self.module

    @property
    def step(self) -> Callable[..., Tensor]:
        """`step(ids, slots, last_only=False)`: ids int64 [batch, tokens] at the place `cache.begin` gave → logits.

        This is what compilers compile.
        """
        if self._step is None:
            raise LoadError("LD-CLOSED", "the model was closed")
        return self._step

    @property
    def device_map(self) -> Mapping[str, str]:
        """Module name → device; "" is the whole model."""
        return self.plan.device_map

    def memory(self) -> dict[str, int]:
        """Measured bytes: `weights` and `buffers` (shared ones once), `cache` (the one kept between calls), and `process`, all
        that is resident of this process (0 where the system does not tell)."""
        resident = Path("/proc/self/statm")
        return {
            "weights": sum(parameter.nbytes for parameter in self.module.parameters()),
            "buffers": sum(buffer.nbytes for buffer in self.module.buffers()),
            "cache": self._pool.nbytes,
            "process": int(resident.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if resident.exists() else 0,
        }

    def kernels(self, rows: int = 1) -> dict[str, int]:
        """Which kernels multiply the weights in a step of `rows` tokens (of all sequences): name → how many weights."""
        from modelrig.modules.linear import count_kernels

        return count_kernels(self.module, rows, self.plan.choices["quantizers"].name)

    def save(
        self,
        directory: str | os.PathLike[str],
        format: str = "safetensors",  # noqa: A002
        max_shard_size: int | str = "5GB",
        dtype: Any = None,
        *,
        variant: str | None = None,
        progress: ProgressChoice = False,
    ) -> SaveReport:
        """Write the model, its configs and its tokenizer to a folder, as Hugging Face lays them out: all or nothing.

        Args:
            directory: may be the folder it was loaded from. Files in it that are no part of a checkpoint stay.
            format: a format that can be written: safetensors, pytorch_bin.
            max_shard_size: bytes of tensors in one file (`200_000_000`, `"200MB"`); a larger tensor has a file of its own.
            dtype: what floating weights are written as; by default as they are in memory.
            variant: a mark for the names of the tensor files, such as "fp16".

        Raises:
            SaveError: nothing, or something else than asked for, was written; `committed` says what the folder holds.
            RequestError: RQ-NAME, RQ-VALUE.
        """
        from modelrig.saving.model import save_model

        self._require_open()
        open_file = None if self._streamer is None else self._streamer.filler.file
        options = {"format": format, "max_shard_size": max_shard_size, "dtype": dtype, "variant": variant, "progress": progress}
        return save_model(self.module, self.plan, self._parts["formats"], directory, open_file=open_file, **options)

    def close(self) -> None:
        """Let go of weights and caches; safe to call twice."""
        self._module = self._step = None
        if self._streamer is not None:
            self._streamer.close()
            self._streamer = None
        self._pool.close()
        self._parts.clear()
        self._makers.clear()
        self._grammars = None
        for model in self.companions.values():
            model.close()

    def __enter__(self) -> Model:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------------------------ forward

    def new_cache(self, batch: int = 1, max_len: int | None = None, padding: Sequence[int] | None = None) -> Cache:
        """An empty cache of the planned kind for `batch` rows of up to `max_len` tokens (default: the planned context).

        `padding` is each row's number of pad tokens on the left. Raises `CacheError` (CA-ARGS) for impossible sizes,
        `ResourceLimitError` (RL-MEM) where more than planned does not fit into memory, and `GenerateError` (GN-MODEL) for an
        encoder.
        """
        import torch

        from modelrig.generation.caches import require_room

        self._require_open()
        self.plan.require_generation()
        capacity, limit = self.plan.context if max_len is None else max_len, self.plan.facts.position_limit
        if limit is not None and isinstance(capacity, int) and capacity > limit:
            raise CacheError("CA-ARGS", f"{capacity}, but the model has positions for {limit}", locus="max_len")
        if all(type(size) is int for size in (batch, capacity)):
            require_room(self.plan, batch, capacity)
        choice = self.plan.choices["caches"]
        with torch.inference_mode(False):  # buffers made inside an inference block could not be used outside
            return self._parts["caches"].create(
                self.plan.facts.cached_layers,
                batch=batch,
                capacity=capacity,
                dtype=self._dtype,
                device=self._device,
                padding=padding,
                options=choice.options,
            )

    def save_cache(self, cache: Cache, path: str | os.PathLike[str]) -> Path:
        """Write what `cache` holds to a file, from which another process can go on: the whole file or nothing.

        Raises `CacheError` (CA-FILE) if it cannot be written.
        """
        from modelrig.generation.cache_files import save_cache

        self._require_open()
        return save_cache(self.plan, cache, path)

    def load_cache(self, path: str | os.PathLike[str], max_len: int | None = None) -> Cache:
        """A cache with what `save_cache`, or a session, wrote to a file, and room for `max_len` tokens (default: the planned
        context).

        Raises:
            CacheError: CA-FILE for a file that is damaged, or belongs to another checkpoint, kind of cache or dtype; CA-FULL if it
                holds more than `max_len` tokens.
            ResourceLimitError: RL-MEM.
        """
        from modelrig.generation.cache_files import load_cache

        self._require_open()
        self.plan.require_generation()
        return load_cache(self.plan, path, lambda batch: self.new_cache(batch, max_len))

    def __call__(
        self, input_ids: Any, cache: Cache | None = None, attention_mask: Any = None, token_type_ids: Any = None
    ) -> Tensor:
        """Logits [batch, tokens, vocab] of `input_ids` int64 [batch, tokens], following what `cache` holds; of an encoder what its
        head gives: [batch, tokens, vocab, labels or hidden], or [batch, labels] for a class of each text.

        Positions and masks come from the cache. `attention_mask` [batch, tokens] (1 token, 0 padding, on either side) is for
        padded batches; with a cache, only for its first call. `token_type_ids` [batch, tokens] are for models that know them.
        """
        import torch

        batch = self._batch(input_ids, attention_mask, token_type_ids)
        with torch.no_grad():
            if cache is not None:
                return batch.restore(self._follow(cache, batch))
            types = () if batch.token_types is None else (False, batch.token_types)
            return batch.restore(self.step(batch.ids, batch.slots(), *types))

    def _batch(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Batch:
        from modelrig.encoding.batch import Batch

        return Batch(self.plan.facts, self._device, input_ids, attention_mask, token_type_ids)

    def _follow(self, cache: Cache, batch: Batch) -> Tensor:
        """Logits of what follows `cache`, which keeps it."""
        from modelrig.generation.caches import begin

        self.plan.require_generation()
        rows, count = batch.ids.shape
        if batch.padding is not None and cache.length:
            raise GenerateError("GN-INPUT", "only the first call on a cache can be padded", locus="attention_mask")
        if cache.batch != rows:
            raise CacheError("CA-ARGS", f"the cache has {cache.batch} rows, the input {rows}", locus="batch")
        if batch.padding is not None and any(batch.padding):
            cache.reset(batch.padding)
        logits = self.step(batch.ids, begin(cache, count))
        cache.commit(count)
        return logits

    def encode(self, input_ids: Any, attention_mask: Any = None, token_type_ids: Any = None, all_layers: bool = False) -> Encoded:
        """Hidden states of `input_ids` [batch, tokens] by an encoder: `.hidden`, `.pooled`, and with `all_layers` `.layers`.

        Raises `GenerateError`: GN-MODEL for a model that generates, GN-INPUT and GN-CONTEXT for inputs it cannot take.
        """
        from modelrig.encoding.encoder import encode

        self.plan.require_encoding()
        return encode(self.module, self._batch(input_ids, attention_mask, token_type_ids), all_layers)

    def embed(self, texts: str | Sequence[str], *, normalize: bool | None = None, pooling: str | None = None) -> Tensor:
        """A vector for each text by an encoder, float32 [texts, numbers] in main memory.

        Args:
            texts: cut to the tokens that the folder says or the context holds, whichever is fewer.
            normalize, pooling: whether vectors have the length 1, and mean, cls or max of the tokens' states; by default as the
                folder's files of sentence-transformers say, without which the mean is taken as it is.

        Raises:
            GenerateError: GN-MODEL for a model that generates, GN-TOKENIZER, GN-INPUT, GN-ARGS.
            ConfigError: those files are wrong, or ask for what is not served.
        """
        from modelrig.encoding.encoder import embed
        from modelrig.encoding.recipe import read_recipe

        self._require_open()
        self.plan.require_encoding()
        if self._recipe is None:
            self._recipe = read_recipe(self.plan.snapshot, self.plan.facts.hidden_size)
        return embed(self.encode, self.tokenizer, self._recipe, texts, self.plan, normalize=normalize, pooling=pooling)

    # ------------------------------------------------------------------------------------------ generate

    def generate(
        self, prompt: Any = None, *, messages: Sequence[Message] | None = None, cache: Cache | None = None, **options: Any
    ) -> Generation | list[Generation]:
        """Continue `prompt`: a str or token ids give one `Generation`; a list of either, or a tensor [batch, tokens], a list.

        Args:
            messages: a conversation for the chat template, instead of a prompt.
            cache: a cache of yours, from `new_cache`; the prompt follows what it holds, and it keeps prompt and answer (of several
                rows, those that end early are fed until the last one ends).
            **options: see `modelrig.generation.options.GenerateOptions`. Without a temperature decoding is greedy. Those left
                out are as the checkpoint's generation_config.json says (`plan.generation`); None switches one off.

        With `num_return_sequences` above 1 a list is returned, sequences of a prompt side by side.
        """
        run = self.start(prompt, messages=messages, cache=cache, **options)
        for _ in run:
            pass
        results = run.results()
        return results[0] if run.is_single else results

    def stream(
        self, prompt: Any = None, *, messages: Sequence[Message] | None = None, cache: Cache | None = None, **options: Any
    ) -> Iterator[Piece]:
        """`generate`, piece by piece: text as soon as it is certain. For several prompts `piece.row` says whose it is."""
        return iter(self.start(prompt, messages=messages, cache=cache, **options))

    def session(self, max_len: int | None = None, *, path: str | os.PathLike[str] | None = None) -> Session:
        """A conversation that keeps its cache across turns; with `path` one that goes on from a file of `session.save`.

        Raises `CacheError` and `ResourceLimitError` as `load_cache` and `new_cache` do.
        """
        from modelrig.generation.cache_files import load_session, save_cache
        from modelrig.generation.session import Session

        cache = self.new_cache(1, max_len)
        session = Session(
            cache,
            lambda *turn: self._caller().read_turn(*turn),
            lambda *turn: self._caller().start_turn(*turn),
            self.plan.generation,
            lambda *held: save_cache(self.plan, *held),
        )
        if path is not None:
            load_session(self.plan, path, session)
        return session

    def chat_prompt(self, messages: Sequence[Message]) -> str:
        """The conversation as the model's chat template writes it, with the answer's beginning."""
        if self.tokenizer is None:
            raise no_text(self._other_form, "read messages")
        return self.tokenizer.render_chat(messages)

    def start(
        self, prompt: Any = None, *, messages: Sequence[Message] | None = None, cache: Cache | None = None, **given: Any
    ) -> Run:
        """The run behind `generate` and `stream`: iterate over it for pieces, then ask it for `results()`."""
        return self._caller().start(prompt, messages, cache, given)

    def _caller(self) -> Caller:
        from modelrig.generation.calls import Caller
        from modelrig.generation.feeding import Engine
        from modelrig.generation.grammars import Grammars

        step = self.step
        engine = Engine(
            step=step,
            stable_length=getattr(self.module, "stable_length", None),
            restarts_at=getattr(self.module, "restarts_at", None),
            widths=tuple(getattr(step, "widths", ())),
            vocab_size=self.plan.facts.vocab_size,
            device=self._device,
            tokenizer=self.tokenizer,
            eos_ids=tuple(self.tokenizer.eos_ids if self.tokenizer is not None else self.plan.eos_ids),
            other_form=self._other_form,
        )
        if self._grammars is None:
            self._grammars = Grammars(self.plan.request, self.tokenizer, self.plan.facts.vocab_size, self._other_form)
        return Caller(self.plan, engine, self._pool, self._maker_of, self.companions, self._grammars.compile)

    def _maker_of(self, choice: Choice) -> DecoderMaker:
        """The implementation of the decoder that was chosen, or of that for calls with a temperature."""
        if choice.id not in self._makers:
            self._makers[choice.id] = choice.registered.implementation()
        return self._makers[choice.id]
