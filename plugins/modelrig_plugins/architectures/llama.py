"""Llama 1, 2 and 3.x: the plain decoder."""

from __future__ import annotations

from modelrig_plugins.architectures.decoder import DecoderPlanner, Family

PLANNER = DecoderPlanner(Family(name="llama", max_positions=2048))
