"""What can be set about the server: one table, and how its values are found.

The fields of `Settings` are the table. Each one is declared once, and is from then on a flag
(`--max-line`), an environment variable (`PKGINDEX_MAX_LINE`), a key of the configuration file
(`max-line`), a line of `--help` and a row of the documentation (`python -m pkgindex.config`).

A flag beats the environment, which beats the file, which beats the default. Nothing is silent: an
unknown key, an unknown `PKGINDEX_` variable and a value out of range are each a ConfigError that
names where it came from. This module imports only `errors`, and any module may import it.
"""

import dataclasses
import ipaddress
import math
import os
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, cast

from pkgindex.errors import ConfigError

__all__ = [
    "OPTIONS",
    "Given",
    "Kind",
    "Listener",
    "Option",
    "Settings",
    "gather",
    "load",
    "parse_address",
    "parse_listener",
    "reference",
    "show",
    "show_address",
]

PREFIX = "PKGINDEX_"

# Variables that begin like ours and are no option of the server: each with who reads it.
OTHER_VARIABLES = {
    "PKGINDEX_CONFIG": "serve: the configuration file",
    "PKGINDEX_SERVER": "the clients: which server to talk to",
    "PKGINDEX_TLS_CA": "the clients: whom to trust",
    "PKGINDEX_CLIENT_CERT": "the clients: who they are",
    "PKGINDEX_CLIENT_KEY": "the clients: the key to that",
    "PKGINDEX_DEBUG": "setup.py",
    "PKGINDEX_SANITIZE": "setup.py",
}

# --- kinds of values ------------------------------------------------------------------------------

SUFFIXES = {"": 1, "k": 1024, "m": 1024**2, "g": 1024**3}
TRUE, FALSE = ("1", "true", "yes", "on"), ("0", "false", "no", "off")


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("is not a text")
    if not value:
        raise ValueError("is empty")
    return value


def _store(value: object) -> str:
    text = _text(value)
    if not re.match(r"[a-z][a-z0-9+.-]*:", text):
        raise ValueError("is not a store's URL, such as file:./pkgindex-data or memory:")
    return text


def _size(value: object) -> int:
    """Bytes: an integer, or a text with an optional suffix k, m or g (powers of 1024)."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and (match := re.fullmatch(r"([0-9]+)([kmg]?)", value.lower())):
        return int(match[1]) * SUFFIXES[match[2]]
    raise ValueError("is not a size: a number of bytes, or one with k, m or g behind it")


def _count(value: object) -> int:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"-?[0-9]+", value):
        return int(value)
    raise ValueError("is not a whole number")


def _seconds(value: object) -> float:
    try:
        if isinstance(value, str | int | float) and not isinstance(value, bool):
            seconds = float(value)
            if math.isfinite(seconds):
                return seconds
    except ValueError:
        pass
    raise ValueError("is not a number of seconds")


def _switch(value: object) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in TRUE + FALSE:
        return value.lower() in TRUE
    raise ValueError("is neither true nor false")


def _listeners(value: object) -> "tuple[Listener, ...]":
    """Several listeners: a list of texts and tables, or one text with spaces between them."""
    parts = value.split() if isinstance(value, str) else value
    if not isinstance(parts, list | tuple) or not parts:
        raise ValueError("is not a list of addresses")
    found = []
    for part in parts:
        try:
            found.append(parse_listener(part))
        except ValueError as error:
            raise ValueError(str(error), part) from None
    return tuple(found)


def _level(value: object) -> str:
    return _one_of(value, "debug", "info", "warning", "error")


def _reads(value: object) -> str:
    return _one_of(value, "local", "strong")


def _member(value: object) -> str:
    text = _text(value)
    if not isinstance(parse_address(text), tuple):
        raise ValueError("is not HOST:PORT")
    return text


def _format(value: object) -> str:
    return _one_of(value, "text", "json")


def _one_of(value: object, *allowed: str) -> str:
    if value not in allowed:
        raise ValueError(f"is none of {', '.join(allowed)}")
    return str(value)


def parse_address(text: object) -> tuple[str, int] | Path:
    """Take an address to listen on apart.

    `HOST:PORT`, `[IPV6]:PORT` and `:PORT` give (host, port), where the empty host stands for every
    address of the machine and port 0 for any free port; `unix:PATH` gives the path.
    Raises ValueError with the rest of a sentence that begins with the value.
    """
    if isinstance(text, str):
        if text.startswith("unix:") and len(text) > len("unix:"):
            return Path(text.removeprefix("unix:"))
        match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+(?:%\w+)?)\]|([^\s:\[\]]*)):([0-9]{1,5})", text)
        if match and int(match[3]) < 65536:
            return match[1] or match[2], int(match[3])
    raise ValueError("is not an address: HOST:PORT, [IPV6]:PORT, :PORT or unix:PATH")


def show_address(host: str, port: int) -> str:
    """HOST:PORT as parse_address() takes it."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


Network = ipaddress.IPv4Network | ipaddress.IPv6Network


@dataclass(frozen=True)
class Listener:
    """One address to listen on, and what holds for those who connect to it."""

    address: str  # as parse_address() takes it
    tls: bool = False
    read_only: bool = False  # INDEX and REMOVE are answered FAIL
    allow: tuple[Network, ...] = ()  # where clients may come from; empty: from anywhere
    mode: int | None = None  # of a Unix socket's file; None: 0660

    def admits(self, host: str | None) -> bool:
        """Whether a client at this address (None: not known) may connect."""
        if not self.allow:
            return True
        if host is None:
            return False
        address = ipaddress.ip_address(host)
        return any(address in network for network in self.allow)

    def __str__(self) -> str:
        options = [name for name, on in (("tls", self.tls), ("read-only", self.read_only)) if on]
        options += [f"allow={network}" for network in self.allow]
        options += [] if self.mode is None else [f"mode={self.mode:04o}"]
        return ",".join([self.address, *options])


def parse_listener(value: object) -> Listener:
    """Take a listener apart: a text as for --listen, or a table with the same words for keys.

    `ADDRESS[,tls][,read-only][,allow=NETWORK]...[,mode=MODE]`, or
    `{address = "ADDRESS", tls = true, read-only = true, allow = ["NETWORK"], mode = "MODE"}`.
    Raises ValueError with the rest of a sentence that begins with the value.
    """
    fields: dict[str, object] = {}
    if isinstance(value, str):
        fields["address"], *options = value.split(",")
        for option in options:
            name, has_value, text = option.partition("=")
            if name == "allow" and has_value:
                fields[name] = [*cast("list[str]", fields.get(name, [])), text]
            elif name in fields:
                raise ValueError(f"has {name} twice")
            else:
                fields[name] = text if has_value else True
    elif isinstance(value, dict) and "address" in value:
        fields = dict(value)
    else:
        raise ValueError("is neither an address nor a table with one")
    local = isinstance(parse_address(fields["address"]), Path)
    listener = Listener(
        str(fields.pop("address")),
        _flag(fields, "tls"),
        _flag(fields, "read-only"),
        tuple(_network(text) for text in _list(fields.pop("allow", []))),
        _mode(fields.pop("mode")) if "mode" in fields else None,
    )
    for unknown in fields:
        raise ValueError(
            f"has {unknown!r}, which is no option of a listener: tls, read-only, allow=NETWORK and "
            "mode=MODE are (between two addresses stands a space)"
        )
    if local and (listener.tls or listener.allow):
        raise ValueError("has tls or allow, which a Unix socket cannot have: it has mode=MODE")
    if not local and listener.mode is not None:
        raise ValueError("has mode, which only a Unix socket can have: it has allow=NETWORK")
    return listener


def _flag(fields: dict[str, object], name: str) -> bool:
    value = fields.pop(name, False)
    if not isinstance(value, bool):
        raise ValueError(f"has {name}, which takes no value but true and false")
    return value


def _list(value: object) -> list[object]:
    return value if isinstance(value, list) else [value]


def _network(text: object) -> Network:
    try:
        if isinstance(text, str):
            return ipaddress.ip_network(text)
    except ValueError as error:
        if "host bits" in str(error):
            network = ipaddress.ip_network(cast("str", text), strict=False)
            raise ValueError(f"allows {text}, a host within a network: write {network}") from None
    raise ValueError(f"allows {text!r}, which is no network such as 192.0.2.0/24 or 2001:db8::/32")


def _mode(value: object) -> int:
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 0o777:
        return value  # TOML's own 0o660
    raise ValueError(f"has the mode {value!r}, which is not three octal digits such as 0660")


@dataclass(frozen=True)
class Kind:
    """What values an option takes: how one is read from a text or a TOML value, and shown."""

    parse: Callable[[object], Any]
    metavar: str
    show: Callable[[Any], str] = str


def _show_size(value: int) -> str:
    for suffix in "gmk":
        if value and value % SUFFIXES[suffix] == 0:
            return f"{value // SUFFIXES[suffix]}{suffix}"
    return str(value)


STORE = Kind(_store, "URL")
SIZE = Kind(_size, "BYTES", _show_size)
COUNT = Kind(_count, "N")
SECONDS = Kind(_seconds, "SECONDS", lambda value: f"{value:g}")
SWITCH = Kind(_switch, "", lambda value: str(value).lower())
LISTENERS = Kind(_listeners, "ADDRESS[,OPTION]", lambda value: " ".join(map(str, value)))
FILE = Kind(_text, "FILE")
LEVEL = Kind(_level, "LEVEL")
FORMAT = Kind(_format, "FORMAT")
READS = Kind(_reads, "HOW")
MEMBER = Kind(_member, "HOST:PORT")

# --- the table ------------------------------------------------------------------------------------

Section = Literal["Store", "Cluster", "Network", "TLS", "Limits", "Logging"]


@dataclass(frozen=True)
class Option:
    """One row of the table: everything that any form of the option is made from."""

    name: str  # of the field of Settings
    default: Any
    kind: Kind
    section: Section
    help: str
    least: float
    most: float
    default_means: str  # where the default's own text would not say it

    @property
    def key(self) -> str:
        """The key in the configuration file; `--` before it makes the flag."""
        return self.name.replace("_", "-")

    @property
    def variable(self) -> str:
        """The environment variable."""
        return PREFIX + self.name.upper()

    @property
    def shown_default(self) -> str:
        """The default as a user would write it."""
        return self.default_means or self.kind.show(self.default)

    def read(self, value: object, source: str) -> Any:
        """Turn a text or a TOML value into the field's value.

        Raises ConfigError, which names `source`, for a value of another kind or out of range.
        """
        try:
            parsed = self.kind.parse(value)
            if isinstance(parsed, int | float) and not self.least <= parsed <= self.most:
                least, most = (self.kind.show(bound) for bound in (self.least, self.most))
                bounds = f"below {least}" if parsed < self.least else f"above {most}"
                raise ValueError(f"is {bounds}")
        except ValueError as error:
            what, culprit = error.args if len(error.args) == 2 else (error, value)
            raise ConfigError(f"{source}: {culprit!r} {what}") from None
        return parsed


def _option(
    default: Any,
    kind: Kind,
    section: Section,
    help: str,  # noqa: A002
    *,
    least: float = 0,
    most: float = math.inf,
    default_means: str = "",
) -> Any:
    row = {"kind": kind, "section": section, "help": help, "least": least, "most": most}
    return dataclasses.field(default=default, metadata=row | {"default_means": default_means})


@dataclass(frozen=True)
class Settings:
    """Everything that can be set about one server, checked."""

    store: str = _option(
        "file:./pkgindex-data",
        STORE,
        "Store",
        "Where the index is kept: file:PATH, or memory: to keep nothing.",
    )
    journal_limit: int = _option(
        1024**3,
        SIZE,
        "Store",
        "How large the journal may grow before changes wait for the package files.",
        least=64 * 1024,
    )
    create: bool = _option(
        False,
        SWITCH,
        "Store",
        "Make a new store even in a folder that is meant to be a mount: "
        "while nothing is mounted there, it only looks empty.",
    )
    takeover: bool = _option(
        False,
        SWITCH,
        "Store",
        "Depose the server that owns the store; it can answer and write nothing from then on.",
    )
    rebuild: bool = _option(
        False,
        SWITCH,
        "Store",
        "Read every package file at the start, even if there is a snapshot of the index: "
        "after package files were changed by hand or restored.",
    )
    cluster: str = _option(
        "",
        MEMBER,
        "Cluster",
        "Serve together with other servers of the same file: store on a shared mount; they reach this one "
        "here. Port 0 takes a free one.",
        default_means="none: this server has the store to itself",
    )
    workers: int = _option(
        1,
        COUNT,
        "Cluster",
        "Run so many servers here that share the file: store and the addresses to listen on, one for each "
        "core, say, and start again what dies; --cluster is then only needed for further machines.",
        least=1,
        most=64,
    )
    takeover_after: float = _option(
        5,
        SECONDS,
        "Cluster",
        "Replace a writer that has not been heard of on the mount for so long; "
        "one whose process has died is replaced at once.",
        least=0.2,
        most=3600,
    )
    reads: str = _option(
        "local",
        READS,
        "Cluster",
        "local answers QUERY from this server's own copy; strong asks the writer for a proof first, so that "
        "no answer is older than a change that was acknowledged on any server.",
    )
    listen: tuple[Listener, ...] = _option(
        (),
        LISTENERS,
        "Network",
        "Where to listen: HOST:PORT, [IPV6]:PORT, :PORT for every address, or unix:PATH; each with "
        "options of its own, joined by commas: tls, read-only, allow=NETWORK (may be repeated), "
        "mode=0660 (of a Unix socket). May be given more than once; port 0 takes a free one.",
        default_means="127.0.0.1:8080 [::1]:8080",
    )
    tls_cert: str = _option(
        "",
        FILE,
        "TLS",
        "The server's certificate, in PEM, with those between it and its CA behind it.",
        default_means="none",
    )
    tls_key: str = _option(
        "",
        FILE,
        "TLS",
        "The key to that certificate, in PEM, without a password.",
        default_means="in --tls-cert",
    )
    tls_client_ca: str = _option(
        "",
        FILE,
        "TLS",
        "Let in over TLS only clients whose certificate one of these CAs has signed.",
        default_means="none",
    )
    max_clients: int = _option(
        10_000,
        COUNT,
        "Limits",
        "Connections at once; one more is closed without a byte.",
        least=1,
        most=1_000_000,
    )
    max_line: int = _option(
        1024**2,
        SIZE,
        "Limits",
        "The longest message; a longer one is answered ERROR.",
        least=64,
        most=1024**3,
    )
    window: int = _option(
        65_536,
        COUNT,
        "Limits",
        "Unanswered changes a connection may have before it is read no further.",
        least=1,
        most=2**31 - 1,
    )
    max_index: int = _option(
        0,
        SIZE,
        "Limits",
        "Memory that the index may take; an INDEX that needs more is answered FAIL. 0 is no limit.",
    )
    line_timeout: float = _option(
        60,
        SECONDS,
        "Limits",
        "Close a connection that leaves a message unfinished for so long; 0 waits for ever.",
    )
    idle_timeout: float = _option(
        0,
        SECONDS,
        "Limits",
        "Close a connection that sends nothing for so long; 0 waits for ever.",
    )
    stop_timeout: float = _option(
        60,
        SECONDS,
        "Limits",
        "How long a stop may take; what is not in package files by then stays in the journal.",
    )
    log_level: str = _option(
        "info",
        LEVEL,
        "Logging",
        "The least serious events to log: debug, info, warning or error.",
    )
    log_format: str = _option(
        "text",
        FORMAT,
        "Logging",
        "One line an event: text for people, json for programs.",
    )


OPTIONS: tuple[Option, ...] = tuple(
    Option(name=field.name, default=field.default, **field.metadata)
    for field in dataclasses.fields(Settings)
)
_BY_NAME = {option.name: option for option in OPTIONS}
_BY_KEY = {option.key: option for option in OPTIONS}
_BY_VARIABLE = {option.variable: option for option in OPTIONS}

# --- finding the values ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Given:
    """A value and where it came from."""

    value: Any
    source: str


def gather(
    flags: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> dict[str, Given]:
    """Find every option's value, and where it came from, in the order of the table.

    `flags` has the given flags by field name; `environ` is the process's own unless given; `file`
    is the configuration file that a flag named, else `PKGINDEX_CONFIG` names it.
    Reads one file; raises ConfigError.
    """
    environ = os.environ if environ is None else environ
    found = {option.name: Given(option.default, "default") for option in OPTIONS}
    file = file or environ.get("PKGINDEX_CONFIG")
    if file:
        found.update(_from_file(Path(file)))
    found.update(_from_environment(environ))
    for name, value in flags.items():
        option = _BY_NAME[name]
        source = f"--{option.key}"
        found[name] = Given(option.read(value, source), source)
    return found


def load(
    flags: Mapping[str, object] | None = None,
    environ: Mapping[str, str] | None = None,
    file: str | Path | None = None,
) -> Settings:
    """Find every option's value (see `gather`) and give them as Settings. Raises ConfigError."""
    given = gather(flags or {}, environ, file)
    return Settings(**{name: one.value for name, one in given.items()})


def _from_file(path: Path) -> Iterator[tuple[str, Given]]:
    try:
        with path.open("rb") as file:
            table = tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path}: cannot read it: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: not TOML: {error}") from None
    for key, value in table.items():
        option = _BY_KEY.get(key)
        if option is None:
            raise ConfigError(f"{path}: unknown key {key!r}{_suggest(key, _BY_KEY)}")
        yield option.name, Given(option.read(value, f"{path}: {key}"), str(path))


def _from_environment(environ: Mapping[str, str]) -> Iterator[tuple[str, Given]]:
    for variable, text in environ.items():
        if not variable.startswith(PREFIX) or variable in OTHER_VARIABLES:
            continue
        option = _BY_VARIABLE.get(variable)
        if option is None:
            hint = _suggest(variable, [*_BY_VARIABLE, *OTHER_VARIABLES])
            raise ConfigError(f"environment: unknown variable {variable}{hint}")
        yield option.name, Given(option.read(text, variable), variable)


def _suggest(word: str, known: Mapping[str, object] | list[str]) -> str:
    close = get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


# --- showing them ---------------------------------------------------------------------------------


def show(found: Mapping[str, Given]) -> str:
    """Every option with its value and where it came from, one a line."""
    rows = []
    for name, given in found.items():
        option = _BY_NAME[name]
        at_default = given.source == "default"
        text = option.shown_default if at_default else option.kind.show(given.value)
        rows.append(f"{option.key:14} {text:28} ({given.source})")
    return "\n".join(rows)


def reference() -> str:
    """The table as Markdown, for the documentation."""
    lines = ["| flag, key | environment | default | what it sets |", "| --- | --- | --- | --- |"]
    for option in OPTIONS:
        metavar = option.kind.metavar.replace("|", "\\|")
        flag = f"`--{option.key} {metavar}`" if metavar else f"`--{option.key}`"
        lines.append(f"| {flag} | `{option.variable}` | `{option.shown_default}` | {option.help} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(reference())
