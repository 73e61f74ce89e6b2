"""safetensors, reading: bytes of the file as a tensor."""

from __future__ import annotations

from modelrig_plugins.formats.decoding import decode


class SafetensorsReader:
    decode = staticmethod(decode)
