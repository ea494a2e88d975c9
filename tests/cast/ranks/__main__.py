"""Runs the claims of a file on this rank of several; what becomes of each goes to a JSON file."""

from __future__ import annotations

import importlib
import json
import logging
import os
import sys
import traceback
import warnings
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist


def main(module, folder):
    warnings.filterwarnings("error", module="automodel_fn")
    logging.disable(logging.WARNING)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    claims = vars(importlib.import_module(module))
    found = {}
    for name in [name for name in claims if name.startswith("claim_")]:
        try:
            claims[name]()
            found[name] = "holds"
        except Exception:  # noqa: BLE001 - whatever it is goes into the report
            # The ranks may be apart from here on: nothing more can be said.
            found[name] = traceback.format_exc()
            break
    Path(folder, f"{dist.get_rank()}.json").write_text(json.dumps(found), "utf-8")


main(*sys.argv[1:])
# A process may abort in its own end, in threads of gloo.
os._exit(0)
