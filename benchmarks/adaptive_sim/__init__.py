"""Adaptive scaling against a model pool, many flows in a minute; see `comparison`."""

from .comparison import run

__all__ = ["run"]
