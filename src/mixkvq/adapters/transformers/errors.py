"""What the adapter raises."""


class UnsupportedModelError(RuntimeError):
    """The model's architecture does something with its keys and values that the packed cache cannot serve."""
