"""What a machine has, as tables and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator

import attrs
from rich.table import Table

from automodel_fn.backend._availability import Availability
from automodel_fn.backend._config import BackendConfig
from automodel_fn.backend._remarks import remarks
from automodel_fn.backend._resolve import resolve
from automodel_fn.plans import Row
from automodel_fn.render._groups import size_text
from automodel_fn.render._table import simple_table


def availability_tables(found: Availability) -> Iterator[Table]:
    """Versions, devices, backends, what is chosen by default, and remarks; a table each."""
    versions = [
        ("python", found.python, ""),
        ("torch", found.torch, f"CUDA {found.cuda or 'none'}"),
        *((p.name, p.version or "not installed", p.problem) for p in found.packages),
    ]
    yield simple_table("Versions", ("package", "version", "remark"), versions)
    devices = [
        (d.name, f"sm_{d.capability[0]}{d.capability[1]}", size_text(d.memory_bytes))
        for d in found.devices
    ]
    cpu = ("CPU", f"{found.num_threads} threads", "")
    yield simple_table("Devices", ("device", "kind", "memory"), [cpu, *devices])
    verdicts = [(v.backend, "yes" if v.can_run else "no", v.reason) for v in found.verdicts()]
    yield simple_table("Backends", ("backend", "runs here", "why"), verdicts)
    chosen = [(r.name, r.after, r.reason) for r in _default(found) if r.action == "choose"]
    yield simple_table("What BackendConfig() chooses here", ("field", "runs", "why"), chosen)
    known = remarks(found)
    if known:
        yield simple_table("Good to know", ("package", "remark"), known)


def availability_json(found: Availability) -> str:
    """The same as JSON text."""
    verdicts = [attrs.asdict(verdict) for verdict in found.verdicts()]
    default = [
        {"field": row.name, "asked": row.before, "runs": row.after, "reason": row.reason}
        for row in _default(found)
    ]
    known = [{"package": package, "remark": remark} for package, remark in remarks(found)]
    parts = {
        **attrs.asdict(found),
        "backends": verdicts,
        "default_backend": default,
        "remarks": known,
    }
    return json.dumps(parts, indent=1) + "\n"


def _default(found: Availability) -> tuple[Row, ...]:
    return resolve(BackendConfig(), found).rows()
