import re
from pathlib import Path

import pytest

from automodel_fn.compat import nemo

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "how-to" / "moving-from-nemo-automodel.md"
OF_THE_ORIGINAL = {*nemo.__all__, "is_tensor_unallocated", "yield_fp32_model", "logger"} | {
    name for name in vars(nemo) if re.fullmatch(r"_[a-z].*", name) and callable(getattr(nemo, name))
}


def old_names():
    text = GUIDE.read_text("utf-8")
    section = text.split("## What to write in new code")[1].split("\n## ")[0].split("\n### ")[0]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def test_the_table_names_every_name_once():
    from_data = [name for name in dir(nemo) if name.startswith(("HAVE_", "IS_"))]
    configs = ["CudaGraphConfig", "MoKBackendConfig"]
    assert sorted(old_names()) == sorted({*OF_THE_ORIGINAL, *from_data, *configs})


@pytest.mark.parametrize("name", old_names())
def test_an_old_name_of_the_table_is_there(name):
    assert hasattr(nemo, name)
