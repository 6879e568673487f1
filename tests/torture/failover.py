"""Any server of a cluster may die, hang or be cut off: nothing acknowledged is lost, nothing done twice.

Three servers and fifty clients; fault after fault (failover_story.py), in stories of a few with the same
servers, some with `--reads strong`. On the survivors no connection ends and every message is answered once.

How long changes stood still is told by kind of fault, median and longest; the median has to keep what is
promised, for one takeover alone may meet a busy machine.
"""

from __future__ import annotations

import random
import re
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.servers import Server, ServerFailed
from tests.torture import failover_network, gluster
from tests.torture.campaign import Campaign, Run
from tests.torture.failover_fleet import Life
from tests.torture.failover_mutants import Member
from tests.torture.failover_network import CLIENTS, SERVERS, Network
from tests.torture.failover_story import TAKEOVER_AFTER, Story
from tests.torture.reigns import Place

__all__ = ["CAMPAIGNS"]

FAULTS = 12  # of one story
MUTANT_FAULTS = 16  # within which a wrong server must have been found out
FAILURES = 4  # after which a campaign has nothing more to say

SILENT = TAKEOVER_AFTER + 2.0
ENOUGH = 5  # faults of a kind, for their median to be held to what is promised


@dataclass(frozen=True)
class Fault:
    """What befalls a cluster."""

    does: Callable[[Story], float]
    often: int  # how often it is chosen, beside the others
    within: float | None = None  # seconds in which changes flow again


def kill_two(story: Story) -> float:
    return story.kill(story.writer, story.followers[0])


def kill_twice(story: Story) -> float:
    """The writer, and whoever takes its place, in the middle of it or just after."""
    first, others = story.writer, story.followers
    at = story.kill(first)
    time.sleep(story.random.uniform(0, 0.5))
    story.kill(max(others, key=story.reign))
    return at


def pause_briefly(story: Story) -> float:
    """Shorter than anybody minds."""
    at = story.pause(story.writer)
    time.sleep(story.random.uniform(0.1, 0.8) * TAKEOVER_AFTER)
    story.wake_all()
    return at


def pause_two(story: Story) -> float:
    """The writer and one of its followers, which wake together."""
    return story.pause(story.writer, story.followers[0])


def pause_idle(story: Story) -> float:
    """The writer with nothing left to do, neither then nor when it wakes: only its heartbeat tells it."""
    return story.pause(story.idle_writer())


def pause_and_kill(story: Story) -> float:
    """The writer is paused, whoever took its place is killed, and the first wakes."""
    at = story.pause(story.writer)
    story.flow_again(at)
    story.kill(story.writer)
    return at


class CopiesStory(Story):
    """On a replicated volume: each change waits for several bricks, which a busy machine delays."""

    takeover_after = 3.0


LOCAL = {
    "writer killed": Fault(lambda s: s.kill(s.writer), 8, 1.0),
    "follower killed": Fault(lambda s: s.kill(s.followers[0]), 1),
    "two killed": Fault(kill_two, 2, 1.0),
    "writer killed, and the next": Fault(kill_twice, 2),
    "writer paused": Fault(lambda s: s.pause(s.writer), 4, SILENT),
    "writer paused briefly": Fault(pause_briefly, 1),
    "writer and follower paused": Fault(pause_two, 2, SILENT),
    "idle writer paused": Fault(pause_idle, 1, SILENT),
    "writer paused, the next killed": Fault(pause_and_kill, 1),
    "follower paused": Fault(lambda s: s.pause(s.followers[0]), 1),
    "handover": Fault(lambda s: s.leave(s.writer), 3, 0.2),
    "follower told to stop": Fault(lambda s: s.leave(s.followers[0]), 1),
}


def hang_while_asked(story: Story) -> float:
    """The writer's mount hangs, but nothing else of it, and strong reads of a follower still come to it."""
    story.let_only_ask(story.followers[0])
    return story.hang(story.writer)


ON_GLUSTER = {
    "writer killed": Fault(lambda s: s.kill(s.writer), 4, 2.0),
    "two killed": Fault(kill_two, 1, 2.0),
    "writer paused": Fault(lambda s: s.pause(s.writer), 3, SILENT),
    "writer and follower paused": Fault(pause_two, 1, SILENT),
    "handover": Fault(lambda s: s.leave(s.writer), 2),
    "writer's mount hung": Fault(lambda s: s.hang(s.writer), 5, SILENT),
    "writer's mount hung, a follower only asks": Fault(hang_while_asked, 1, SILENT),
    "follower's mount hung": Fault(lambda s: s.hang(s.followers[0]), 1),
    "brick killed": Fault(lambda s: s.lose_brick(), 2),
}


def lose_copy(story: Story) -> float:
    return story.lose_copy(story.random.randrange(len(story.volume.bricks)))


def lose_copy_and(fault: Callable[[Story], float]) -> Callable[[Story], float]:
    """A brick is killed, and more happens while it is away; it comes again before that is undone."""

    def both(story: Story) -> float:
        lose_copy(story)
        time.sleep(story.random.uniform(0, 0.5))
        return fault(story)

    return both


def hang_with_its_locks(story: Story) -> float:
    """The writer's mount hangs, and with it all that needs a name for which it holds the bricks' locks."""
    return story.hang_briefly(story.writer, story.takeover_after + 1.0)


ON_COPIES = {
    "brick killed": Fault(lose_copy, 3),
    "brick killed, and the writer": Fault(lose_copy_and(lambda s: s.kill(s.writer)), 3, 2.0),
    "brick killed, writer paused": Fault(
        lose_copy_and(lambda s: s.pause(s.writer)), 3, CopiesStory.takeover_after + 2.0
    ),
    "brick killed, and a handover": Fault(lose_copy_and(lambda s: s.leave(s.writer)), 1),
    "writer's mount hung": Fault(hang_with_its_locks, 1),
}


@contextmanager
def local(folder: Path) -> Iterator[Place]:
    """All servers in one folder."""
    yield Place([folder / "index"] * 3, folder / "index")


@contextmanager
def on_gluster(folder: Path) -> Iterator[Place]:
    """Each on a mount of its own of a GlusterFS volume, with the caches of a volume's default options."""
    with gluster.Volume(folder / "volume") as volume:
        roots = [volume.mount(str(seat)) / "index" for seat in range(3)]
        yield Place(roots, volume.brick / "index", volume)


@contextmanager
def on_copies(folder: Path) -> Iterator[Place]:
    """The same on a replicated volume: two bricks and an arbiter, of which any may die alone."""
    with gluster.Volume(folder / "volume", bricks=3, arbiter=True) as volume:
        roots = [volume.mount(str(seat)) / "index" for seat in range(3)]
        yield Place(roots, volume.brick / "index", volume)


@dataclass(frozen=True)
class Networked(Place):
    """A place whose seats are machines of their own, as far as networks go."""

    network: Network | None = None


@contextmanager
def on_networks(folder: Path) -> Iterator[Place]:
    """All servers in one folder, each with a cable to the others and one to the clients."""
    with Network(3) as network:
        yield Networked([folder / "index"] * 3, folder / "index", None, network)


def start(mutant: str, place: Place, root: Path, seat: int, options: tuple[str, ...]) -> Server:
    """A server, not started."""
    network = place.network if isinstance(place, Networked) else None
    if network is None:
        return Member(mutant, f"file:{root}", *options)
    return Member(
        mutant,
        f"file:{root}",
        *options,
        *("--cluster", f"{network.address(seat, SERVERS)}:0"),  # the last one counts
        listen=f"{network.address(seat, CLIENTS)}:0",
        inside=network.inside(seat),
    )


def network_of(story: Story) -> Network:
    assert isinstance(story.place, Networked)
    assert story.place.network is not None
    return story.place.network


def cut(story: Story, life: Life, *cables: str) -> float:
    """Cut a server off. Whom it cannot help, it closes; whoever is cut off from it, waits. Say when."""
    network = network_of(story)
    return story.cut_off(
        life,
        partial(network.cut, life.number, *cables),
        partial(network.mend, life.number, *cables),
        closes=SERVERS in cables,
    )


def roughen(story: Story) -> float:
    """The servers hear each other late, and not always at once: nobody has to be replaced. Say when."""
    network, dice = network_of(story), story.random
    return story.roughen(
        partial(network.roughen, loss=dice.uniform(0.005, 0.03), delay=dice.uniform(0.002, 0.02)),
        partial(network.roughen, loss=0.0, delay=0.0),
    )


def kill_roughly(story: Story) -> float:
    """The writer is killed where the network is rough."""
    roughen(story)
    return story.kill(story.writer)


ON_NETWORKS = {
    "writer cut off from the others": Fault(lambda s: cut(s, s.writer, SERVERS), 4, SILENT),
    "writer cut off from all": Fault(lambda s: cut(s, s.writer, SERVERS, CLIENTS), 3, SILENT),
    "writer cut off from its clients": Fault(lambda s: cut(s, s.writer, CLIENTS), 2),
    "follower cut off from the others": Fault(lambda s: cut(s, s.followers[0], SERVERS), 2),
    "writer killed": Fault(lambda s: s.kill(s.writer), 1, 1.0),
    "delay and loss": Fault(roughen, 2),
    "delay and loss, writer killed": Fault(kill_roughly, 2),
}


@dataclass(frozen=True)
class Wrong:
    """A mistake that a fault must bring to light: in which answers or files, by an expression."""

    mutant: str
    fault: str
    seen: str = "no order of the calls|is lost|answers otherwise"
    strong: bool = False


@dataclass(frozen=True)
class Setting:
    """Where a campaign happens, and what."""

    place: Callable[[Path], AbstractContextManager[Place]]
    faults: dict[str, Fault]
    wrong: tuple[Wrong, ...]
    failovers: tuple[int, int]  # full, quick
    jobs: int = 2
    story: type[Story] = Story


SETTINGS = {
    "failover": Setting(
        local,
        LOCAL,
        (
            Wrong(
                "keeps-what-was-deposed",
                "writer paused",
                "no order of the calls|is lost|answers otherwise|no changes on|ended with 5",
            ),
            Wrong("shows-a-snapshot-at-once", "writer paused"),
            Wrong("runs-again", "writer killed"),
            Wrong("notes-nothing", "writer killed"),
            Wrong("answers-before-the-batch", "follower killed"),
            Wrong("beats-by-a-plain-write", "idle writer paused"),
        ),
        (330, 6),
    ),
    "failover-gluster": Setting(
        on_gluster,
        ON_GLUSTER,
        (
            Wrong(
                "checks-without-a-proof", "writer's mount hung, a follower only asks", strong=True
            ),
        ),
        (110, 3),
    ),
    "failover-copies": Setting(on_copies, ON_COPIES, (), (40, 2), story=CopiesStory),
    "failover-network": Setting(
        on_networks,
        ON_NETWORKS,
        (
            Wrong(
                "reaches-nobody-else",
                "writer cut off from the others",
                "no changes on|closed a client's connection",
            ),
        ),
        (60, 3),
        jobs=1,  # members hear of each other by their files within a second, which a busy machine delays
    ),
}


def torture(run: Run, name: str) -> None:
    """The campaign: stories, and one mutant after the other, at the same time where that may be."""
    setting = SETTINGS[name]

    def find_all_out() -> None:
        for wrong in setting.wrong:
            find_out(run, setting, wrong)

    # Each server dies with the thread that started it; these last as long as their stories.
    with ThreadPoolExecutor(setting.jobs) as pool:
        jobs = [pool.submit(tell_all, run, setting), pool.submit(find_all_out)]
    for job in jobs:
        job.result()


def find_out(run: Run, setting: Setting, wrong: Wrong) -> None:
    """Let servers with a mistake fail until it is seen."""
    fault = setting.faults[wrong.fault].does
    folder = run.folder / wrong.mutant
    folder.mkdir()
    with setting.place(folder) as place:
        story = setting.story(
            place,
            folder / "work",
            run.seed,
            partial(start, wrong.mutant, place),
            strong=wrong.strong,
        )
        try:
            with story:
                while story.counts["faults"] < MUTANT_FAULTS and not story.failures:
                    story.act(wrong.fault, fault)
        except ServerFailed as error:
            story.fail(f"a server did not start, or not end: {error}")
    if any(re.search(wrong.seen, failure) for failure in story.failures):
        run.counts["mutants caught"] += 1
    else:
        run.fail(f"the mutant {wrong.mutant} was not found out, but: {story.failures}")


def tell_all(run: Run, setting: Setting) -> None:
    """Stories after stories, until there were enough failovers."""
    goal = run.scale(*setting.failovers)
    stops: dict[str, list[float]] = defaultdict(list)
    number = 0
    while run.counts["failovers"] < goal and not run.is_late() and len(run.failures) < FAILURES:
        number += 1
        folder = run.folder / f"story-{number}"
        folder.mkdir()
        with setting.place(folder) as place:
            tell(run, setting, place, folder, number, goal, stops)
    if run.counts["failovers"] < goal and not run.failures:
        run.skipped.append(f"{goal - run.counts['failovers']} of {goal} failovers: the time was up")
    for what, seconds in stops.items():
        report(run, what, seconds, setting.faults[what].within)


def tell(
    run: Run,
    setting: Setting,
    place: Place,
    folder: Path,
    number: int,
    goal: int,
    stops: dict[str, list[float]],
) -> None:
    """One story, until it has failed or there were enough failovers."""
    before = run.counts["failovers"]
    dice = random.Random(run.seed + number)
    strong = number % 2 == 0

    story = setting.story(
        place, folder / "work", run.seed + number, partial(start, "", place), strong=strong
    )
    kinds = list(setting.faults)
    try:
        with story:
            while story.counts["faults"] < FAULTS and not run.is_late() and not story.failures:
                what = dice.choices(kinds, [setting.faults[kind].often for kind in kinds])[0]
                story.act(what, setting.faults[what].does)
                done = before + story.counts["failovers"]
                run.progress(min(goal, done), goal)
                if done >= goal:
                    break
    except ServerFailed as error:
        story.fail(f"a server did not start, or not end: {error}")
    run.counts.update(story.counts)
    for what, seconds in story.stops.items():
        stops[what] += seconds
    for failure in story.failures:
        run.fail(f"{failure} (story {number}{', strong' if strong else ''})")
    run.skipped += [f"a part of a history: {one}" for one in story.undecided]


def report(run: Run, what: str, seconds: list[float], within: float | None) -> None:
    """How long changes stood still after faults of a kind."""
    median, longest = statistics.median(seconds), max(seconds)
    run.counts[f"ms without changes, median ({what})"] = round(median * 1000)
    run.counts[f"ms without changes, longest ({what})"] = round(longest * 1000)
    # The reduced form has one or two of a kind, beside other campaigns: these prove nothing.
    if within is not None and median > within and len(seconds) >= ENOUGH:
        run.fail(
            f"{what}: no changes for {median:.2f} s (the median), and {within:.1f} s is promised"
        )


CAMPAIGNS = (
    Campaign(
        "failover",
        "Three servers of one folder under 50 clients: the writer or others are killed, paused and woken, "
        "told to stop, two at once. No error on survivors, nothing lost, nothing twice.",
        lambda run: torture(run, "failover"),
        seconds=(120.0, 2400.0),
        form="cluster",
    ),
    Campaign(
        "failover-gluster",
        "The same with each server on a mount of its own of a GlusterFS volume; and mounts that hang, and "
        "the brick killed and started.",
        lambda run: torture(run, "failover-gluster"),
        gluster.why_absent,
        seconds=(120.0, 1500.0),
        form="cluster",
    ),
    Campaign(
        "failover-copies",
        "The same on a replicated GlusterFS volume, of two bricks and an arbiter: any of them is killed and "
        "comes again, alone and while the writer dies, is paused or hands over.",
        lambda run: torture(run, "failover-copies"),
        gluster.why_absent,
        seconds=(30.0, 900.0),
        form="cluster",
    ),
    Campaign(
        "failover-network",
        "Three servers on networks of their own, each cut off from the others, from its clients, from all; "
        "and packets between them delayed and lost.",
        lambda run: torture(run, "failover-network"),
        failover_network.why_absent,
        seconds=(60.0, 900.0),
        form="cluster",
    ),
)
