"""The status document (`status.to_json`, or what came over the wire) for people: tables, one line, exit code.

Plain ANSI by hand: rich draws no better table of ten columns, but importing it takes 40 to 60 ms, more than
everything else that `pbrd status` does. Missing fields show as "-", so that a command of one
version can show the document of a daemon of another.
"""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from pbrd.printable import printable

Document = dict[str, Any]
History = Mapping[str, Sequence[float | None]]  # uplink → round trips in ms, oldest first; None is lost
Cell = tuple[str, str]  # text, name of a colour ("" is none)

COLOURS = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "cyan": "36"}
STATE_COLOURS = {
    "up": "green",
    "preferred": "green",
    "recovering": "yellow",
    "degraded": "yellow",
    "failed-over": "yellow",
    "starting": "cyan",
    "down": "red",
    "fallback": "red",
    "drained": "dim",
    "disabled": "dim",
}
BARS = "▁▂▃▄▅▆▇█"
LOST = "×"
UPLINK_HEAD = ("UPLINK", "INTERFACE", "STATE", "REASON", "SINCE", "RTT", "JITTER", "LOSS", "GATEWAYS")
POLICY_HEAD = ("POLICY", "VIA", "GOES TO", "STATE", "WHY", "SINCE")
NAMED_IN_LINE = 6  # uplinks; with more than that, `line` only names those that aren't up


def exit_code(document: Document) -> int:
    """Return 4 if an uplink is down (not: drained or disabled) or a policy in fallback, else 0."""
    down = any(uplink.get("state") == "down" for uplink in document.get("uplinks", ()))
    fallback = any(policy.get("state") == "fallback" for policy in document.get("policies", ()))
    return 4 if down or fallback else 0


def line(document: Document, now: datetime | None = None) -> str:
    """Return the one line that systemd shows (STATUS=): "fiber up 11 ms, lte down (probes) since 17:43 · …".

    With `now`, a `since` of another day shows its date.
    """
    uplinks = document.get("uplinks", ())
    named = [uplink for uplink in uplinks if len(uplinks) <= NAMED_IN_LINE or uplink.get("state") != "up"]
    words = [_uplink_words(uplink, now) for uplink in named]
    if len(named) < len(uplinks):
        words.insert(0, f"{len(uplinks) - len(named)} uplinks up")
    parts = [", ".join(words) or "no uplinks"]
    if document.get("paused"):
        parts.insert(0, "paused")
    for state, remark in (("failed-over", "failed over"), ("fallback", "in fallback")):
        count = sum(policy.get("state") == state for policy in document.get("policies", ()))
        if count:
            parts.append(f"{count} {'policy' if count == 1 else 'policies'} {remark}")
    return " · ".join(parts)


def table(document: Document, now: datetime, *, colour: bool = False, history: History | None = None) -> str:
    """Return the whole status as text without a final newline.

    `now` (with a time zone, in which times are shown) gives the ages; `history` adds a sparkline of round
    trips for each uplink.
    """
    head = UPLINK_HEAD if history is None else (*UPLINK_HEAD[:4], "HISTORY", *UPLINK_HEAD[4:])
    uplinks = [_uplink_row(uplink, now, history) for uplink in document.get("uplinks", ())]
    policies = [_policy_row(policy, now) for policy in document.get("policies", ())]
    blocks = [
        _summary(document, now, colour),
        _columns(head, uplinks, colour),
        _columns(POLICY_HEAD, policies, colour) if policies else "",
        _remarks(document, now, colour),
    ]
    return "\n\n".join(block for block in blocks if block)


def sparkline(values: Sequence[float | None]) -> str:
    """Return a bar for each value, the largest full height, and a cross for each loss."""
    top = max((value for value in values if value is not None), default=0.0)
    return "".join(LOST if value is None else BARS[_height(value, top)] for value in values)


def _height(value: float, top: float) -> int:
    return min(len(BARS) - 1, int(value / top * len(BARS))) if top > 0 else 0


def _uplink_words(uplink: Document, now: datetime | None) -> str:
    state = uplink.get("state", "-")
    words = f"{uplink.get('name', '-')} {state}"
    rtt = (uplink.get("probe") or {}).get("rtt_ms")
    if state == "up":
        return words if rtt is None else f"{words} {rtt:.{0 if rtt >= 10 else 1}f} ms"
    reason = uplink.get("reason", "ok")
    why = "" if reason in ("ok", state) else f" ({reason})"
    return f"{words}{why} since {_clock(uplink.get('since'), now, seconds=False)}"


def _summary(document: Document, now: datetime, colour: bool) -> str:
    text = (
        f"pbrd {document.get('version', '-')}  pid {document.get('pid', '-')}  "
        f"generation {document.get('generation', '-')}  {document.get('config', '-')}"
    )
    lines = [_paint((printable(text), "dim"), colour)]
    if document.get("paused"):
        since = document.get("paused_since")
        at = f" at {printable(_since(since, now))}" if since else ""
        remark = f"paused: pbrd let go of the kernel{at}; `pbrd reload` takes over again"
        lines.append(_paint((remark, "yellow"), colour))
    return "\n".join(lines)


def _uplink_row(uplink: Document, now: datetime, history: History | None) -> list[Cell]:
    state = uplink.get("state", "-")
    probe = uplink.get("probe") or {}
    loss = probe.get("loss")
    if probe.get("rtt_ms") is None and not loss:
        loss = None  # nothing is lost of what has not been answered yet, and "0 %" would sound well
    row = [
        (uplink.get("name", "-"), "bold"),
        (uplink.get("interface", "-") + (" (metered)" if uplink.get("metered") else ""), ""),
        (state, STATE_COLOURS.get(state, "")),
        (uplink.get("reason", "-"), ""),
        (_since(uplink.get("since"), now), ""),
        (_milliseconds(probe.get("rtt_ms")), ""),
        (_milliseconds(probe.get("jitter_ms")), ""),
        ("-" if loss is None else f"{loss * 100:.3g} %", "red" if loss else ""),
        (", ".join(filter(None, (_gateway(uplink.get(f)) for f in ("ipv4", "ipv6")))) or "-", ""),
    ]
    if history is not None:
        row.insert(
            4, (sparkline(history.get(uplink.get("name", "-"), ())), "cyan")
        )  # terminals cut at the end
    return row


def _gateway(family: Document | None) -> str:
    """Return "192.168.1.1 (dhcp)"; the state is added where it does not go without saying."""
    if family is None:
        return ""
    remarks = [family.get("source"), family.get("state") if family.get("state") != "up" else None]
    inside = ", ".join(remark for remark in remarks if remark)
    return (family.get("gateway") or "no gateway") + (f" ({inside})" if inside else "")


def _policy_row(policy: Document, now: datetime) -> list[Cell]:
    state = policy.get("state", "-")
    return [
        (policy.get("name", "-"), "bold"),
        (",".join(policy.get("via", ())) or "-", ""),
        (_goes_to(policy), ""),
        (state, STATE_COLOURS.get(state, "")),
        (policy.get("reason") or "-", ""),
        (_since(policy.get("since"), now), ""),
    ]


def _goes_to(policy: Document) -> str:
    """Return the uplink, the shares, or what the fallback does; each family where they differ."""
    shares = policy.get("shares")
    if shares:
        return " ".join(f"{name} {share * 100:.3g}%" for name, share in shares.items())
    if policy.get("state") == "inactive":
        return "-"
    behind = "main table" if policy.get("name") == "default" else "the next policy"
    nowhere = {"next": behind}.get(policy.get("fallback", "-"), policy.get("fallback", "-"))
    families = policy.get("families") or {}
    chosen = {family: uplink for family, uplink in families.items() if uplink}
    if len(set(chosen.values())) > 1:
        return ", ".join(f"{uplink} ({family})" for family, uplink in chosen.items())
    return str(policy.get("active") or nowhere)


def _remarks(document: Document, now: datetime, colour: bool) -> str:
    lines = []
    repairs = document.get("drift_repairs")
    if repairs:
        times = "once" if repairs == 1 else f"{repairs} times"
        lines.append(f"put back {times}: rules or routes of pbrd that others had changed")
    reload = document.get("last_reload")
    if reload and not reload.get("ok", True):
        at = printable(_since(reload.get("at"), now))
        lines.append(
            _paint((f"the last reload was refused at {at}; the config before it is in force:", "red"), colour)
        )
        lines += [f"  {printable(problem)}" for problem in str(reload.get("error") or "").splitlines()]
    return "\n".join(lines)


def _columns(head: Sequence[str], rows: Sequence[Sequence[Cell]], colour: bool) -> str:
    """Return the rows under their head, two spaces between columns, nothing behind the last one."""
    table = [[(title, "dim") for title in head], *([(printable(t), c) for t, c in row] for row in rows)]
    widths = [max(len(text) for text, _ in column) for column in zip(*table, strict=True)]
    return "\n".join(_row(row, widths, colour) for row in table)


def _row(row: Sequence[Cell], widths: Sequence[int], colour: bool) -> str:
    last = len(row) - 1
    cells = (
        _paint(cell, colour) + " " * (0 if i == last else width - len(cell[0]) + 2)
        for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    return "".join(cells).rstrip()


def _paint(cell: Cell, colour: bool) -> str:
    text, name = cell
    return f"\x1b[{COLOURS[name]}m{text}\x1b[0m" if colour and name and text else text


def _milliseconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f} ms" if value >= 100 else f"{value:.3g} ms"


def _since(text: str | None, now: datetime) -> str:
    """Return the local time and the age: "17:43:48 (5m12s)"."""
    clock = _clock(text, now, seconds=True)
    moment = _moment(text)
    return clock if moment is None else f"{clock} ({age((now - moment).total_seconds())})"


def _clock(text: str | None, now: datetime | None, *, seconds: bool) -> str:
    """Return the time of day, in the time zone of `now`, with its date if that was another day."""
    moment = _moment(text)
    if moment is None:
        return text or "-"
    local = moment.astimezone(None if now is None else now.tzinfo)
    clock = local.strftime("%H:%M:%S" if seconds else "%H:%M")
    return clock if now is None or local.date() == now.date() else f"{local:%Y-%m-%d} {clock}"


def _moment(text: str | None) -> datetime | None:
    try:
        moment = datetime.fromisoformat(text or "")
    except ValueError:
        return None
    return moment if moment.tzinfo is not None else None


def age(seconds: float) -> str:
    """Return a length of time in its two largest units: "3d4h", "2h3m", "5m12s", "7s"; never negative."""
    left = max(0, int(seconds))
    units = (("d", 86400), ("h", 3600), ("m", 60), ("s", 1))
    first = next((place for place, (_, size) in enumerate(units) if left >= size), len(units) - 1)
    text = ""
    for unit, size in units[first : first + 2]:
        count, left = divmod(left, size)
        text += f"{count}{unit}"
    return text
