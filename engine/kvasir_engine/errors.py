"""What ends a command with one line."""


class UserError(Exception):
    """The command cannot be done as asked; the message is one sentence for the user.

    The command prints it as `kvasir: error: ...`, without a traceback, and exits with status 2.
    """
