"""The table of options: where a value comes from, which one wins, and what is refused."""

from __future__ import annotations

import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pkgindex import config
from pkgindex.config import OPTIONS, Listener, Settings, load
from pkgindex.errors import ConfigError
from tests.servers import Server, Wire

DOCS = Path(__file__).resolve().parent.parent / "docs"


@pytest.fixture
def toml(tmp_path: Path):
    """Write a configuration file and return its path."""

    def write(text: str) -> Path:
        path = tmp_path / "pkgindex.toml"
        path.write_text(text)
        return path

    return write


def refusal(flags=None, environ=None, file=None) -> str:
    """Return the one line with which the settings are refused."""
    with pytest.raises(ConfigError) as caught:
        load(flags, environ or {}, file)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    return str(caught.value)


def check_config(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    kept = {name: text for name, text in os.environ.items() if not name.startswith("PKGINDEX_")}
    return subprocess.run(
        [sys.executable, "-m", "pkgindex", "serve", "--check-config", *arguments],
        env=kept | environ,
        capture_output=True,
        text=True,
        check=False,
    )


# --- which value wins -----------------------------------------------------------------------------


def test_with_nothing_given_every_option_has_its_default():
    assert load({}, {}) == Settings()
    assert Settings().store == "file:./pkgindex-data"
    assert Settings().listen == ()


def test_the_file_beats_the_default(toml):
    assert load({}, {}, toml("max-clients = 7")).max_clients == 7


def test_the_environment_beats_the_file(toml):
    environ = {"PKGINDEX_MAX_CLIENTS": "8"}
    assert load({}, environ, toml("max-clients = 7")).max_clients == 8


def test_a_flag_beats_the_environment_and_the_file(toml):
    environ = {"PKGINDEX_MAX_CLIENTS": "8"}
    assert load({"max_clients": "9"}, environ, toml("max-clients = 7")).max_clients == 9


def test_each_option_is_found_independently_of_the_others(toml):
    settings = load({"window": "3"}, {"PKGINDEX_MAX_LINE": "2k"}, toml('log-level = "error"'))
    assert (settings.window, settings.max_line, settings.log_level) == (3, 2048, "error")


def test_the_environment_can_name_the_file(toml):
    environ = {"PKGINDEX_CONFIG": str(toml("window = 5"))}
    assert load({}, environ).window == 5


def test_a_flag_names_another_file_than_the_environment(toml, tmp_path):
    environ = {"PKGINDEX_CONFIG": str(tmp_path / "absent.toml")}
    assert load({}, environ, toml("window = 5")).window == 5


def test_a_list_of_addresses_replaces_another_and_is_not_added_to_it(toml):
    file = toml('listen = ["127.0.0.1:1", "[::1]:1"]')
    assert load({}, {}, file).listen == (Listener("127.0.0.1:1"), Listener("[::1]:1"))
    assert load({}, {"PKGINDEX_LISTEN": "127.0.0.1:2 unix:a"}, file).listen == (
        Listener("127.0.0.1:2"),
        Listener("unix:a"),
    )
    assert load({"listen": (":3",)}, {}, file).listen == (Listener(":3"),)


def test_a_switch_can_be_turned_off_where_the_file_turned_it_on(toml):
    file = toml("takeover = true")
    assert load({}, {}, file).takeover is True
    assert load({}, {"PKGINDEX_TAKEOVER": "no"}, file).takeover is False


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.key)
def test_every_option_can_be_given_as_flag_variable_and_key(option, toml):
    kind = option.kind
    needed = {
        config.LISTENERS: ":8080",
        config.STORE: "memory:",
        config.FILE: "server.pem",
        config.MEMBER: "host:8081",
    }
    text = needed.get(kind, kind.show(option.default))
    expected = option.read(text, "here")
    as_toml = f"{option.key} = {text if kind is config.SWITCH else repr(text)}"
    for settings in (
        load({option.name: text}, {}),
        load({}, {option.variable: text}),
        load({}, {}, toml(as_toml)),
    ):
        assert getattr(settings, option.name) == expected


def test_settings_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().window = 1


# --- what values mean -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [("65536", 65536), ("64k", 65536), ("64K", 65536), ("1m", 1 << 20), ("2g", 2 << 30)],
)
def test_a_size_takes_a_suffix(text, size):
    assert load({"journal_limit": text}, {}).journal_limit == size


def test_seconds_may_have_a_fraction(toml):
    assert load({}, {}, toml("idle-timeout = 0.5")).idle_timeout == 0.5
    assert load({"idle_timeout": "2.5"}, {}).idle_timeout == 2.5


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("127.0.0.1:8080", ("127.0.0.1", 8080)),
        ("[::1]:0", ("::1", 0)),
        (":8080", ("", 8080)),
        ("localhost:65535", ("localhost", 65535)),
        ("unix:/run/a b", Path("/run/a b")),
    ],
)
def test_an_address_is_a_host_and_a_port_or_a_path(text, address):
    assert config.parse_address(text) == address


@pytest.mark.parametrize("text", ["8080", "::1:8080", "host:", "host:65536", "unix:", "", "a b:1"])
def test_anything_else_is_no_address(text):
    assert "is not an address" in refusal({"listen": (text,)})


# --- what is refused ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("max_line", "much", "is not a size"),
        ("max_line", "-1", "is not a size"),
        ("max_line", "63", "is below 64"),
        ("max_line", "2g", "is above 1g"),
        ("max_clients", "0", "is below 1"),
        ("max_clients", "many", "is not a whole number"),
        ("window", "1.5", "is not a whole number"),
        ("idle_timeout", "-1", "is below 0"),
        ("stop_timeout", "soon", "is not a number of seconds"),
        ("stop_timeout", "nan", "is not a number of seconds"),
        ("stop_timeout", "inf", "is not a number of seconds"),
        ("log_level", "loud", "is none of debug, info, warning, error"),
        ("log_format", "xml", "is none of text, json"),
        ("store", "./data", "is not a store's URL"),
        ("store", "", "is empty"),
        ("takeover", "perhaps", "is neither true nor false"),
    ],
)
def test_a_bad_value_is_refused_with_where_it_came_from(name, text, why, toml):
    option = next(option for option in OPTIONS if option.name == name)
    for message, source in (
        (refusal({name: text}), f"--{option.key}: "),
        (refusal({}, {option.variable: text}), f"{option.variable}: "),
        (refusal({}, {}, toml(f"{option.key} = {text!r}")), f"pkgindex.toml: {option.key}: "),
    ):
        assert source in message
        assert repr(text) in message
        assert why in message


@pytest.mark.parametrize(
    "text", ["max-clients = true", "max-line = 1.5", "store = 5", "listen = 8080", "listen = [1]"]
)
def test_a_key_of_the_wrong_type_is_refused(text, toml):
    assert "pkgindex.toml: " in refusal({}, {}, toml(text))


def test_an_unknown_key_is_refused_with_the_nearest_known_one(toml):
    message = refusal({}, {}, toml("max_line = 100"))
    assert "unknown key 'max_line'" in message
    assert "did you mean max-line?" in message


def test_an_unknown_variable_is_refused_with_the_nearest_known_one():
    message = refusal({}, {"PKGINDEX_MAXLINE": "100"})
    assert "unknown variable PKGINDEX_MAXLINE" in message
    assert "did you mean PKGINDEX_MAX_LINE?" in message


def test_a_key_that_is_wrong_is_refused_even_where_a_flag_would_beat_it(toml):
    assert "'x'" in refusal({"max_line": "1k"}, {}, toml("max-line = 'x'"))


def test_variables_of_other_programs_and_of_the_clients_are_no_mistakes():
    environ = {"HOME": "/", "PKGINDEX_SERVER": "127.0.0.1:8080", "PKGINDEX_DEBUG": "1"}
    assert load({}, environ) == Settings()


def test_a_file_that_cannot_be_read_is_named(tmp_path, toml):
    assert "absent.toml: cannot read it" in refusal(file=tmp_path / "absent.toml")
    assert "cannot read it: Is a directory" in refusal(file=tmp_path)
    assert "pkgindex.toml: not TOML" in refusal(file=toml("max-line"))
    path = toml("")
    path.write_bytes(b"\xff")
    assert "pkgindex.toml: not TOML" in refusal(file=path)


# --- --check-config and the documentation ---------------------------------------------------------


def test_check_config_shows_each_value_with_its_source_and_exits_0(toml):
    file = toml("window = 5")
    done = check_config("--config", str(file), "--max-line", "2k", PKGINDEX_MAX_CLIENTS="3")
    assert (done.returncode, done.stderr) == (0, "")
    rows = {line.split()[0]: line.split(maxsplit=1)[1] for line in done.stdout.splitlines()}
    assert list(rows) == [option.key for option in OPTIONS]
    assert rows["window"].split() == ["5", f"({file})"]
    assert rows["max-line"].split() == ["2k", "(--max-line)"]
    assert rows["max-clients"].split() == ["3", "(PKGINDEX_MAX_CLIENTS)"]
    assert rows["store"].split() == ["file:./pkgindex-data", "(default)"]


def test_check_config_makes_no_store_and_listens_nowhere(tmp_path):
    store = tmp_path / "index"
    assert check_config("--store", f"file:{store}", "--listen", "127.0.0.1:1").returncode == 0
    assert not store.exists()


@pytest.mark.parametrize(
    ("arguments", "environ", "message"),
    [
        (["--max-line", "x"], {}, "--max-line: 'x' is not a size"),
        ([], {"PKGINDEX_WINDOW": "x"}, "PKGINDEX_WINDOW: 'x' is not a whole number"),
        (["--config", "absent.toml"], {}, "absent.toml: cannot read it"),
        (["--maxline", "1"], {}, "No such option '--maxline'"),
        (["extra"], {}, "unexpected extra argument"),
    ],
)
def test_a_mistake_ends_in_one_line_and_exit_code_2(arguments, environ, message):
    done = check_config(*arguments, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pkgindex: ")
    assert message in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_hangup_reads_the_log_level_again_and_stops_nothing(toml):
    file = toml("log-level = 'info'")
    with Server("memory:", "--config", str(file)) as server:
        file.write_text("log-level = 'debug'")
        server.send_signal(signal.SIGHUP)
        assert server.wait_for("configuration read again")["log_level"] == "debug"
        file.write_text("log-level = 'loud'")
        server.send_signal(signal.SIGHUP)
        reason = server.wait_for("configuration not read again")["reason"]
        assert "log-level: 'loud' is none of" in reason
        with Wire(server.address) as wire:
            assert wire.ask(b"QUERY|a|") == b"FAIL\n"
        assert server.stop() == 0


def test_a_hangup_leaves_a_level_that_a_flag_set(toml):
    file = toml("log-level = 'error'")
    with Server("memory:", "--config", str(file), "--log-level", "info") as server:
        server.send_signal(signal.SIGHUP)
        assert server.wait_for("configuration read again")["log_level"] == "info"


def test_the_documentation_has_the_table_as_it_is():
    pages = [page.read_text() for page in sorted(DOCS.glob("*.md"))]
    first_row = config.reference().splitlines()[0]
    with_table = [text for text in pages if first_row in text]
    if not with_table:
        pytest.skip("no page of docs/ has the table of options")
    for text in with_table:
        assert config.reference() in text, "paste what `python -m pkgindex.config` prints"
