"""Vectors to codes and back: pure functions over frozen parameters."""
