"""Every error Modelrig raises on purpose.

    ModelrigError                  code · what happened · file · key or tensor · hint          exit code
    ├── RequestError               an argument, option, variable or modelrig.toml key (RQ-*)        2
    │   └── GenerateError          an option or input of generate, stream, chat (GN-*)              2
    │       └── NotFiniteError     the model computes NaN or infinity (GN-NAN)                      1
    ├── CheckpointError            something is wrong with the checkpoint                           1
    │   ├── SourceError            it cannot be found or fetched (SR-*)                             1
    │   ├── FileError              not a regular readable file, or it changed (IO-*)                1
    │   ├── FormatError            a tensor file breaks its format (ST-*, PK-*, ZP-*)               1
    │   ├── IndexFileError         the shard index breaks its rules (IX-*)                          1
    │   ├── IntegrityError         its files are not those its manifest lists (IT-*)                1
    │   ├── ConfigError            config.json or another JSON file of the folder (CF-*)            1
    │   ├── TokenizerError         tokenizer files or text they cannot take (TK-*)                  1
    │   ├── TemplateError          the chat template (TM-*)                                         1
    │   └── CodeRefused            the folder asks for its own code to be run (CR-*)                1
    ├── PlanError                  no rig fits: the refused parts and their reasons (PN-*)          3
    │   └── ResourceLimitError     it would not fit into memory (RL-*)                              3
    ├── PluginError                a plugin that was asked for failed (PL-*)                        4
    ├── LoadError                  tensors and model do not match, or loading was stopped (LD-*)    1
    ├── SaveError                  a save did not happen, or not wholly; says which (SV-*)          1, 2 for SV-ARGS
    │   └── SaveInProgress         another save of the same folder is running (SV-BUSY)             1
    └── CacheError                 a cache was used beyond what it holds (CA-*)                     1

Codes are stable: tools may match on them. `docs/reference/errors.md` lists each with its meaning, and a test compares
that page with `CODES`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

__all__ = [
    "CODES",
    "CacheError",
    "CheckpointError",
    "CodeRefused",
    "ConfigError",
    "FileError",
    "FormatError",
    "GenerateError",
    "IndexFileError",
    "IntegrityError",
    "LoadError",
    "ModelrigError",
    "NotFiniteError",
    "PlanError",
    "PluginError",
    "RequestError",
    "ResourceLimitError",
    "SaveError",
    "SaveInProgress",
    "SourceError",
    "TemplateError",
    "TokenizerError",
    "nearest",
    "quoted",
]

MAX_QUOTED = 200  # characters of foreign text an error message repeats


def quoted(value: object) -> str:
    """`value` as it may stand in a message: control characters escaped, never longer than `MAX_QUOTED` characters."""
    if isinstance(value, str):
        text = value if len(value) <= MAX_QUOTED else value[:MAX_QUOTED] + "…"
        return repr(text)
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    text = repr(value)
    return text if len(text) <= MAX_QUOTED else text[:MAX_QUOTED] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest known name, else an empty string."""
    close = difflib.get_close_matches(name[:MAX_QUOTED], list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


class ModelrigError(Exception):
    """Base of all errors raised on purpose.

    Attributes:
        code: stable short code, a key of `CODES`.
        reason: what happened, with the value that was seen and what is accepted.
        path: the file or folder it is about, if any.
        locus: the tensor name, JSON key or option it is about, if any.
        hint: what to do, if there is something.
    """

    exit_code = 1

    def __init__(
        self,
        code: str,
        reason: str,
        *,
        path: str | Path | None = None,
        locus: str | None = None,
        hint: str | None = None,
    ) -> None:
        if code not in CODES:
            raise AssertionError(f"error code {code!r} is not listed in errors.CODES")
        self.code, self.reason, self.hint = code, reason, hint
        self.path = None if path is None else str(path)
        self.locus = locus
        super().__init__(str(self))

    def __str__(self) -> str:
        where = "".join(
            f"{part}: " for part in (self.path and quoted(self.path)[1:-1], self.locus and quoted(self.locus)[1:-1]) if part
        )
        return f"[{self.code}] {where}{self.reason}" + (f"\nHint: {self.hint}" if self.hint else "")

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.__dict__)

    def to_json(self) -> dict[str, Any]:
        """The error for machines: its class, code, place, reason and hint."""
        return {
            "error": type(self).__name__,
            "code": self.code,
            "path": self.path,
            "locus": self.locus,
            "reason": self.reason,
            "hint": self.hint,
        }


def _rebuild(kind: type[ModelrigError], state: Mapping[str, Any]) -> ModelrigError:
    error = kind.__new__(kind)
    error.__dict__.update(state)
    Exception.__init__(error, str(error))
    return error


class RequestError(ModelrigError):
    """An argument, option, environment variable or `modelrig.toml` key that cannot be used."""

    exit_code = 2


class GenerateError(RequestError):
    """An option or input of `generate`, `stream`, `session` or `model(...)` that cannot be used."""


class NotFiniteError(GenerateError):
    """The model's logits are not finite: nothing in the call is wrong, the weights or the dtype are."""

    exit_code = 1


class CheckpointError(ModelrigError):
    """Something is wrong with the checkpoint: its place, its files or what they say."""


class SourceError(CheckpointError):
    """The checkpoint cannot be found or fetched."""


class FileError(CheckpointError):
    """A file of the checkpoint is not a regular readable file, or it changed while it was in use."""


class FormatError(CheckpointError):
    """A tensor file breaks the rules of its format."""


class IndexFileError(CheckpointError):
    """The index of a sharded checkpoint breaks its rules or disagrees with the shards."""


class IntegrityError(CheckpointError):
    """The manifest of a saved checkpoint breaks its rules, or its files are not those it lists."""


class ConfigError(CheckpointError):
    """A JSON file of the checkpoint is not usable; `locus` is the key."""


class TokenizerError(CheckpointError):
    """The tokenizer's files cannot be used, or a text cannot be encoded."""


class TemplateError(CheckpointError):
    """The chat template is missing, wrong, or did more work than it may."""


class CodeRefused(CheckpointError):  # noqa: N818 - it names what happened
    """The checkpoint asks for code of its own to be run. Modelrig never does that."""


class PlanError(ModelrigError):
    """No rig fits the request.

    Attributes:
        refused: for each kind in question, component (as a config names it) → tuple of `modelrig.components.Reason`.
    """

    exit_code = 3

    def __init__(
        self, code: str, reason: str, *, refused: Mapping[str, Mapping[str, Sequence[Any]]] | None = None, **where: Any
    ) -> None:
        self.refused = {kind: dict(rows) for kind, rows in (refused or {}).items()}
        super().__init__(code, reason, **where)


class ResourceLimitError(PlanError):
    """The plan would need more memory than there is; `reason` has both numbers."""


class PluginError(ModelrigError):
    """A plugin or component that was asked for is broken, missing or failed.

    Attributes:
        plugin: the plugin's or component's name.
        distribution: the distribution it came from, if known.
    """

    exit_code = 4

    def __init__(self, code: str, reason: str, *, plugin: str | None = None, distribution: str | None = None, **where: Any) -> None:
        self.plugin, self.distribution = plugin, distribution
        super().__init__(code, reason, **where)


class LoadError(ModelrigError):
    """The checkpoint's tensors do not fill the model.

    Attributes:
        missing, unexpected, misshapen: the tensor names, all of them.
    """

    def __init__(
        self,
        code: str,
        reason: str,
        *,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
        misshapen: Sequence[str] = (),
        **where: Any,
    ) -> None:
        self.missing, self.unexpected, self.misshapen = tuple(missing), tuple(unexpected), tuple(misshapen)
        super().__init__(code, reason, **where)


class SaveError(ModelrigError):
    """A checkpoint was not saved, or not wholly.

    Attributes:
        committed: "no": the folder is as it was; "yes": the new checkpoint is in place, and something after that failed;
            "uncertain": it is in place, and the system did not confirm that it outlives a power failure.
        operation: what failed, such as "fsync" or "rename"; None where it was no operation on files.
    """

    def __init__(self, code: str, reason: str, *, committed: str = "no", operation: str | None = None, **where: Any) -> None:
        self.committed, self.operation = committed, operation
        if code == "SV-ARGS":
            self.exit_code = 2
        super().__init__(code, reason, **where)


class SaveInProgress(SaveError):  # noqa: N818 - it names what happened
    """Another save of the same folder is running.

    Attributes:
        pid, host, since: of the other one, as far as it said; `since` is in seconds of the epoch.
    """

    def __init__(
        self, code: str, reason: str, *, pid: int | None = None, host: str | None = None, since: float | None = None, **where: Any
    ) -> None:
        self.pid, self.host, self.since = pid, host, since
        super().__init__(code, reason, **where)


class CacheError(ModelrigError):
    """A cache was asked for more than it holds; its state is as it was before the call."""


CODES: dict[str, str] = {
    # requests
    "RQ-UNKNOWN": "unknown key, option or variable",
    "RQ-VALUE": "a value that is not accepted",
    "RQ-FILE": "the configuration file cannot be read or is not TOML",
    "RQ-NAME": "no component of that name; the message says what is installed and what is wrong with near matches",
    "RQ-AMBIGUOUS": "a short name that several plugins register; use the full id",
    "GN-ARGS": "a generation option out of its range",
    "GN-UNKNOWN": "an unknown generation option",
    "GN-INPUT": "input that is not text, token ids or messages, or ids outside the vocabulary",
    "GN-CONTEXT": "tokens do not fit into the planned context, or into the positions that the model has",
    "GN-MODEL": "not what this model is for: an encoder generates no text, a decoder has no encodings",
    "GN-TOKENIZER": "text was given, or asked for, but the model has no tokenizer",
    "GN-CONSTRAINT": "a constraint that cannot be compiled, that nothing installed serves, or that no token can go on with",
    "GN-NAN": "the model's logits are not finite",
    # where checkpoints are, and their files
    "SR-UNKNOWN": "no source recognises the model reference",
    "SR-CLAIMS": "several sources, formats or architectures claim the same input",
    "SR-FORMAT": "no installed format reads the tensor files that are there, or there are none",
    "SR-FETCH": "the model cannot be fetched, or is not in the local cache while offline",
    "IO-TYPE": "not a regular file or folder",
    "IO-READ": "a file cannot be opened or read",
    "IO-CHANGED": "a file changed between planning and the end of loading",
    "IO-PATH": "a path or link leaves the checkpoint's folder",
    # safetensors
    "ST-SHORT": "file too short to hold a header",
    "ST-HDRLEN": "header length is zero or larger than the file",
    "ST-HDRBIG": "header larger than the format allows",
    "ST-MAGIC": "not a safetensors file (the message says what it looks like)",
    "ST-BRACE": "header does not begin with '{'",
    "ST-PAD": "header padded with something other than spaces",
    "ST-UTF8": "header is not UTF-8",
    "ST-JSON": "header is not the JSON object the format asks for",
    "ST-DEPTH": "header nested too deeply",
    "ST-COUNT": "more tensors than the limit",
    "ST-DUPKEY": "duplicate key in the header",
    "ST-FIELD": "missing or unknown field of a tensor",
    "ST-META": "__metadata__ is not a map of strings",
    "ST-DTYPE": "unknown dtype",
    "ST-SHAPE": "shape is not a list of sizes",
    "ST-OFFSET": "data_offsets are not a valid range",
    "ST-OVERFLOW": "shape too large to exist",
    "ST-SIZE": "shape times dtype differs from the byte range",
    "ST-ALIGN": "sub-byte tensor does not end on a byte",
    "ST-OVERLAP": "byte ranges overlap",
    "ST-HOLE": "byte ranges leave a hole",
    "ST-TRUNC": "file ends before the last tensor",
    "ST-TRAIL": "bytes after the last tensor",
    # the pickle in a .bin file
    "PK-LEGACY": "a pickle without an archive, a tar archive or TorchScript (the message says how to convert)",
    "PK-GLOBAL": "the pickle names something tensors are not made of",
    "PK-OPCODE": "an opcode or protocol that torch.save does not write",
    "PK-REDUCE": "a call or storage with other arguments than torch.save writes",
    "PK-LIMIT": "larger, deeper or more than is accepted",
    "PK-TRUNC": "the pickle ends before its last opcode",
    "PK-BAD": "the pickle contradicts itself",
    "PK-ROOT": "the pickle does not hold a dict from names to tensors",
    "PK-KEY": "a key that is no name, or whose value is no tensor",
    "PK-LAYOUT": "a sparse, quantised, complex, nested or otherwise not plain tensor",
    "PK-STRIDE": "a tensor whose values do not lie densely within its storage",
    "PK-ALIAS": "tensors that share a part of their bytes without being the same",
    # the zip archive of a .bin file
    "ZP-MAGIC": "not a zip archive (the message says what it looks like)",
    "ZP-END": "the archive does not end with its end record",
    "ZP-DIRECTORY": "the archive's directory is not what its end record or itself says",
    "ZP-COUNT": "more records than the limit",
    "ZP-NAME": "a record whose name no folder can hold",
    "ZP-DUP": "two records of one name",
    "ZP-METHOD": "a compressed record",
    "ZP-CRYPT": "an encrypted record",
    "ZP-LOCAL": "a record's own header contradicts the directory",
    "ZP-OVERLAP": "records overlap each other or the directory",
    "ZP-PICKLE": "no data.pkl, or more than one",
    "ZP-ORDER": "a byte order other than little-endian",
    "ZP-CRC": "a record differs from its checksum",
    "ZP-RECORD": "the archive lacks a tensor's record",
    "ZP-SIZE": "a record is not as large as the pickle says",
    # index
    "IX-JSON": "index is not a JSON object",
    "IX-DUPKEY": "duplicate key in the index",
    "IX-FIELD": "weight_map is missing or is not a map of strings",
    "IX-PATH": "shard name leaves the folder",
    "IX-TYPE": "shard name is not a tensor file",
    "IX-MISSING": "shards that do not exist",
    "IX-NOTENSOR": "shard lacks a tensor the index places there",
    "IX-DUP": "the same tensor in two shards",
    "IX-LIMIT": "index larger than the limit",
    # what a save wrote
    "IT-JSON": "the manifest is not a JSON object",
    "IT-MANIFEST": "the manifest lists what it must not, or not as it must",
    "IT-MISSING": "a file the manifest lists is not there",
    "IT-SIZE": "a file has another size than the manifest says",
    "IT-HASH": "the bytes of a file are not those that were saved or downloaded",
    "IT-MIXED": "tensor files of different saves lie in one folder",
    # config and other JSON
    "CF-MISSING": "file or required keys missing",
    "CF-JSON": "not the JSON object it should be",
    "CF-DUPKEY": "duplicate key",
    "CF-LIMIT": "file too large or nested too deeply",
    "CF-TYPE": "value of the wrong type",
    "CF-RANGE": "value out of range",
    "CF-REL": "values that contradict each other",
    "CF-ENUM": "value outside the closed list",
    "CF-ARCH": "no component implements this model_type",
    "CR-CODE": "the checkpoint names code of its own (auto_map)",
    # tokenizer and template
    "TK-MISSING": "no usable tokenizer file (the message says what to do)",
    "TK-JSON": "tokenizer file is not valid",
    "TK-LIMIT": "tokenizer file larger than the limit",
    "TK-PANIC": "the tokenizers library gave up on this file or text",
    "TK-TEXT": "text that cannot be encoded",
    "TK-VOCAB": "token ids beyond the model's vocabulary",
    "TM-MISSING": "no chat template",
    "TM-SYNTAX": "template syntax",
    "TM-SANDBOX": "template reaches for something the sandbox forbids",
    "TM-BUDGET": "template does more work than it may",
    "TM-INPUT": "messages a template cannot take",
    "TM-RAISED": "the template itself refused the messages",
    # planning
    "PN-REFUSED": "a component that was asked for cannot serve",
    "PN-NONE": "no combination of components fits",
    "PN-CONTEXT": "a context longer than the positions that the model has",
    "PN-DEVICE": "a device that is not there",
    "PN-MAP-NAME": "a device map names modules or parameters that the model does not have",
    "PN-MAP-COVER": "a device map leaves parameters without a device",
    "PN-MAP-UNUSED": "a name in a device map decides nothing, because longer names decide for all that is inside",
    "PN-MAP-SPLIT": "a device map divides a block, or the weights of one module",
    "PN-MAP-TIED": "a device map divides weights that are one tensor",
    "RL-MEM": "more memory needed than there is",
    # plugins
    "PL-IMPORT": "a plugin or component cannot be imported",
    "PL-HOOK": "a hook raised or returned something wrong",
    "PL-SPEC": "a hook or descriptor does not follow its specification",
    "PL-API": "made for another version of the plugin API",
    "PL-UNKNOWN": "no plugin of that name",
    "PL-NEED": "a package the component needs is missing",
    "PL-DISABLED": "a plugin or component that was asked for was disabled",
    "PL-CONFLICT": "two distributions use the same plugin name",
    "PL-CONTRACT": "a component did not do what its kind's protocol asks",
    "PL-KERNEL": "none of the kernels that a component may use can compute this",
    # loading, saving and caches
    "LD-TENSORS": "tensors missing, unexpected or misshapen",
    "LD-DTYPE": "a stored dtype that cannot fill the parameter",
    "LD-META": "parameters were left without data",
    "LD-MAPPING": "a mapping rule does not fit the stored tensors, or its result does not fit the model",
    "LD-TIE": "a tensor that the module shares under several names is stored with different values",
    "LD-STREAM": "weights that are streamed cannot be used in this way",
    "LD-CLOSED": "the model was closed",
    "LD-COMPILE": "the step cannot be compiled",
    "LD-STORE": "compiled code lies where others than its user may write",
    "SV-ARGS": "an argument of a save that cannot be used",
    "SV-TARGET": "a folder a save must not or cannot replace",
    "SV-TENSOR": "tensors that cannot be read: found before anything is written",
    "SV-READ": "what was to be saved could not be read while saving",
    "SV-SPACE": "not enough space",
    "SV-IO": "an operation on files failed",
    "SV-BUSY": "another save of the same folder is running",
    "CA-FULL": "no room in the cache",
    "CA-ARGS": "impossible size, count or batch",
    "CA-STATE": "calls in the wrong order, or a state that is not of such a cache",
    "CA-REWIND": "rewind beyond what the cache keeps",
    "CA-FILE": "a saved cache that cannot be written, read, or used here",
    "CA-SPACE": "no room on disk for a cache that lies there",
}
