from automodel_fn.render import BenchmarkLine, benchmark_markdown, benchmark_tables

MEASURES = [(f"measure_{letter}_us", "us") for letter in "abcde"] + [("error_relative", "")]
OURS = BenchmarkLine(
    "norm", subject="ours", is_ours=True, medians=(1234.5, 2.0, None, None, None, 0.00166)
)
PEER = BenchmarkLine(
    "norm",
    subject="a|b",
    medians=(2469.0, 3.0, None, None, None, 0.5),
    remarks=("timed otherwise",),
)
ABSENT = BenchmarkLine("rope", subject="quack", absent="it is not installed.")
WHOLE = BenchmarkLine("huge", subject="", absent="no memory")
DESCRIPTIONS = [("norm", "bf16 [2, 4]"), ("rope", "q and k"), ("huge", "too much")]


def test_many_measures_make_a_table_a_case_with_units_in_its_heading(drawn):
    tables = benchmark_tables("ops", MEASURES, [OURS, PEER, ABSENT])

    assert [str(table.title) for table in tables] == ["ops: norm", "ops: rope"]
    text = drawn(tables[0])
    (ours,) = [line for line in text.splitlines() if "ours" in line]
    assert ours.split() == ["ours", "1,234.5", "2.0", "-", "-", "-", "1.7e-03"]
    assert text.count(" us ") >= 5


def test_few_measures_make_one_table(drawn):
    lines = [BenchmarkLine(case, subject="ours", medians=(1.0,)) for case in ("few", "many")]
    (table,) = benchmark_tables("cast", [("apply_ms", "ms")], lines)

    assert table.row_count == 2


def test_pins_and_ratios_are_spoken_of_only_where_there_are_some(drawn):
    line = BenchmarkLine("norm", subject="ours", medians=(1.0,))
    text = drawn(*benchmark_tables("t", [("forward_us", "us")], [line]))

    assert "pins" not in text
    assert "brackets" not in text


def test_what_was_measured_otherwise_is_said_beneath(drawn):
    (table, *_) = benchmark_tables("ops", MEASURES, [OURS, PEER])

    assert "norm, a|b: timed otherwise" in str(table.caption)


def test_markdown_has_a_section_a_case_with_ours_in_bold():
    text = benchmark_markdown(["a GPU", "medians"], MEASURES, [OURS, PEER, ABSENT], DESCRIPTIONS)

    assert text.startswith("- a GPU\n- medians\n\n### norm\n\nbf16 [2, 4]\n\n| subject |")
    assert "| **ours** | **1,234.5** | **2.0** | **1.7e-03** |\n" in text
    assert "| a\\|b | 2,469.0 | 3.0 | 0.5 |\n" in text
    assert "- norm, a\\|b: timed otherwise\n" in text
    assert "- absent: quack: it is not installed." in text


def test_markdown_has_no_column_for_what_nobody_was_measured_in():
    text = benchmark_markdown([], MEASURES, [OURS, PEER], DESCRIPTIONS)

    assert "| subject | measure a, us | measure b, us | error |\n|---|---:|---:|---:|\n" in text


def test_markdown_says_of_an_absent_case_only_why():
    text = benchmark_markdown([], MEASURES, [WHOLE], DESCRIPTIONS)

    assert "### huge\n\ntoo much\n\n- absent: huge: no memory\n" in text
    assert "| subject" not in text
