"""Adaptive scaling against a model pool, many flows in a minute; see `run`."""

from .run import run

__all__ = ["run"]
