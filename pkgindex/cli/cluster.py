"""`pkgindex status` and `handover`: how the servers of one store are, and letting another one write."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

import click

from pkgindex.cli.store import TROUBLE, folder_of
from pkgindex.errors import PkgindexError

if TYPE_CHECKING:
    from pkgindex.cluster.overview import Found, Overview

__all__ = ["handover", "status"]

NO_WRITER = 3

POLL_SECONDS = 0.05
ASK_SECONDS = 1.0  # for one member to answer while a handover is under way
SHORT_ID = 8  # digits of an id that tell members apart


class _NoWriter(PkgindexError):
    exit_code = NO_WRITER


def _on_a_store(command: Callable[..., int]) -> Callable[..., int]:
    """Give a command the options that say which store; what is wrong with the store is exit code 2."""

    @wraps(command)
    def with_store(store: str, **others: Any) -> int:
        try:
            return command(folder_of(store), **others)
        except _NoWriter:
            raise
        except PkgindexError as error:
            if error.exit_code > TROUBLE:
                error.exit_code = TROUBLE
            raise

    decorated: Callable[..., int] = click.option(
        "--timeout",
        "seconds",
        type=click.FloatRange(min=0.1),
        metavar="SECONDS",
        default=5.0,
        show_default=True,
        help="How long to wait for the mount, and for servers that do not answer.",
    )(with_store)
    return click.option(
        "--store",
        metavar="URL",
        envvar="PKGINDEX_STORE",
        show_envvar=True,
        default="file:./pkgindex-data",
        show_default=True,
        help="The store that the servers share, as it is mounted here: file:PATH.",
    )(decorated)


@click.command(
    short_help="Show the servers of a store, and who writes.",
    epilog="""\b
Exit codes:
  0  one server writes, and all others answer and are current
  1  one server writes, but something else is wrong: a line says what
  2  usage, or the store cannot be read or its servers' secret not be used
  3  no server writes

\b
Examples:
  pkgindex status --store file:/mnt/shared/index
  pkgindex status --store file:/mnt/shared/index --server 10.0.0.7:8081 --json""",
)
@_on_a_store
@click.option(
    "--server",
    metavar="HOST:PORT",
    default="",
    help="Ask this server alone, at its cluster port: how is this machine's?",
)
@click.option(
    "--max-lag",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    default=10.0,
    show_default=True,
    help="How far a server may be behind the writer before that is wrong.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def status(root: str, server: str, max_lag: float, as_json: bool, seconds: float) -> int:
    """Show who writes, and how far every other server is.

    The servers are found in the folder servers/ of the mount, and asked at their cluster ports. A
    server that does not answer is "gone" if its file there does not change any more, and
    "unreachable" if it does. One that is gone is shown for an hour, or until another stands in its
    place. Run it as the user of the servers: their secret is nobody else's.
    """
    from pkgindex.cluster.overview import survey

    overview = survey(root, seconds, server)
    if server and not overview.members:
        raise PkgindexError(f"{server}: {_why_not(overview, server)}")
    troubles = overview.troubles(max_lag)
    (_print_json if as_json else _print_table)(overview, troubles)
    if overview.writer is None:
        return NO_WRITER
    return 1 if troubles else 0


def _why_not(overview: Overview, server: str) -> str:
    known = ", ".join(seen.member.cluster for seen in overview.mount.members) or "none"
    return f"no server of this store answers at {server}; those that its folder servers/ names: {known}"


def _print_json(overview: Overview, troubles: list[str]) -> None:
    writer = overview.writer
    said = writer.said if writer else {}
    outcome = {
        "epoch": overview.epoch,
        "writer": writer and {"cluster": writer.cluster, "id": writer.id, "data": writer.data},
        "last_change": writer
        and {"position": writer.position, "seconds_ago": said.get("change_seconds")},
        "backlog_bytes": said.get("backlog_bytes"),
        "members": [
            {
                "cluster": member.cluster,
                "role": member.role,
                "position": member.position,
                "epoch": member.epoch,
                "answers": member.answers,
                "current": member.current,
                "lag_changes": member.lag_changes,
                "lag_seconds": member.lag_seconds,
                "unsent_bytes": member.unsent_bytes,
                "unanswered": member.unanswered,
                "data": member.data,
                "version": member.version,
                "id": member.id,
            }
            for member in overview.members
        ],
        "troubles": troubles,
    }
    click.echo(json.dumps(outcome))


def _print_table(overview: Overview, troubles: list[str]) -> None:
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    writer = overview.writer
    click.echo(f"epoch {overview.epoch}: {_writes(writer) if writer else 'no server writes'}")
    table = Table("server", "role", box=box.SIMPLE)
    for title, justify in (("position", "right"), ("behind", "right"), ("backlog", "right")):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    for title in ("clients at", "version", "id"):
        table.add_column(title)
    for member in overview.members:
        table.add_row(
            *map(escape, (member.cluster, member.role, f"{member.position:,}", _behind(member))),
            _backlog(member),
            escape("\n".join(member.data)),
            escape(member.version),
            member.id[:SHORT_ID],
        )
    # Not as narrow as a pipe is taken to be: programs read --json, but people's pagers are wider.
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    for trouble in troubles:
        click.echo(trouble)


def _writes(writer: Found) -> str:
    text = f"{writer.cluster} writes; "
    if not writer.said:
        return text + f"change {writer.position:,}"
    since = writer.said["change_seconds"]
    if since is None:
        return text + f"no change since it began, {_ago(writer.said['reign_seconds'])}"
    return text + f"change {writer.position:,} became durable {_ago(since)}"


def _ago(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{seconds:.1f} s ago"


def _backlog(member: Found) -> str:
    """The writer's: what it keeps for servers that come again; another's: what is not sent to it yet."""
    size = member.said.get("backlog_bytes", member.unsent_bytes)
    return "" if size is None else f"{size / 1e6:.1f} MB"


def _behind(member: Found) -> str:
    if member.lag_seconds is None:
        return ""
    seconds = f"{member.lag_seconds:.3f} s"
    return f"{member.lag_changes:,}, {seconds}" if member.lag_changes else seconds


@click.command(
    short_help="Let another server write.",
    epilog="""\b
Exit codes:
  0  another server writes now, or the one that is named did already
  1  the writer writes on: no other was ready, or took its place in time
  2  usage, or the store cannot be read or its servers' secret not be used
  3  no server writes, or it is not known which one does

\b
Examples:
  pkgindex handover --store file:/mnt/shared/index
  pkgindex handover --store file:/mnt/shared/index --to 10.0.0.8:8081""",
)
@_on_a_store
@click.option(
    "--to",
    metavar="ADDRESS|ID",
    default="",
    help="The server that is to write: its cluster address, or the beginning of its id.",
)
def handover(root: str, to: str, seconds: float) -> int:
    """Have the server that writes hand over to another one that is up to date.

    No message is lost and no client is closed: changes wait for a moment. The one that has handed over
    follows. To stop a server, stop it: it hands over by itself.
    """
    from pkgindex.cluster import frames
    from pkgindex.cluster.client import NoAnswer, ask
    from pkgindex.cluster.overview import survey

    overview = survey(root, seconds)
    old, mount = overview.writer, overview.mount
    if old is None:
        raise _NoWriter("; ".join(overview.troubles(0)))
    target = _member_named(overview, to) if to else None
    if target is old:
        click.echo(f"{old.cluster} writes already, epoch {old.epoch}")
        return 0
    began = time.monotonic()
    try:
        question = frames.HandOver(target.id if target else "0" * 32)
        ask(old.cluster, mount.secret, mount.store, question, seconds)
    except NoAnswer as error:
        raise PkgindexError(f"{old.cluster} writes on: {error}") from None
    _progress(f"handing over from {old.cluster} to {target.cluster if target else 'another'} …")
    candidates = [target] if target else [m for m in overview.members if m.current and m is not old]
    while time.monotonic() < began + seconds + old.said["self"]["takeover_after"]:
        for member in [*candidates, old]:
            own = _state_of(member, overview)
            if own.get("role") == "writer" and own["epoch"] > old.epoch:
                _progress("")
                took = time.monotonic() - began
                click.echo(f"{member.cluster} writes now, epoch {own['epoch']} ({took:.2f} s)")
                return 0
            if member is old and own.get("role") == "writer" and not own["hands_over"]:
                _progress("")
                raise PkgindexError(f"{old.cluster} writes on: nobody took its place in time")
        time.sleep(POLL_SECONDS)
    _progress("")
    raise _NoWriter("the writer has handed over, but who writes now is not known: pkgindex status")


def _state_of(member: Found, overview: Overview) -> dict[str, Any]:
    """What a member says of itself now; nothing if it does not answer at once."""
    from pkgindex.cluster import frames
    from pkgindex.cluster.client import NoAnswer, ask

    mount = overview.mount
    try:
        said = ask(member.cluster, mount.secret, mount.store, frames.Status(), ASK_SECONDS)
    except NoAnswer:
        return {}
    found: dict[str, Any] = json.loads(said.text)["self"] if isinstance(said, frames.State) else {}
    return found


def _member_named(overview: Overview, name: str) -> Found:
    found = [m for m in overview.members if m.cluster == name or m.id.startswith(name)]
    if len(found) != 1:
        known = ", ".join(f"{m.cluster} ({m.id[:SHORT_ID]})" for m in overview.members)
        what = "no server" if not found else "more than one server"
        raise click.UsageError(
            f"--to: {name!r} is {what} of this store: {known}", click.get_current_context()
        )
    if not found[0].answers:
        raise PkgindexError(f"{found[0].cluster}: {found[0].problem}")
    return found[0]


def _progress(text: str) -> None:
    """Show one line on a terminal, in place of the one before."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", nl=False, err=True)
