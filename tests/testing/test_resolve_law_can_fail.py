import attrs
import pytest
from hypothesis import HealthCheck, Phase, find, settings
from hypothesis import strategies as st

from automodel_fn import Availability, BackendConfig, BackendUnavailableError, Resolution, resolve
from automodel_fn.backend import Device, Package
from automodel_fn.testing import availabilities, backend_configs, check_resolve

CPU = Availability(python="3.12.0", torch="2.13.0")
HOPPER = Availability(
    python="3.12.0",
    torch="2.13.0",
    cuda="13.0",
    devices=(Device("H100", capability=(9, 0), memory_bytes=80 << 30),),
    packages=(Package("transformer-engine", version="2.20.2"),),
)
DEFAULT, NAMED = BackendConfig(), BackendConfig(attn="te", linear="te")


def edited(found, **changes):
    fields = tuple(
        attrs.evolve(each, runs=changes.get(each.name, each.runs)) for each in found.fields
    )
    return attrs.evolve(found, backend=attrs.evolve(found.backend, **changes), fields=fields)


def falls_back(config, availability):
    asked = attrs.asdict(config, recurse=False)
    try:
        return resolve(config, availability)
    except BackendUnavailableError:
        found = resolve(BackendConfig(), availability)
        return attrs.evolve(
            found,
            fields=tuple(attrs.evolve(each, asked=asked[each.name]) for each in found.fields),
        )


def leaves_auto(config, availability):
    return edited(resolve(config, availability), attn="auto")


def takes_what_cannot_run(config, availability):
    return edited(resolve(config, availability), linear="te")


def takes_the_worst(config, availability):
    return edited(resolve(config, availability), linear="torch")


def forgets_a_field(config, availability):
    found = resolve(config, availability)
    return attrs.evolve(found, fields=found.fields[1:])


def forgets_a_reason(config, availability):
    found = resolve(config, availability)
    first = attrs.evolve(found.fields[0], reason=" ")
    return attrs.evolve(found, fields=(first, *found.fields[1:]))


def tells_another_value(config, availability):
    found = resolve(config, availability)
    first = attrs.evolve(found.fields[0], runs="flex")
    return attrs.evolve(found, fields=(first, *found.fields[1:]))


class Counting:
    def __init__(self):
        self.calls = 0

    def __call__(self, config, availability):
        self.calls += 1
        found = resolve(config, availability)
        return attrs.evolve(found, notes=(f"call {self.calls}",))


def changes_its_argument(config, availability):
    found = resolve(config, availability)
    object.__setattr__(config, "attn", found.backend.attn)
    return found


def drifts(config, availability):
    found = resolve(config, availability)
    return edited(found, dispatcher_num_sms=21) if config.attn != "auto" else found


def refuses(text):
    def refuse(config, availability):
        raise BackendUnavailableError(text)

    return refuse


def test_the_law_passes_on_what_is_right():
    for config in (DEFAULT, NAMED):
        for machine in (CPU, HOPPER):
            check_resolve(config, machine)


@pytest.mark.parametrize(
    ("wrong", "config", "machine", "said"),
    [
        (falls_back, NAMED, CPU, "attn='te' was asked for by name, and 'sdpa' runs"),
        (leaves_auto, DEFAULT, CPU, "attn: auto has no verdict"),
        (takes_what_cannot_run, DEFAULT, CPU, "linear: transformer-engine is not installed"),
        (takes_the_worst, DEFAULT, HOPPER, "linear='torch' runs, and 'te' could"),
        (forgets_a_field, DEFAULT, CPU, "the fields are"),
        (forgets_a_reason, DEFAULT, CPU, "attn has no reason"),
        (tells_another_value, DEFAULT, CPU, "attn is told as 'auto' -> 'flex'"),
        (Counting(), DEFAULT, CPU, "not pure"),
        (drifts, DEFAULT, CPU, "not idempotent"),
        (refuses("no"), NAMED, CPU, "does not say why these cannot run"),
        (refuses("attn='te': no reason"), NAMED, CPU, "attn"),
        (refuses("no"), DEFAULT, CPU, "refused, and yet this can run"),
    ],
)
def test_a_resolve_that_is_wrong_is_told(stand_in, wrong, config, machine, said):
    stand_in("resolve", "resolve", wrong)
    with pytest.raises(AssertionError) as caught:
        check_resolve(config, machine)
    assert said in str(caught.value)


def test_a_resolve_that_changes_its_argument_is_told(stand_in):
    stand_in("resolve", "resolve", changes_its_argument)
    with pytest.raises(AssertionError, match="changed its arguments"):
        check_resolve(BackendConfig(), CPU)


def test_an_error_that_names_one_of_two_is_told(stand_in):
    reason = CPU.verdict("attn=te").reason
    stand_in("resolve", "resolve", refuses(f"head\n  attn='te': {reason}"))
    with pytest.raises(AssertionError, match="linear"):
        check_resolve(NAMED, CPU)


def test_other_errors_of_resolve_are_not_swallowed(stand_in):
    def fails(config, availability):
        raise ZeroDivisionError

    stand_in("resolve", "resolve", fails)
    with pytest.raises(ZeroDivisionError):
        check_resolve(DEFAULT, CPU)


@pytest.mark.parametrize(
    "outcome",
    [
        lambda found: isinstance(found, Resolution) and found.backend.experts == "te",
        lambda found: isinstance(found, Resolution) and found.backend.te_fp8 is not None,
        lambda found: isinstance(found, Resolution) and found.backend.dispatcher == "uccl_ep",
        lambda found: isinstance(found, Resolution) and found.backend.compile_attn,
        lambda found: "FP8 needs modules" in str(found),
    ],
)
def test_what_is_drawn_comes_to_every_kind_of_end(outcome):
    def end(pair):
        try:
            return resolve(*pair)
        except BackendUnavailableError as error:
            return error

    quick = settings(
        max_examples=20000,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    pairs = st.tuples(backend_configs(), availabilities())
    find(pairs, lambda pair: outcome(end(pair)), settings=quick)
