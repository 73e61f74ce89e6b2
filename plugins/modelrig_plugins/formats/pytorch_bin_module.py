"""pytorch_bin, reading: bytes of the file as a tensor, in the strides it was saved with."""

from __future__ import annotations

from modelrig_plugins.formats.decoding import decode


class PytorchBinReader:
    decode = staticmethod(decode)
