from torch import nn

from automodel_fn import BackendConfig, backend_plan
from automodel_fn.render import swap_table


def test_layers_that_are_alike_share_a_row_and_what_is_skipped_stands_before_the_rest(drawn):
    model = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
    text = drawn(swap_table(backend_plan(model, BackendConfig(linear="torch"), skip="1")))

    assert "1 skip, 2 keep" in text
    assert text.index("skip='1'") < text.index("{0,2}")


def test_a_plan_of_nothing_is_a_table_of_nothing(drawn):
    text = drawn(swap_table(backend_plan(nn.ReLU(), BackendConfig(linear="torch"))))

    assert "nothing" in text
