"""SQLite in the process that uses it: WAL, synchronous=FULL, one transaction a change. No wire at all.

Usage: python sqlite.py DATABASE load < table        lines `name dep dep …`
       python sqlite.py DATABASE query SECONDS       names asked for in random order
       python sqlite.py DATABASE index SECONDS       kills itself with SIGKILL at the end
       python sqlite.py DATABASE count               packages named p-…

`query` and `index` print {"rate": …, "latency_us": {…}, "done": n}.
"""

import json
import os
import random
import signal
import sqlite3
import sys
import time

SCHEMA = """
CREATE TABLE IF NOT EXISTS package (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS dependency (
    package TEXT, dependency TEXT, PRIMARY KEY (package, dependency)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS dependent ON dependency (dependency);
"""


def index(db: sqlite3.Connection, name: str, dependencies: list[str]) -> bool:
    """One INDEX, in one transaction."""
    db.execute("BEGIN IMMEDIATE")
    for one in dependencies:
        if db.execute("SELECT 1 FROM package WHERE name = ?", (one,)).fetchone() is None:
            db.execute("ROLLBACK")
            return False
    db.execute("INSERT OR IGNORE INTO package VALUES (?)", (name,))
    db.execute("DELETE FROM dependency WHERE package = ?", (name,))
    db.executemany(
        "INSERT INTO dependency VALUES (?, ?)", [(name, one) for one in set(dependencies)]
    )
    db.execute("COMMIT")
    return True


def timed(seconds: float, operation) -> dict[str, object]:  # type: ignore[no-untyped-def]
    """Repeat it for so long."""
    latencies = []
    began = last = time.perf_counter()
    while last < began + seconds:
        if not operation(len(latencies)):
            raise SystemExit("sqlite: a wrong answer")
        now = time.perf_counter()
        latencies.append(now - last)
        last = now
    done = len(latencies)
    latencies.sort()
    micros = {"p50": latencies[done // 2] * 1e6, "p99": latencies[done * 99 // 100] * 1e6}
    return {"rate": done / (last - began), "done": done, "latency_us": micros}


def main(path: str, what: str, seconds: float = 0) -> None:
    db = sqlite3.connect(path, isolation_level=None)
    db.execute("PRAGMA journal_mode=WAL")
    db.execute("PRAGMA synchronous=FULL")
    db.executescript(SCHEMA)
    if what == "load":
        rows = [line.split() for line in sys.stdin]
        db.execute("BEGIN")
        db.executemany("INSERT INTO package VALUES (?)", [(name,) for name, *_ in rows])
        pairs = [(name, one) for name, *deps in rows for one in set(deps)]
        db.executemany("INSERT INTO dependency VALUES (?, ?)", pairs)
        db.execute("COMMIT")
    elif what == "query":
        names = db.execute("SELECT name FROM package").fetchall()
        random.Random(1).shuffle(names)

        def query(i: int) -> bool:
            found = db.execute("SELECT 1 FROM package WHERE name = ?", names[i % len(names)])
            return found.fetchone() is not None

        print(json.dumps(timed(seconds, query)))
    elif what == "index":
        start = db.execute("SELECT count(*) FROM package WHERE name LIKE 'p-%'").fetchone()[0]
        print(json.dumps(timed(seconds, lambda i: index(db, f"p-{start + i:08d}", []))), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        print(db.execute("SELECT count(*) FROM package WHERE name LIKE 'p-%'").fetchone()[0])


main(sys.argv[1], sys.argv[2], *map(float, sys.argv[3:]))
