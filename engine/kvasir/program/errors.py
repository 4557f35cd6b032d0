"""The error of programs."""


class ProgramError(Exception):
    """A program failed. The message names the variable and says why, in one sentence."""
