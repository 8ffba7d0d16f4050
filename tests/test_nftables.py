"""The nftables table on a real kernel; `nft` itself says what is in there."""

import asyncio
import errno
import re
import socket
import subprocess
from collections.abc import Coroutine, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import eventually

from pbrd import nftables
from pbrd.errors import KernelError
from pbrd.lab import Lab
from pbrd.nftables import CHANGED, Table, digest

TEXT = """\
table inet pbrd {
	set vip { type ipv4_addr; flags timeout; }
	map via { type ipv4_addr : mark; flags interval; elements = { 10.0.0.0/8 : 0x1, 11.0.0.0/8 : 0x2 } }
	chain fiber {
		meta mark set meta mark & 0xffff00ff | 0x00000100
	}
	chain prerouting {
		type filter hook prerouting priority mangle; policy accept;
		tcp dport { 80, 443 } counter goto fiber
		ip saddr @vip goto fiber
		iifname vmap { "fiber" : goto fiber, "lte" : accept }
	}
}
"""
OTHER = """\
table inet pbrd {
	chain output {
		type route hook output priority mangle; policy accept;
		counter
	}
}
"""
FOREIGN = """\
table inet docker {
	set ports { type inet_service; }
	chain forward {
		type filter hook forward priority filter; policy accept;
		tcp dport @ports counter
	}
}
"""


@pytest.fixture
def table(lab: Lab) -> Iterator[Table]:
    """Our table in the lab's router, listening; the test is inside too."""
    with lab.inside(lab.router), closing(Table()) as made:
        made.listen()
        yield made


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 20))


def nft(*commands: str) -> str:
    """Do what an administrator does: run `nft`, here inside the router."""
    given = "\n".join(commands)
    return subprocess.run(
        ["nft", "-a", "-f", "-"], input=given, text=True, capture_output=True, check=True
    ).stdout


def restarted() -> str | None:
    """What a daemon finds that starts now and has heard no events."""
    with closing(Table()) as made:
        return made.holds()


def test_the_kernel_holds_exactly_the_last_text(table: Table) -> None:
    assert table.holds() is None is digest("")
    run(table.replace(TEXT))
    assert table.holds() == digest(TEXT)
    assert "goto fiber" in nft("list table inet pbrd")
    run(table.replace(OTHER))
    assert table.holds() == digest(OTHER) != digest(TEXT)
    shown = nft("list table inet pbrd")
    assert "hook output" in shown
    assert "fiber" not in shown
    run(table.replace(""))
    assert table.holds() is None
    assert "pbrd" not in nft("list tables")
    run(table.replace(""))


def test_base_chains_stay_so_that_no_packet_is_judged_twice(table: Table) -> None:
    """Of a table that is deleted and made again in one go the kernel asks both chains for a while."""
    run(table.replace(TEXT))
    before = handle("chain prerouting")
    run(table.replace(TEXT.replace("tcp dport", "udp dport").replace("via", "by")))
    assert handle("chain prerouting") == before
    assert "map via" not in nft("list table inet pbrd")


def test_foreign_tables_stay_as_they_are(table: Table) -> None:
    nft(FOREIGN, "table ip pbrd { chain namesake { }; }")
    tables = ("inet docker", "ip pbrd")
    before = [nft(f"list table {name}") for name in tables]
    for text in (TEXT, OTHER, ""):
        run(table.replace(text))
    assert [nft(f"list table {name}") for name in tables] == before


def test_a_restart_finds_its_table(table: Table) -> None:
    run(table.replace(TEXT))
    nft(FOREIGN)
    assert restarted() == digest(TEXT)
    run(table.replace(OTHER))
    assert restarted() == digest(OTHER)


def handle(line: str) -> str:
    """The handle of the first line that has this in it."""
    found = re.search(rf"{re.escape(line)}.* # handle (\d+)", nft("list table inet pbrd"))
    assert found
    return found[1]


@pytest.mark.parametrize(
    "change",
    [
        "add rule inet pbrd prerouting counter",
        "insert rule inet pbrd fiber accept",
        "delete rule inet pbrd prerouting handle {handle}",
        "flush chain inet pbrd fiber",
        "flush table inet pbrd",
        "add chain inet pbrd more",
        "add set inet pbrd more {{ type mark; }}",
        "add counter inet pbrd more",
        "delete chain inet pbrd applied_{digest}",
        "delete table inet pbrd\nadd table inet pbrd",
        "add table inet pbrd {{ flags dormant; }}",
    ],
)
def test_what_others_change_is_noticed_also_after_a_restart(table: Table, change: str) -> None:
    run(table.replace(TEXT))
    nft(change.format(handle=handle("ip saddr @vip"), digest=digest(TEXT)))
    assert restarted() == CHANGED
    assert table.disturbed()
    assert table.holds() == CHANGED
    run(table.replace(TEXT))
    assert table.holds() == restarted() == digest(TEXT)
    assert not table.disturbed()


@pytest.mark.parametrize(
    "change",
    [
        "add element inet pbrd via {{ 12.0.0.0/8 : 0x3 }}",
        "delete element inet pbrd via {{ 10.0.0.0/8 }}",
        "flush set inet pbrd vip",
        "add chain inet pbrd prerouting {{ policy drop; }}",
        "replace rule inet pbrd prerouting handle {handle} ip saddr @vip accept",  # keeps its handle
    ],
)
def test_what_leaves_the_handles_as_they_are_is_noticed_while_we_run(table: Table, change: str) -> None:
    run(table.replace(TEXT))
    run(table.update("add element inet pbrd vip { 192.0.2.1 timeout 1h }"))
    nft(change.format(handle=handle("ip saddr @vip")))
    assert table.disturbed()
    assert not table.disturbed()
    assert table.holds() == CHANGED
    run(table.replace(TEXT))
    assert table.holds() == digest(TEXT)


@pytest.mark.parametrize("flush", ["flush ruleset", "delete table inet pbrd"])
def test_a_removed_table_is_noticed(table: Table, flush: str) -> None:
    run(table.replace(TEXT))
    nft(FOREIGN)
    nft(flush)
    assert table.disturbed()
    assert table.holds() is None


def test_our_own_changes_disturb_nobody(table: Table) -> None:
    async def work() -> None:
        await table.replace(TEXT)
        assert not table.disturbed()
        await table.update("add element inet pbrd vip { 192.0.2.1 timeout 1h }")
        await table.update("flush set inet pbrd vip\nadd element inet pbrd vip { 192.0.2.2 timeout 1h }")
        assert not table.disturbed()
        assert table.holds() == restarted() == digest(TEXT)
        await table.replace("")
        assert not table.disturbed()

    run(work())


def test_changes_of_foreign_tables_disturb_nobody(table: Table) -> None:
    run(table.replace(TEXT))
    nft(FOREIGN)
    nft(f"add element inet docker ports {{ {', '.join(map(str, range(1, 5000)))} }}")
    nft("table ip pbrd { chain namesake { }; }")
    nft("flush set inet docker ports")
    nft("delete table inet docker")
    assert not table.disturbed()
    assert table.holds() == digest(TEXT)


def test_a_foreign_transaction_that_touches_us_among_others_is_noticed(table: Table) -> None:
    run(table.replace(TEXT))
    ports = ", ".join(map(str, range(1, 5000)))
    nft(FOREIGN, f"add element inet docker ports {{ {ports} }}", "add element inet pbrd vip { 192.0.2.1 }")
    assert table.disturbed()
    assert table.holds() == CHANGED


def test_after_an_overflow_one_looks_again(table: Table) -> None:
    run(table.replace(TEXT))
    assert table.events is not None
    table.events.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    nft(FOREIGN)
    nft(f"add element inet docker ports {{ {', '.join(map(str, range(1, 5000)))} }}")
    assert table.disturbed()
    assert table.holds() == digest(TEXT)
    assert not table.disturbed()


@pytest.mark.parametrize("known", [True, False], ids=["host", "pid namespace"])
def test_own_changes_are_known_in_a_pid_namespace_too(table: Table, known: bool) -> None:
    assert table.pids_tell
    table.pids_tell = known
    run(table.replace(TEXT))
    assert not table.disturbed()
    nft("add rule inet pbrd prerouting counter")
    assert table.disturbed()


# --- sets of units ----------------------------------------------------------------------------

UNITS = """\
table inet pbrd {
	set unit_a.service { type cgroupsv2; }
	chain output {
		type route hook output priority mangle; policy accept;
		socket cgroupv2 level 2 @unit_a.service counter
	}
}
"""
MORE = UNITS.replace("counter", "accept").replace(
    "\tchain", "\tset unit_b.service { type cgroupsv2; }\n\tchain"
)
GONE = 1 << 40  # ids that no cgroup of this machine has: nft shows them as numbers


def elements(name: str) -> list[int]:
    shown = nft(f"list set inet pbrd {name}")
    found = re.search(r"elements = \{ ([^}]*) \}", shown)
    return sorted(map(int, found[1].split(","))) if found else []


def test_cgroups_are_put_into_a_units_set_and_taken_out_without_nft(table: Table) -> None:
    run(table.replace(UNITS))
    table.put("unit_a.service", [GONE, GONE + 1])
    table.put("unit_a.service", [GONE + 1, GONE + 2])
    assert elements("unit_a.service") == [GONE, GONE + 1, GONE + 2]
    table.take("unit_a.service", [GONE + 7, GONE])
    assert elements("unit_a.service") == [GONE + 1, GONE + 2]
    assert not table.disturbed()
    assert not table.stirred
    assert table.holds() == restarted() == digest(UNITS)


def test_a_set_that_is_not_there_is_told_apart(table: Table) -> None:
    for text in ("", OTHER):
        run(table.replace(text))
        with pytest.raises(KernelError) as caught:
            table.put("unit_a.service", [GONE])
        assert caught.value.errno == errno.ENOENT
        table.take("unit_a.service", [GONE])


def test_sets_of_units_stay_with_their_elements_when_the_table_is_replaced(table: Table) -> None:
    run(table.replace(UNITS))
    table.put("unit_a.service", [GONE])
    for text in (MORE, UNITS, MORE):
        run(table.replace(text))
        assert elements("unit_a.service") == [GONE]
        assert table.holds() == restarted() == digest(text)
    table.put("unit_b.service", [GONE])
    run(table.replace(UNITS))
    assert "unit_b" not in nft("list table inet pbrd")
    run(table.replace(OTHER))
    assert "unit_" not in nft("list table inet pbrd")


def test_what_others_do_to_elements_of_units_is_heard_and_no_change_of_the_table(table: Table) -> None:
    run(table.replace(UNITS))
    table.put("unit_a.service", [GONE])
    nft("flush set inet pbrd unit_a.service")
    assert not table.disturbed()
    assert table.stirred
    assert table.holds() == restarted() == digest(UNITS)


def test_what_others_do_to_a_set_itself_is_a_change(table: Table) -> None:
    run(table.replace(UNITS))
    nft("add set inet pbrd unit_c.service { type cgroupsv2; }")
    assert table.disturbed()
    assert table.holds() == restarted() == CHANGED


# --- what goes wrong --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "table inet pbrd {\n\tchain a {\n\t\ttcp dport 80 blub\n\t}\n}\n",
            "cannot change nftables: syntax error, unexpected newline, in: tcp dport 80 blub",
        ),
        (
            "table inet pbrd {\n\tchain a {\n\t\tjump nowhere\n\t}\n}\n",
            "cannot change nftables: No such file or directory",
        ),
        (
            "table inet pbrd {\n\tchain a {\n\t\tip saddr { " + "1.1.1.1, " * 500 + "x! }\n\t}\n}\n",
            "cannot change nftables: syntax error, unexpected !, ",
        ),
    ],
    ids=["syntax", "kernel", "long line"],
)
def test_a_refused_text_says_why_and_changes_nothing(table: Table, text: str, words: str) -> None:
    run(table.replace(OTHER))
    with pytest.raises(KernelError) as caught:
        run(table.replace(text))
    assert str(caught.value).startswith(words)
    assert len(str(caught.value)) < 300
    assert "\n" not in str(caught.value)
    assert table.holds() == digest(OTHER)
    assert not table.disturbed()


def test_without_nft_it_says_what_to_install(
    table: Table, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert table.holds() is None  # to look one needs no nft
    with pytest.raises(KernelError, match=r"nft is not installed \(apt-get install nftables\)"):
        run(table.replace(TEXT))


@pytest.fixture
def slow_nft(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An `nft` that never ends; the file that this names has its pid."""
    pid = tmp_path / "pid"
    (tmp_path / "nft").write_text(f"#!/bin/sh\necho $$ > {pid}.new\nmv {pid}.new {pid}\nexec sleep 60\n")
    (tmp_path / "nft").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    return pid


def test_an_nft_that_hangs_is_ended(table: Table, slow_nft: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nftables, "DEADLINE", 0.5)
    with pytest.raises(KernelError, match=r"nft takes longer than 0.5 s") as caught:
        run(table.replace(TEXT))
    assert caught.value.errno == errno.ETIMEDOUT
    assert not Path("/proc", slow_nft.read_text().strip()).exists()


def test_who_stops_waiting_leaves_no_nft_behind(table: Table, slow_nft: Path) -> None:
    async def work() -> None:
        task = asyncio.create_task(table.replace(TEXT))
        await asyncio.to_thread(eventually, slow_nft.exists)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(work())
    assert not Path("/proc", slow_nft.read_text().strip()).exists()


# --- packets ----------------------------------------------------------------------------------

MARKED = """\
table inet pbrd {{
	chain any {{
		meta mark set 0x1 comment "{}"
	}}
	chain prerouting {{
		type filter hook prerouting priority mangle; policy accept;
		jump any
	}}
}}
"""
WITNESS = """\
table inet witness {
	chain after {
		type filter hook prerouting priority filter; policy accept;
		iifname "lan" meta l4proto udp counter comment "all"
		iifname "lan" meta l4proto udp meta mark != 0x1 counter comment "missed"
	}
}
"""


def test_no_packet_sees_the_kernel_without_a_table(lab: Lab, table: Table) -> None:
    def count(what: str) -> int:
        found = re.search(
            rf'counter packets (\d+) bytes \d+ comment "{what}"', nft("list table inet witness")
        )
        assert found
        return int(found[1])

    async def work() -> None:
        for number in range(50):
            await table.replace(MARKED.format(number))

    run(table.replace(MARKED.format("first")))
    nft(WITNESS)
    stream = lab.traffic(rate=2000)
    run(work())
    result = stream.stop()
    assert result.lost == 0
    assert count("all") >= 500
    assert count("missed") == 0
