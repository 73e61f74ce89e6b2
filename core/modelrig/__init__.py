"""Modelrig."""
