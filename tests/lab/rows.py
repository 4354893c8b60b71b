"""Rows of a comparison, as the benchmarks' contract has them: what each side took, and the ratio within each pair.

What belongs here: arithmetic and drawing. What does not: measuring.
"""

import json
import statistics


class Row:
    """One metric of two sides. `pairs` are (ours, theirs); `target` is the most that the median of their ratios may
    be."""

    def __init__(self, scenario, metric, unit, peer, pairs, target, note):
        self.scenario, self.metric, self.unit, self.peer = scenario, metric, unit, peer
        self.ours, self.theirs = (_spread(side) for side in zip(*pairs))
        self.ratio = _spread([ours / theirs for ours, theirs in pairs])
        self.target, self.note = target, note

    def as_object(self):
        met = self.target is None or self.ratio["median"] <= self.target
        return {**vars(self), "met": met}

    def cells(self):
        target = "-" if self.target is None else f"{self.target:.2f}"
        met = "-" if self.target is None else "met" if self.ratio["median"] <= self.target else "MISSED"
        return [
            f"{self.metric} ({self.unit})",
            _text(self.ours, 0),
            _text(self.theirs, 0),
            _text(self.ratio, 2),
            target,
            met,
        ]


def show(rows):
    """A table, a line each."""
    table = [["", "decamp min median max", f"{rows[0].peer} min median max", "ratio min median max", "target", ""]]
    table += [row.cells() for row in rows]
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    for line in table:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())
    for row in rows:
        print(f"  {row.metric}: {row.note}", flush=True)


def as_json(rows):
    """One array, on one line."""
    return json.dumps([row.as_object() for row in rows])


def _spread(values):
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


def _text(spread, digits):
    return " ".join(f"{spread[name]:.{digits}f}" for name in ("min", "median", "max"))
