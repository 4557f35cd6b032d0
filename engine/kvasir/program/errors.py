"""What a program raises."""


class ProgramError(Exception):
    """A program cannot go on: the message names the variable and says why, in one sentence."""
