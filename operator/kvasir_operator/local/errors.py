"""What goes wrong in a local run."""


class LocalError(Exception):
    """One line for the user; `status` is the exit status (2: the user's input, 1: a failure of the run)."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status
