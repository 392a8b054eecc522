"""What the end of a stage decided, for people."""

import collections
from typing import Any

from cpnas_jax.models.space import CELL_TYPES, EDGES


def decision_text(line: dict[str, Any]) -> str:
    """Say what the end of a stage decided, from its line of the history."""
    if line["event"] == "stage":
        return stage_text(line)
    if line["event"] == "pruning":
        return pruning_text(line)
    accuracy = line["child_accuracy"]
    reason = "drawn at random" if accuracy is None else f"the best of all, accuracy {accuracy:.3f}"
    return f"Candidate {line['candidate']} is chosen, {reason}."


def pruning_text(line: dict[str, Any]) -> str:
    """Tabulate what each edge lost and how many operations it has left."""
    lost = [name for cell in line["dropped"] for edge in cell for name in edge]
    rows = [
        f"Stage {line['stage']} is over, {line['scored']} architectures scored, reliability "
        f"{line['reliability']:.2f}; dropped "
        + ", ".join(f"{count} {name}" for name, count in collections.Counter(lost).most_common()),
        f"  {'edge':<6}" + "".join(f"{cell + ', left':<44}" for cell in CELL_TYPES).rstrip(),
    ]
    for edge, (source, target) in enumerate(EDGES):
        cells = ""
        for cell, dropped in zip(CELL_TYPES, line["dropped"], strict=True):
            left = len(line["effects"][cell][edge]) - len(dropped[edge])
            lost_here = ", ".join(dropped[edge]) or "-"
            cells += f"{f'{left} without {lost_here}':<44}"
        rows.append(f"  {f'{source}->{target}':<6}{cells}".rstrip())
    return "\n".join(rows)


def stage_text(line: dict[str, Any]) -> str:
    """Tabulate the operations that a stage dropped, from its line of the history."""
    counts = collections.Counter(name for cell in line["dropped"] for name in cell)
    rows = [
        f"Stage {line['stage']} is over; dropped "
        + ", ".join(f"{count} {name}" for name, count in counts.most_common())
        + f"; {line['stage'] - 1} left on each edge.",
        f"  {'edge':<6}" + "".join(f"{cell:<24}" for cell in CELL_TYPES),
    ]
    for edge, (source, target) in enumerate(EDGES):
        cells = ""
        for cell, names in zip(CELL_TYPES, line["dropped"], strict=True):
            name = names[edge]
            cells += f"{name:<15}{line['indicator'][cell][edge][name]:<9.4f}"
        rows.append(f"  {f'{source}->{target}':<6}{cells}".rstrip())
    return "\n".join(rows)
