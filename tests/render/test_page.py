import re

from automodel_fn.render import bullet_list, page, section, text_table

EVIL = "<script>alert('&\"')</script>"


def test_all_text_is_escaped():
    html = page(
        EVIL,
        EVIL,
        [section(EVIL, bullet_list([EVIL])), text_table([EVIL], [[EVIL]])],
    )

    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#x27;&amp;&quot;&#x27;)") == 7


def test_a_page_fetches_nothing():
    html = page("t", "l", [])

    assert not re.search(r"https?:|src=|href=|@import|url\(", html)


def test_sections_stand_in_their_order():
    html = page("t", "l", [section("one", "<p>1</p>"), section("two", "<p>2</p>")])

    assert html.index("<h2>one</h2><p>1</p>") < html.index("<h2>two</h2><p>2</p>")
    assert html.startswith("<!doctype html>")
    assert html.endswith("</html>\n")
