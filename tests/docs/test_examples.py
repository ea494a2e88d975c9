from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted(
    file.relative_to(ROOT).as_posix()
    for file in (ROOT / "README.md", *(ROOT / "docs").rglob("*.md"))
    if "_build" not in file.parts
)
_BLOCK = re.compile(
    r"^```python\n(?P<code>.*?)^```[ \t]*\n(?:[ \t]*\n)*(?:^```text\n(?P<printed>.*?)^```[ \t]*$)?",
    re.MULTILINE | re.DOTALL,
)
FIXED_USAGES = (
    r"^with step_context\(first_microbatch=True\):$",
    r"^plan = cast_plan\(model, bf16\)$",
    r"^apply\(plan\)$",
)


def _blocks(text):
    for found in _BLOCK.finditer(text):
        line = text.count("\n", 0, found.start("code"))
        yield line, found["code"], found["printed"] or ""


def _read(file):
    return (ROOT / file).read_text(encoding="utf-8")


@pytest.mark.parametrize("file", [file for file in FILES if "```python" in _read(file)])
def test_the_examples_print_what_the_page_says(file, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    for line, code, printed in _blocks(_read(file)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile("\n" * line + code, file, "exec"), namespace)

        assert out.getvalue() == printed, f"{file}:{line + 1}"


def test_the_readme_and_the_tutorial_have_examples():
    for file in ("README.md", "docs/tutorial.md"):
        assert any(_blocks(_read(file))), file


@pytest.mark.parametrize("usage", FIXED_USAGES)
def test_the_readme_shows_the_fixed_usages(usage):
    code = "".join(code for _, code, _ in _blocks(_read("README.md")))

    assert re.search(usage, code, re.MULTILINE)


def test_every_python_block_is_found():
    for file in FILES:
        text = _read(file)

        assert text.count("```python\n") == len(list(_blocks(text))), file


def test_no_example_has_prompts():
    for file in FILES:
        assert [line for line, code, _ in _blocks(_read(file)) if ">>>" in code] == [], file


def test_what_is_printed_belongs_to_the_example_right_above_it():
    text = "```python\na\n```\n\n```text\n1\n```\n\n```python\nb\n```\nwords\n```text\n2\n```\n"

    assert list(_blocks(text)) == [(1, "a\n", "1\n"), (9, "b\n", "")]
