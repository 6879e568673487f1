"""A writer that beats on the mount, and that the other servers cannot reach (F5)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.servers import Cluster
from tests.reference import OK
from tests.servers import Wire
from tests.torture.failover_network import CLIENTS, SERVERS, Network, why_absent


@pytest.fixture
def network() -> Iterator[Network]:
    if reason := why_absent():
        pytest.skip(reason)
    with Network(3) as network:
        yield network


def test_a_writer_that_both_others_cannot_reach_is_replaced_and_their_clients_only_wait(
    tmp_path: Path, network: Network
) -> None:
    with Cluster(tmp_path / "index", takeover_after=1.0) as cluster:
        seats = {}
        for seat in range(3):
            member = cluster.launch(
                cluster=f"{network.address(seat, SERVERS)}:0",
                listen=f"{network.address(seat, CLIENTS)}:0",
                inside=network.inside(seat),
            )
            member.wait_for("serving")
            seats[member] = seat
        writer, *followers = cluster.members
        with Wire(followers[0].address) as one, Wire(followers[1].address) as two:
            assert one.ask(b"INDEX|a|") == OK
            network.cut(seats[writer], SERVERS)
            assert one.ask(b"INDEX|b|a") == OK
            assert two.ask(b"INDEX|c|b") == OK
            assert {member.role for member in followers} == {"writer", "follower"}
            network.mend(seats[writer], SERVERS)
            writer.wait_for_role("follower")
            with Wire(writer.address) as old:
                assert old.ask(b"INDEX|d|c") == OK
