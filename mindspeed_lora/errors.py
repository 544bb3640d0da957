"""The errors a user can cause, and the exit code each one ends the program with.

An entry point catches :class:`MindSpeedLoraError`, prints its text as one message and exits with
``exit_code``; everything else is our own mistake and keeps its traceback.
A message names the flag or file, the value found, the rule, and what would work.
"""

from __future__ import annotations


class MindSpeedLoraError(Exception):
    """Something outside the program's code is wrong: an input file, a checkpoint, the environment."""

    exit_code = 1


class UsageError(MindSpeedLoraError):
    """The command line itself is wrong: a flag, its value, or two values that contradict each other."""

    exit_code = 2


class CheckpointError(MindSpeedLoraError):
    """A checkpoint folder or file is missing, damaged, incomplete, or of another model."""


class DataError(MindSpeedLoraError):
    """A data file, index, record or template is missing, damaged, or does not fit the others."""
