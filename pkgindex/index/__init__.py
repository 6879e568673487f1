"""The seam: an Index answers batches of messages, and a URL chooses which. See base.py."""

from pkgindex.index.base import Answers, Clients, Index, Piece, Progress, open_index

__all__ = ["Answers", "Clients", "Index", "Piece", "Progress", "open_index"]
