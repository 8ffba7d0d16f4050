"""What the kernel's rules can't say: nftables judges, with real packets."""

from pathlib import Path

import pytest
from conftest import HEAD, PROBE, UPLINKS, StartDaemon, all_up, eventually

from pbrd.lab import LAN, LAN6, TARGETS, TARGETS6, Lab

BASE = HEAD + "[probe]\ntargets = []\n" + UPLINKS
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'


def policy(match: str, via: str = 'via = ["lte"]', more: str = "", name: str = "one") -> str:
    return f'[[policies]]\nname = "{name}"\nmatch = {match}\n{via}\n{more}\n'


def mac(lab: Lab, space: str) -> str:
    return lab.run(space, "cat", "/sys/class/net/eth0/address").stdout.strip()


@pytest.mark.parametrize(
    ("match", "hit", "miss"),
    [
        ("{ group = 'daemon' }", {"local": True, "gid": 1}, {"local": True, "gid": 2}),
        ("{ proto = 'udp', dport = '60000-65535' }", {"dport": 65535}, {"dport": 59999}),
        (
            "{ proto = 'tcp', sport = 65535 }",
            {"proto": "tcp", "sport": 65535},
            {"proto": "tcp", "sport": 65534},
        ),
    ],
)
def test_a_selector_takes_what_it_says(
    lab: Lab, daemon: StartDaemon, match: str, hit: dict[str, object], miss: dict[str, object]
) -> None:
    pbrd = daemon(lab, BASE + DEFAULT)
    rules = lab.run(lab.router, "ip", "rule").stdout
    assert pbrd.reload(BASE + policy(match) + DEFAULT).returncode == 0
    assert lab.exit_of(**hit) == "lte"  # type: ignore[arg-type]
    assert lab.exit_of(**miss) == "fiber"  # type: ignore[arg-type]
    assert pbrd.reload(BASE + DEFAULT).returncode == 0
    assert lab.run(lab.router, "ip", "rule").stdout == rules
    assert lab.nft(lab.router, "list ruleset") == ""


@pytest.mark.parametrize("source", [LAN[0], LAN6[0]], ids=["ipv4", "ipv6"])
def test_mac(lab: Lab, daemon: StartDaemon, source: str) -> None:
    daemon(lab, BASE + policy(f"{{ mac = '{mac(lab, lab.lan).upper()}' }}") + DEFAULT)
    assert lab.exit_of(src=source) == "lte"
    assert lab.exit_of(local=True) == "fiber"


def test_thousands_of_prefixes_from_a_file(lab: Lab, daemon: StartDaemon, tmp_path: Path) -> None:
    file = tmp_path / "nets"
    lines = [f"10.{n >> 8}.{n & 255}.0/24" for n in range(5000)] + [f"{TARGETS[1]}/32", TARGETS6[1]]
    file.write_text("# a list\n" + "\n".join(lines))
    pbrd = daemon(lab, BASE + policy(f"{{ to_file = '{file}' }}") + DEFAULT)
    assert lab.exit_of(dst=TARGETS[1]) == lab.exit_of(dst=TARGETS[1], local=True) == "lte"
    assert lab.exit_of(src=LAN6[0], dst=TARGETS6[1]) == "lte"
    assert lab.exit_of(dst=TARGETS[0]) == "fiber"
    assert len(lab.run(lab.router, "ip", "rule").stdout.splitlines()) < 40
    file.write_text("\n".join([*lines[:-2], TARGETS[0]]))
    assert pbrd.command("reload").returncode == 0
    assert lab.exit_of(dst=TARGETS[0]) == "lte"
    assert lab.exit_of(dst=TARGETS[1]) == "fiber"


def test_the_order_of_the_file_decides_whatever_the_kind(lab: Lab, daemon: StartDaemon) -> None:
    rule = policy(f"{{ from = '{LAN[0]}' }}", 'via = ["fiber"]', name="rule")
    judged = policy(f"{{ mac = '{mac(lab, lab.lan)}' }}", name="judged")
    pbrd = daemon(lab, BASE + rule + judged)
    assert lab.exit_of(src=LAN[0]) == "fiber"
    assert lab.exit_of(src=LAN[1]) == "lte"
    pbrd.reload(BASE + judged + rule)
    assert lab.exit_of(src=LAN[0]) == "lte"


def test_next_goes_on_to_the_policies_below_whatever_their_kind(lab: Lab, daemon: StartDaemon) -> None:
    """A dead first choice must not hide a kill switch further down."""
    first = policy(f"{{ mac = '{mac(lab, lab.lan)}' }}", name="first")
    second = policy(f"{{ from = '{LAN[1]}' }}", 'via = ["lte"]\nfallback = "unreachable"', name="second")
    daemon(lab, BASE + first + second + DEFAULT)
    leaks = lab.counter(f"ip saddr {LAN[1]}")
    assert lab.exit_of(src=LAN[1]) == "lte"
    lab.carrier(1, False)
    assert lab.exit_of(src=LAN[1], within=0.3) is None
    assert lab.exit_of(src=LAN[0]) == "fiber"
    assert leaks.read()["fiber"] == 0


def test_override_main_also_where_nftables_judges(lab: Lab, daemon: StartDaemon) -> None:
    lab.ip(lab.router, f"route add {TARGETS[1]} via {lab.uplinks[0].gateway}")
    pbrd = daemon(lab, BASE + policy(f"{{ mac = '{mac(lab, lab.lan)}' }}"))
    assert lab.exit_of(dst=TARGETS[1]) == "fiber"
    pbrd.reload(BASE + policy(f"{{ mac = '{mac(lab, lab.lan)}', override_main = true }}"))
    assert lab.exit_of(dst=TARGETS[1]) == "lte"


def test_balance_shares_by_weight_and_spreads_what_a_dead_uplink_had(lab: Lab, daemon: StartDaemon) -> None:
    text = HEAD + PROBE + UPLINKS + policy("{ iif = 'lan' }", "balance = { fiber = 3, lte = 1 }")
    pbrd = daemon(lab, text)
    eventually(lambda: all_up(pbrd))
    assert pbrd.policy("one")["shares"] == {"fiber": 0.75, "lte": 0.25}
    went = [lab.exit_of(dport=1000 + n) for n in range(400)]
    assert set(went) == {"fiber", "lte"}
    assert 250 < went.count("fiber") < 350
    lab.carrier(0, False)
    eventually(lambda: pbrd.policy("one")["shares"] == {"lte": 1.0})
    assert {lab.exit_of(dport=1000 + n) for n in range(50)} == {"lte"}
    assert pbrd.policy("one")["state"] == "failed-over"


def test_a_sticky_client_keeps_its_uplink(lab: Lab, daemon: StartDaemon) -> None:
    text = BASE + policy("{ iif = 'lan' }", "balance = { fiber = 1, lte = 1 }", 'sticky = "source"')
    daemon(lab, text)
    for source in (*LAN, *LAN6):
        target = TARGETS6[0] if ":" in source else TARGETS[0]
        assert len({lab.exit_of(src=source, dst=target, dport=1000 + n) for n in range(20)}) == 1


def test_many_policies_make_few_rules(lab: Lab, daemon: StartDaemon) -> None:
    many = "".join(
        policy(
            f"{{ to = '10.{n >> 8}.{n & 255}.0/24' }}", f"via = ['{('lte', 'fiber')[n % 2]}']", name=f"p{n}"
        )
        for n in range(1000)
    )
    last = policy(f"{{ from = '{LAN[1]}' }}", name="last")
    daemon(lab, BASE + many + last + DEFAULT)
    assert len(lab.run(lab.router, "ip", "rule").stdout.splitlines()) < 60
    assert lab.exit_of(src=LAN[1]) == "lte"
    assert lab.exit_of(src=LAN[0]) == "fiber"


@pytest.mark.parametrize("family", ["ipv4", "ipv6"])
def test_who_comes_by_one_uplink_and_leaves_by_another_is_judged(
    lab: Lab, daemon: StartDaemon, family: str
) -> None:
    """Clients behind a tunnel that is an uplink itself; however many policies there are."""
    tunnel = '[uplinks.tunnel]\ninterface = "lan"\ngateway = "none"\ngateway6 = "none"\n'
    many = "".join(policy(f"{{ to = '10.{n}.0.0/16' }}", name=f"p{n}") for n in range(250))
    client = policy("{ iif = 'lan' }", more="fallback = 'unreachable'", name="clients")
    pbrd = daemon(lab, BASE + tunnel + many + client + DEFAULT)
    source, target = (LAN6[0], TARGETS6[0]) if family == "ipv6" else (LAN[0], TARGETS[0])
    assert lab.exit_of(src=source, dst=target) == "lte"
    lab.carrier(1, up=False)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    assert lab.exit_of(src=source, dst=target) is None


@pytest.mark.parametrize(("source", "target"), [(LAN[0], TARGETS[0]), (LAN6[0], TARGETS6[0])])
def test_a_group_with_one_port_of_each_side_is_skipped_only_by_who_has_neither(
    lab: Lab, daemon: StartDaemon, source: str, target: str
) -> None:
    """nft makes one comparison of two ports: "neither" became "not both", and a kill switch was skipped."""
    one = policy("{ proto = 'udp', sport = 22 }", 'via = ["fiber"]', name="one")
    secret = policy("{ proto = 'udp', dport = 36 }", name="secret")
    others = "".join(
        policy(f"{{ mac = '52:54:00:00:00:{n:02x}' }}", 'via = ["fiber"]', name=f"m{n}") for n in range(40)
    )
    daemon(lab, BASE + one + secret + others + DEFAULT)
    assert lab.exit_of(src=source, dst=target, dport=36) == "lte"
    assert lab.exit_of(src=source, dst=target, sport=22, dport=36) == "fiber"
    assert lab.exit_of(src=source, dst=target, dport=37) == "fiber"
