"""What came in is answered where it came in, whatever policies say and whichever other uplink is down."""

import socket
import time
from contextlib import closing

import pytest
from conftest import HEAD, PROBE, UPLINKS, MakeLab, StartDaemon, all_up, eventually, goes_by
from test_nat import connected, served, talks

from pbrd.lab import LAN, TARGETS, Lab

NAT = UPLINKS.replace('"fiber"', '"fiber"\ngateway = "10.0.1.1"\nnat = true').replace(
    '"lte"', '"lte"\ngateway = "10.0.2.1"\nnat = true'
)
DEFAULT = '[default]\nvia = ["fiber", "lte"]\n'
QUIET = HEAD + "[probe]\ntargets = []\n"


def secret(match: str) -> str:
    """By lte or not at all."""
    policy = f'[[policies]]\nname = "secret"\nmatch = {match}\nvia = ["lte"]\nfallback = "unreachable"\n'
    return HEAD + PROBE + NAT + policy + DEFAULT


def test_services_of_this_machine_answer_while_its_own_traffic_may_not_leave(
    lab: Lab, daemon: StartDaemon
) -> None:
    pbrd = daemon(lab, secret('{ iif = "lo" }'))
    eventually(lambda: all_up(pbrd))
    address = lab.uplinks[0].address
    with served(lab, lab.router, "0.0.0.0", 22) as server:
        client = connected(lab, lab.net, "", address, 22)
        peer, _ = server.accept()
        peer.settimeout(3)
        with client, peer:
            lab.carrier(1, False)
            eventually(lambda: pbrd.uplink("lte")["state"] == "down")
            assert talks(client, peer)
        again = connected(lab, lab.net, "", address, 22)
        again.close()
    with lab.inside(lab.router):
        service = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lab.inside(lab.net):
        asking = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with service, asking:
        service.bind((address, 53))
        for one in (service, asking):
            one.settimeout(2)
        asking.sendto(b"question", (address, 53))
        _, who = service.recvfrom(10)
        service.sendto(b"answer", who)
        assert asking.recv(10) == b"answer"
    assert lab.exit_of(local=True, within=0.3) is None


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
def test_a_port_forward_works_while_its_host_may_not_leave(
    make_lab: MakeLab, daemon: StartDaemon, rp_filter: int
) -> None:
    lab = make_lab(rp_filter=rp_filter)
    pbrd = daemon(lab, secret(f'{{ from = "{LAN[2]}" }}'))
    eventually(lambda: all_up(pbrd))
    lab.nft(
        lab.router,
        f"""table ip forward {{ chain pre {{ type nat hook prerouting priority dstnat;
        tcp dport 8443 dnat to {LAN[2]}:443; }}; }}""",
    )
    lab.carrier(1, False)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    with served(lab, lab.lan, LAN[2], 443) as server:
        client = connected(lab, lab.net, "", lab.uplinks[0].address, 8443)
        peer, _ = server.accept()
        with client, peer:
            assert talks(client, peer)


@pytest.mark.parametrize("rp_filter", [0, 1, 2])
@pytest.mark.parametrize("way", ['via = ["lte", "fiber"]', "balance = { fiber = 1, lte = 1 }"])
def test_answers_come_through_where_main_has_no_default(
    make_lab: MakeLab, daemon: StartDaemon, way: str, rp_filter: int
) -> None:
    lab = make_lab(rp_filter=rp_filter, defaults=False)
    pbrd = daemon(lab, QUIET + NAT + f'[[policies]]\nname = "lan"\nmatch = {{ iif = "lan" }}\n{way}\n')
    eventually(lambda: all_up(pbrd))
    with served(lab, lab.net, TARGETS[0], 8080) as server:
        client = connected(lab, lab.lan, LAN[0], TARGETS[0], 8080)
        peer, _ = server.accept()
        with client, peer:
            assert talks(client, peer)


@pytest.mark.parametrize("fault", ["carrier", "silence"])
def test_what_others_bound_to_an_address_begins_anew_when_its_uplink_dies(
    lab: Lab, daemon: StartDaemon, fault: str
) -> None:
    """NAT of the administrator's own, `snat to ADDRESS`: busy all the time."""
    policy = '[[policies]]\nname = "p"\nmatch = { mac = "52:54:00:00:00:01" }\nvia = ["fiber"]\n'
    pbrd = daemon(lab, HEAD + PROBE + UPLINKS + policy + DEFAULT)
    fiber, lte = (uplink.address for uplink in lab.uplinks)
    lab.nft(
        lab.router,
        f"""table ip mine {{ chain post {{ type nat hook postrouting priority srcnat;
        oifname "fiber" snat to {fiber}; oifname "lte" snat to {lte}; }}; }}""",
    )
    eventually(lambda: all_up(pbrd))
    wrong, right = (lab.counter(f"ip saddr {address} meta l4proto udp") for address in (fiber, lte))
    stream = lab.traffic(rate=500)
    getattr(lab, fault)(0, fault == "silence")
    eventually(lambda: goes_by(pbrd, "lte"))
    eventually(lambda: right.read()["lte"] > 0)
    before = wrong.read()["lte"]
    eventually(lambda: right.read()["lte"] > 200)
    stream.stop()
    assert wrong.read()["lte"] == before


def test_what_a_specific_route_sends_by_an_uplink_without_nat_is_left_alone(
    make_lab: MakeLab, daemon: StartDaemon
) -> None:
    """A firewall that knows only established connections would tell if one were forgotten."""
    lab = make_lab(("fiber", "vpn"))
    lab.ip(lab.router, f"route add {TARGETS[1]}/32 via 10.0.2.1 dev vpn")
    lab.nft(
        lab.router,
        """table inet fw { chain f { type filter hook forward priority 0; policy drop;
        ct state established,related accept; iifname "lan" accept; }; }""",
    )
    uplinks = '[uplinks.fiber]\ninterface = "fiber"\nnat = true\n[uplinks.vpn]\ninterface = "vpn"\n'
    policies = '[[policies]]\nname = "p{}"\nmatch = {{ from = "10.{}.0.0/16" }}\nvia = ["fiber"]\n'
    config = QUIET + uplinks + '[default]\nvia = ["fiber"]\n'
    pbrd = daemon(lab, config)
    eventually(lambda: all_up(pbrd))
    with served(lab, lab.net, TARGETS[1], 8080) as server:
        client = connected(lab, lab.lan, LAN[0], TARGETS[1], 8080)
        peer, _ = server.accept()
        with closing(client), closing(peer):
            assert talks(client, peer)
            assert pbrd.reload(config + policies.format(1, 1)).returncode == 0
            for _ in range(8):
                time.sleep(
                    0.2
                )  # the sweeps for what lost its NAT come a tenth of a second and a second later
                peer.sendall(b"data")
                assert client.recv(4) == b"data"


@pytest.mark.parametrize("fault", ["carrier", "silence"])
def test_a_busy_flow_moves_from_an_uplink_without_nat_to_one_with_it(
    lab: Lab, daemon: StartDaemon, fault: str
) -> None:
    """A packet between the loss of the route and the eviction must not hide the connection from it."""
    uplinks = UPLINKS.replace('"lte"', '"lte"\nnat = true')
    pbrd = daemon(lab, HEAD + PROBE + uplinks + DEFAULT)
    eventually(lambda: all_up(pbrd))
    masqueraded = lab.counter(f"ip saddr {lab.uplinks[1].address} meta l4proto udp")
    stream = lab.traffic(rate=500)
    time.sleep(2)  # the sweeps of the start are over, but for one a minute
    getattr(lab, fault)(0, fault == "silence")
    eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
    eventually(lambda: masqueraded.read()["lte"] > 20, within=4)
    stream.stop()


def test_what_waited_for_an_uplink_goes_on_by_the_first_that_heals(lab: Lab, daemon: StartDaemon) -> None:
    uplinks = UPLINKS.replace('"lte"', '"lte"\nnat = true')
    pbrd = daemon(lab, HEAD + PROBE + uplinks + DEFAULT)
    eventually(lambda: all_up(pbrd))
    masqueraded = lab.counter(f"ip saddr {lab.uplinks[1].address} meta l4proto udp")
    stream = lab.traffic(rate=200)
    lab.silence(1)
    eventually(lambda: pbrd.uplink("lte")["state"] == "down")
    lab.silence(0)
    eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
    lab.silence(1, False)
    eventually(lambda: pbrd.uplink("lte")["state"] in ("up", "recovering"))
    eventually(lambda: masqueraded.read()["lte"] > 20, within=4)
    stream.stop()


def test_who_connects_from_the_lan_to_the_address_of_a_dead_uplink_is_not_cut_off(
    lab: Lab, daemon: StartDaemon
) -> None:
    """An administrator by SSH, who uses the public name."""
    pbrd = daemon(lab, HEAD + PROBE + NAT + DEFAULT)
    eventually(lambda: all_up(pbrd))
    address = lab.uplinks[0].address
    with served(lab, lab.router, address, 22) as server:
        client = connected(lab, lab.lan, LAN[0], address, 22)
        peer, _ = server.accept()
        with client, peer:
            lab.silence(0)
            eventually(lambda: pbrd.uplink("fiber")["state"] == "down")
            time.sleep(0.5)
            assert talks(client, peer)
