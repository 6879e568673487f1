"""What honest clients wait while others attack: their 99th percentile under each attack, by that in quiet.

    python benchmarks/attack.py [--store file:PATH] [--seconds 5] [--json]

The attacks are those of the tests (tests/torture/hostile.py). Honest clients send one message at a time,
of all three commands, and each answer is compared with what it must be. Quiet is measured before and
after each attack. Attackers run at the lowest priority, beside the honest clients: on a machine with two
cores these wait for the processor too, which no server can help.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import machine

from tests.servers import Server
from tests.torture.hostile import ATTACKS, MIB, OPTIONS, TIMES, Honest, attacked, percentile


def quiet(server: Server, seconds: float) -> list[float]:
    """What honest clients wait when they are alone. SystemExit for a wrong answer."""
    with Honest(server.address) as honest:
        time.sleep(seconds)
    if honest.wrong:
        sys.exit(f"attack: a wrong answer in quiet: {honest.wrong[0]}")
    return honest.waits


def measure(server: Server, seconds: float) -> list[dict[str, object]]:
    """Attack a server in each way."""
    found: list[dict[str, object]] = []
    print(f"{'attack':14} {'quiet ms':>9} {'p50 ms':>8} {'p99 ms':>8} {'p99/quiet':>10} {'MiB':>7}")
    for attack in ATTACKS:
        waits = quiet(server, seconds / 2)
        outcome = attacked(server, attack, max(seconds, attack.least))
        waits += quiet(server, seconds / 2)
        if outcome.wrong:
            sys.exit(f"attack: {attack.name}: {outcome.wrong[0]}")
        before, middle, high = (
            1000 * x
            for x in (
                percentile(waits),
                statistics.median(outcome.waits),
                percentile(outcome.waits),
            )
        )
        times = high / before
        print(
            f"{attack.name:14} {before:9.2f} {middle:8.2f} {high:8.2f} {times:9.1f}x "
            f"{outcome.peak / MIB:7.1f}{'' if times <= TIMES else '  MORE THAN ' + str(TIMES)}"
        )
        found.append(
            {
                "attack": attack.name,
                "connections": attack.connections,
                "quiet_p99_ms": before,
                "p50_ms": middle,
                "p99_ms": high,
                "times": times,
                "peak_bytes": outcome.peak,
                "messages": len(outcome.waits),
            }
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", help="its URL; by default a new file: store")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each attack")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures there too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        store = options.store or f"file:{folder}/index"
        with Server(store, *OPTIONS) as server:
            found = measure(server, options.seconds)
            server.stop()
    if options.json:
        document = {"machine": machine.description(), "seconds": options.seconds, "attacks": found}
        options.json.write_text(json.dumps(document, indent=2) + "\n")
    return 1 if any(float(str(one["times"])) > TIMES for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
