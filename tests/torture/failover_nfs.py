"""Servers on two machines that share an NFSv4.1 mount, each a virtual one with a kernel of its own.

What befalls them comes from outside (tests/nfs): the writer's machine loses its power, is frozen and thawed,
is cut off from the mount, from the other server, from both; its process is killed; nfsd is restarted. Clients
are here, judged as in failover.py. How long changes stood still is told, and no more: emulated machines are
slow, and slower still where others work too.

A machine that was cut off may close its clients' connections, if it says why.
"""

from __future__ import annotations

import random
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.nfs.image import ImageFailed, why_absent
from tests.nfs.lab import MOUNT, PEERS, Lab
from tests.nfs.machine import MachineFailed
from tests.nfs.remote import Remote
from tests.servers import Server, ServerFailed
from tests.torture.campaign import Campaign, Run
from tests.torture.failover import Fault, report
from tests.torture.failover_fleet import Life, Ratchets
from tests.torture.failover_story import Story
from tests.torture.reigns import Place

__all__ = ["CAMPAIGNS", "LabStory"]

FAULTS = 12  # of one story
CLUSTER_PORT = 7070

#: Seconds; an emulated machine on a busy one is not always there for one.
TAKEOVER_AFTER = 3.0


class LabStory(Story):
    """One server in each client machine of a lab."""

    takeover_after = TAKEOVER_AFTER
    liveness = 60.0

    def __init__(self, lab: Lab, store: str, folder: Path, seed: int, *, strong: bool) -> None:
        self.lab = lab
        self.store = store
        place = Place([Path(MOUNT) / store for _ in lab.clients], lab.folder)
        super().__init__(place, folder, seed, self._server, strong=strong)

    def crowd(self, seed: int) -> Ratchets:
        """Fewer than elsewhere: the machines are slow."""
        return Ratchets(
            random.Random(seed),
            clients=12,
            watchers=3,
            neighbourhoods=6,
            neighbours=3,
            owned=5,
            pause=0.2,
            probe_pause=0.05,
            probes=2,
        )

    def files(self) -> Path:
        """Copied from the machine that has them."""
        return self.lab.fetch(self.store)

    def _server(self, root: Path, number: int, options: tuple[str, ...]) -> Server:
        name = self.name(number)
        cluster = ("--cluster", f"{PEERS[name]}:{CLUSTER_PORT}")
        return Remote(self.lab.clients[name], f"file:{root}", *options, *cluster)

    def name(self, number: int) -> str:
        """The machine of a seat."""
        return list(self.lab.clients)[number]

    # --- what befalls machines: each says when ----------------------------------------------------

    def lose_power(self, life: Life) -> float:
        """Switch a server's machine off; it is started again."""
        at = time.monotonic()
        life.is_doomed, life.is_open = True, False
        self.lab.lose_power(self.name(life.number))
        self._heal += [
            partial(self.lab.start_again, self.name(life.number)),
            partial(self.start_again, life),
        ]
        return at

    def freeze(self, life: Life) -> float:
        """Freeze a server's machine; it is thawed."""
        at = time.monotonic()
        life.is_open = False
        self.lab.clients[self.name(life.number)].freeze()
        self._paused.append(life)
        self._heal.append(partial(self.thaw, life))
        return at

    def thaw(self, life: Life) -> None:
        """Let a frozen machine go on."""
        self.lab.clients[self.name(life.number)].thaw()
        self._paused.remove(life)

    def cut(self, life: Life, *cables: str) -> float:
        """Cut cables of a server's machine; they are mended."""
        name = self.name(life.number)

        def each(do: Callable[[str, str], None]) -> None:
            for cable in cables:
                do(name, cable)

        return self.cut_off(
            life, partial(each, self.lab.cut), partial(each, self.lab.join), closes=True
        )

    def restart_nfsd(self) -> float:
        """Stop nfsd for a moment: every mount hangs, until all have reclaimed what was theirs. Say when
        it was back."""
        for life in self.lives:
            life.may_close, life.is_open = True, False
        self.lab.restart_nfsd(self.random.uniform(0, 2))
        return time.monotonic()

    def end(self) -> None:
        """See Story; frozen machines go on before, for the next story."""
        for life in tuple(self._paused):
            self.thaw(life)
        super().end()


def freeze_follower(story: LabStory) -> float:
    """For long enough that a writer that waits for it would be replaced."""
    at = story.freeze(story.followers[0])
    time.sleep(TAKEOVER_AFTER + 2.0)
    return at


FAULTS_OF_MACHINES: dict[str, Fault] = {
    "writer killed": Fault(lambda s: s.kill(s.writer), 2),
    "writer's machine lost its power": Fault(lambda s: s.lose_power(s.writer), 3),
    "writer's machine frozen": Fault(lambda s: s.freeze(s.writer), 4),
    "writer cut off": Fault(lambda s: s.cut(s.writer, "mount", "peer"), 4),
    "writer cut off from the mount": Fault(lambda s: s.cut(s.writer, "mount"), 3),
    "follower's machine frozen": Fault(freeze_follower, 2),
    "follower cut off": Fault(lambda s: s.cut(s.followers[0], "mount", "peer"), 1),
    "servers cut off from each other": Fault(lambda s: s.cut(s.followers[0], "peer"), 1),
    "handover": Fault(lambda s: s.leave(s.writer), 1),
    "nfsd restarted": Fault(lambda s: s.restart_nfsd(), 1),
}

#: What the reduced form has, each once.
QUICK = (
    "writer's machine lost its power",
    "writer's machine frozen",
    "follower's machine frozen",
    "writer cut off",
    "nfsd restarted",
)


def torture(run: Run) -> None:
    """The campaign: stories of one lab, each with a store of its own."""
    folder = run.folder / "lab"
    folder.mkdir()
    stops: dict[str, list[float]] = defaultdict(list)
    number = 0
    try:
        with Lab(folder) as lab:
            run.counts["seconds until the machines were up"] = round(time.monotonic() - run.began)
            while not run.failures and (not number or (run.full and not run.is_late())):
                number += 1
                tell(run, lab, number, stops)
    except ImageFailed as error:
        run.skipped.append(f"all of it: {error}")
    except MachineFailed as error:
        run.fail(str(error))
    for what, seconds in stops.items():
        report(run, what, seconds, FAULTS_OF_MACHINES[what].within)


def tell(run: Run, lab: Lab, number: int, stops: dict[str, list[float]]) -> None:
    """One story."""
    dice = random.Random(run.seed + number)
    strong = bool((run.seed + number) % 2)
    kinds = list(FAULTS_OF_MACHINES)
    often = [FAULTS_OF_MACHINES[kind].often for kind in kinds]
    acts = dice.choices(kinds, often, k=FAULTS) if run.full else dice.sample(QUICK, len(QUICK))
    folder = run.folder / f"story-{number}"
    story = LabStory(lab, f"index-{number}", folder, run.seed + number, strong=strong)
    try:
        with story:
            for n, what in enumerate(acts):
                if story.failures:
                    break
                if run.is_late(left=30.0):
                    run.skipped.append(f"{len(acts) - n} of {len(acts)} faults: the time was up")
                    break
                story.act(what, FAULTS_OF_MACHINES[what].does)
                run.progress(n + 1, len(acts))
    except ServerFailed as error:
        story.fail(f"a server did not start, or not end: {error}")
    run.counts.update(story.counts)
    for what, seconds in story.stops.items():
        stops[what] += seconds
    for failure in story.failures:
        run.fail(f"{failure} (story {number}{', strong' if strong else ''})")
    run.skipped += [f"a part of a history: {one}" for one in story.undecided]


CAMPAIGNS = (
    Campaign(
        "failover-nfs",
        "Servers on two virtual machines with one NFSv4.1 mount: a machine loses its power, freezes, is cut "
        "off, nfsd is restarted. No error on the survivor, nothing lost, nothing twice.",
        torture,
        why_absent,
        seconds=(300.0, 900.0),
        form="cluster",
        alone=True,
    ),
)
