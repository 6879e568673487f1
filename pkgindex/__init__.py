"""pkgindex: a durable index of packages and of what they depend on.

A package enters the index only after all its dependencies, and leaves it only when nothing depends
on it any more. Thousands of clients ask and change it at once over TCP, one line a message:

    INDEX|emacs|elisp,gtk+      OK if elisp and gtk+ are indexed, else FAIL
    REMOVE|emacs|               OK if no other package depends on emacs, else FAIL
    QUERY|emacs|                OK if emacs is indexed, else FAIL

Whoever was told OK finds the change again after any crash: it was on stable storage first.

From a shell, `pkgindex serve` runs the server; `pkgindex index`, `remove`, `query` and `load` talk
to it. From Python:

    from pkgindex.client import Client

    with Client("127.0.0.1:8080") as index:
        index.index("elisp")
        index.index("emacs", ["elisp"])
        assert index.query("emacs")

The parts, from the wire down; imports go only downward:

    cli        commands, progress, exit codes
    server     listeners, signals, drain; wires the parts together
    protocol   framing, the order of replies, back-pressure
    index      the seam: what a store's URL can stand for
    store      what `file:` stands on: journal, package files, epochs, recovery
    _core      compiled: parser, names, graph, reply bytes, redo lines; no I/O

`client` knows only the wire, `load` only `client`; `errors`, `config` and `log` stand apart.
"""

from pkgindex.errors import PkgindexError

__all__ = ["PkgindexError", "__version__"]

__version__ = "0.1.0"
