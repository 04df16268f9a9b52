"""Futures: how final states are gathered, and what a lost task run raises."""
