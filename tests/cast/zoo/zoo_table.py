"""The table in docs/explanation/pins-of-transformers.md; run this file to write it anew."""

import re
from pathlib import Path

from zoo_cases import CASES, CONSTRUCTED, VERSION, plan_of

from automodel_fn import bf16

PAGE = Path(__file__).parents[3] / "docs" / "explanation" / "pins-of-transformers.md"
BEGIN, END = "<!-- begin of the generated table -->\n", "<!-- end of the generated table -->\n"
COMMAND = "python tests/cast/zoo/zoo_table.py"


def table():
    """Markdown: the families in which the two rules differ for bf16, then those in which not."""
    rows, alike = [], []
    for family in dict.fromkeys(case.partition(".")[0] for case in CASES):
        both, ours, theirs = _patterns(family)
        if ours or theirs:
            rows.append(f"| {family} | {len(both)} | {_cell(ours)} | {_cell(theirs)} |\n")
        else:
            alike.append(f"{family} ({len(both)})")
    return (
        f"transformers {VERSION}, bfloat16.\n\n"
        "| family | both keep | only the default keeps | only transformers keeps |\n"
        "|---|---|---|---|\n" + "".join(rows) + "\n"
        "No difference, with the number of tensors that both keep: " + ", ".join(alike) + ".\n"
    )


def committed():
    """The table as the page has it."""
    return PAGE.read_text("utf-8").partition(BEGIN)[2].partition(END)[0]


def _patterns(family):
    """In float32 by both, by the default alone, by transformers alone; layers are one."""
    ours, theirs = set(), set()
    for case in CASES:
        if case.partition(".")[0] == family:
            ours |= _pinned(case, "substring")
            theirs |= _pinned(case, "hf") | CONSTRUCTED.get(case, set())
    ours, theirs = ({re.sub(r"\.\d+(?=\.)", ".*", n) for n in names} for names in (ours, theirs))
    return ours & theirs, ours - theirs, theirs - ours


def _pinned(case, match):
    entries = plan_of(case, bf16, match).entries
    kept = (e for e in entries if e.action == "keep" and e.kind != "nonpersistent_buffer")
    return {name for entry in kept for name in entry.names}


def _cell(patterns):
    if not patterns:
        return "-"
    example = f"`{min(patterns, key=lambda pattern: (len(pattern), pattern))}`"
    return example if len(patterns) == 1 else f"{len(patterns)}, as {example}"


def main():
    """Write the table into the page."""
    before, _, rest = PAGE.read_text("utf-8").partition(BEGIN)
    PAGE.write_text(before + BEGIN + table() + END + rest.partition(END)[2], "utf-8")


if __name__ == "__main__":
    main()
