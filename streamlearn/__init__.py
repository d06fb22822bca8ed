"""streamlearn: learns for ever from a stream, and serves what it knows while it learns."""

__version__ = "0.1.0"
