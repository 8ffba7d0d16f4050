#!/usr/bin/env python3
"""table.py FILE.json... : Markdown tables from what run.py wrote; median (min-max) of the runs."""

import json
import statistics
import sys
from collections import defaultdict


def spread(values, digits=0):
    values = [v for v in values if v is not None]
    if not values:
        return "-"
    low, mid, high = (f"{v:.{digits}f}" for v in (min(values), statistics.median(values), max(values)))
    return mid if low == high else f"{mid} ({low}-{high})"


def table(head, rows):
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    for row in rows:
        print("| " + " | ".join(str(c) for c in row) + " |")
    print()


def get(runs, key):
    return [r.get(key) for r in runs]


def mid(runs, key):
    return statistics.median([v for v in get(runs, key) if v is not None] or [9e9])


def main():
    groups = defaultdict(list)
    for path in sys.argv[1:]:
        with open(path) as f:
            for line in f:
                run = json.loads(line)
                groups[run["fault"], run["profile"], run["peer"]].append(run)
    for fault, profile in sorted({key[:2] for key in groups}):
        mine = [(key[2], runs) for key, runs in groups.items() if key[:2] == (fault, profile)]
        print(f"### {fault}, {profile} {mine[0][1][0]['settings']}\n")
        if fault == "idle":
            table(
                ["peer", "CPU s/h", "probes/s", "CPU us/probe", "RSS KiB", "PSS KiB"],
                [
                    [p]
                    + [
                        spread(get(r, k), d)
                        for k, d in (
                            ("cpu_s_per_hour", 1),
                            ("probes_per_s", 2),
                            ("cpu_us_per_probe", 0),
                            ("rss_kb", 0),
                            ("pss_kb", 0),
                        )
                    ]
                    for p, r in sorted(mine, key=lambda m: mid(m[1], "cpu_s_per_hour"))
                ],
            )
        elif fault == "loss":
            table(
                ["peer", "runs", "seconds", "switches", "packets lost %"],
                [
                    [
                        p,
                        len(r),
                        spread(get(r, "seconds")),
                        spread(get(r, "switches")),
                        spread(get(r, "lost_percent"), 1),
                    ]
                    for p, r in sorted(mine, key=lambda m: mid(m[1], "switches"))
                ],
            )
        else:
            table(
                [
                    "peer",
                    "runs (moved/back)",
                    "outage ms",
                    "packets lost",
                    "link event -> route ms",
                    "fault -> route ms",
                    "beyond minimum ms",
                    "failback ms",
                    "lost in failback",
                ],
                [
                    [
                        p,
                        f"{len(r)} ({sum(x['moved'] for x in r)}/{sum(bool(x['back']) for x in r)})",
                        spread(get(r, "outage"), 1),
                        spread([x["lost"] for x in r if x["moved"]]),
                        spread([x["reaction"] for x in r if x["fault_to_link"] is not None], 2),
                        spread(get(r, "fault_to_route"), 1),
                        spread(get(r, "beyond"), 1),
                        spread(get(r, "failback"), 0),
                        spread(get(r, "failback_lost")),
                    ]
                    for p, r in sorted(mine, key=lambda m: mid(m[1], "outage"))
                ],
            )


if __name__ == "__main__":
    main()
