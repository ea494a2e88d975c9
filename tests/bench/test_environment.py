"""What is said of subjects that cannot be loaded."""

import warnings

import attrs
import pytest

from automodel_fn.bench._environment import environment_report
from automodel_fn.bench._registry import BENCHMARKS


def reasons(load, package):
    benchmark = BENCHMARKS["cast"]
    ours = attrs.evolve(benchmark.subjects[0], name="one", load=load, package=package)
    report = environment_report(attrs.evolve(benchmark, subjects=(ours,)), "cpu")
    return report["absent"]["one"]


@pytest.mark.parametrize(
    ("package", "hint"),
    [
        ("torch", "install another version of torch."),
        ("no-such-package", "install no-such-package."),
    ],
)
def test_what_is_missing_is_named_without_a_folder_of_this_machine(package, hint):
    def load():
        from torch.nn.functional import no_such_function  # noqa: F401

    said = reasons(load, package)

    assert said.startswith("it cannot be imported: cannot import name 'no_such_function'")
    assert "/" not in said
    assert said.endswith(hint)


def test_what_an_import_warns_of_is_not_passed_on(recwarn):
    benchmark = BENCHMARKS["cast"]
    warns = attrs.evolve(benchmark.subjects[0], load=lambda: warnings.warn("old", stacklevel=1))

    report = environment_report(attrs.evolve(benchmark, subjects=(warns,)), "cpu")

    assert (report["absent"], len(recwarn)) == ({}, 0)
