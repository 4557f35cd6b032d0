"""What ends a command with one line."""


class UserError(Exception):
    """The command cannot be done as asked; the message is one sentence for the user.

    The command prints it as `kvasir: error: ...`, without a traceback, and exits with status 2.
    """


class ModelError(UserError):
    """The model cannot be found, read, held or run as asked; the message is one sentence for the user."""


class PortTaken(UserError):
    """The address cannot be listened on; the message is one sentence for the user."""
