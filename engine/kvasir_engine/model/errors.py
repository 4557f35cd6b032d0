"""What can be wrong with a model, said to its user."""


class ModelError(Exception):
    """The model cannot be found, read, held or run as asked; the message is one sentence for the user."""
