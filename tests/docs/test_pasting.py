import code
import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    page
    for page in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in page.parts and "```python" in page.read_text("utf-8")
)
BLOCK = re.compile(r"^```python\n(.*?)^```\n", re.M | re.S)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_examples_can_be_pasted_line_by_line(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    console = code.InteractiveConsole()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
        for example in BLOCK.findall(page.read_text("utf-8")):
            for line in [*example.splitlines(), ""]:
                console.push(line)

    assert said.getvalue() == ""
