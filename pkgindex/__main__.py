"""`python -m pkgindex`: the same as the `pkgindex` command."""

import signal

# While the command is being imported there is nothing to end in order, and a traceback to spare.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from pkgindex.cli import main  # noqa: E402

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)
    main(prog_name="pkgindex")
