"""`pkgindex check`: is a stopped store what it should be?"""

import click

from pkgindex.cli.store import STORE, opened
from pkgindex.errors import PkgindexError

__all__ = ["check"]

SHOWN = 20


@click.command(
    short_help="Verify a stopped store.",
    epilog="""\b
Exit codes:
  0  nothing is wrong, or all of it was mended
  1  something is wrong
  2  the store is in use, or cannot be read

\b
Examples:
  pkgindex check
  pkgindex check /srv/pkgindex --repair""",
)
@STORE
@click.option(
    "--repair", "mend", is_flag=True, help="Write anew what follows from the rest of the store."
)
@click.option("--verbose", is_flag=True, help=f"List every wrong file, not just the first {SHOWN}.")
def check(store: str, mend: bool, verbose: bool) -> int:
    """Verify every file of a store, its checksums, forward against reverse, and the journal.

    STORE is a folder or a URL (file:PATH); the server on it must be stopped. --repair writes anew what
    follows from the rest: reverse files from forward files, these from the snapshot, and that from them.
    What nothing else has, such as a damaged journal, is named, and nothing is guessed about it.
    """
    from pkgindex.store import check as checking

    with opened(store) as (offline, progress):
        report = checking.check(offline, progress("checking"))
        problems = report.problems + report.derived
        for problem in problems if verbose else problems[:SHOWN]:
            click.echo(str(problem))
        if len(problems) > SHOWN and not verbose:
            click.echo(f"… and {len(problems) - SHOWN} more (--verbose lists them)")
        found = f"wrong files: {len(problems)}" if problems else "nothing is wrong"
        click.echo(
            f"{offline.mount.root}: {report.packages} packages, {report.files} files: {found}"
        )
        if not mend or not report.derived:
            return 1 if problems else 0
        if report.problems:
            raise PkgindexError(
                f"{offline.mount.root}: not repaired: {report.problems[0]}; restore that from a backup first"
            )
        checking.repair(offline, report)
        click.echo(f"written anew: {len(report.derived)} of them")
    return 0
