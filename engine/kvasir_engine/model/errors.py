"""What can be wrong with a model, said to its user."""

from kvasir_engine.errors import UserError


class ModelError(UserError):
    """The model cannot be found, read, held or run as asked; the message is one sentence for the user."""
