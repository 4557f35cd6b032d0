"""The error of local runs."""


class LocalError(Exception):
    """An error in one line for the user. `status` is the exit status: 2 for wrong input, 1 for a failed run."""

    def __init__(self, message: str, status: int = 2) -> None:
        super().__init__(message)
        self.status = status
