"""The command `hobbit simulate`, once its words are parsed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from . import plot
from .lab import BUDGETS, Lab, LabOptions, compare
from .render import Screen
from .report import lab_curves, lab_lines, lab_report


def simulating(values: Mapping[str, Any], screen: Screen) -> str:
    """Simulate what the flags ask for; return what goes to stdout."""
    options = LabOptions(**values)
    if options.plot:
        plot.check()
    # What needs no trace to be found wrong is told before one is read.
    policies, budgets = options.policies, options.budget or BUDGETS
    _ = options.rule, options.machine
    lab = Lab(options)
    lines = []
    if options.tune:
        found = [lab.tuned(policy, budgets) for policy in policies]
        lines = [f"--policy {policy}  reads {ratio:.3f} of LRU" for policy, ratio in found]
        policies = [policy for policy, _ in found]
    rows = compare(lab, policies, budgets)
    screen.say(lab.title(), *lab.notes(rows))
    if options.plot:
        plot.plot_curves(
            options.plot,
            lab_curves(rows),
            title=lab.title(),
            x="MiB of cache",
            y="MiB read a token",
        )
    if options.json_output:
        return json.dumps(lab_report(rows, lab.facts()), ensure_ascii=False) + "\n"
    return "\n".join([*lab_lines(rows), *lines]) + "\n"
