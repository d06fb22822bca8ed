"""streamlearn: online semi-supervised learning from a stream, with late labels and live serving."""

__version__ = "0.1.0"
