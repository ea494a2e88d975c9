import attrs
import pytest

from automodel_fn import (
    BackendConfig,
    BackendUnavailableError,
    ConfigError,
    FieldResolution,
    Plan,
    Resolution,
    TEFp8Config,
    probe,
    resolve,
)
from automodel_fn.backend._reasons import FUSED_LOSS, FUSED_ROPE
from automodel_fn.render import plan_table

FIELDS = [field.name for field in attrs.fields(BackendConfig)]


@pytest.fixture
def cpu(machine):
    return machine(cuda=None)


@pytest.fixture
def hopper(machine):
    return machine((9, 0), te="2.20.2", deep_ep="1.2.1", uccl="0.1", world_size=8)


def chosen(found):
    fields = ("attn", "linear", "rope_fusion", "experts", "dispatcher")
    return tuple(getattr(found.backend, name) for name in fields)


def refused(config, found):
    with pytest.raises(BackendUnavailableError) as caught:
        resolve(config, found)
    head, *lines = str(caught.value).splitlines()
    assert head == "this backend cannot run here"
    return [line.strip() for line in lines]


def test_the_default_runs_on_a_cpu_with_nothing_installed(cpu):
    assert chosen(resolve(BackendConfig(), cpu)) == ("sdpa", "torch", True, "torch", "torch")


def test_the_default_runs_here():
    found = resolve(BackendConfig(), probe())
    assert "auto" not in chosen(found)


@pytest.mark.parametrize(
    ("capability", "packages", "world_size", "expected"),
    [
        ((7, 5), {}, 1, ("sdpa", "torch", True, "torch", "torch")),
        ((8, 0), {}, 1, ("sdpa", "torch", True, "torch_mm", "torch")),
        ((8, 0), {"te": "2.20.2"}, 1, ("sdpa", "te", True, "torch_mm", "torch")),
        ((8, 0), {"te": "1.13.0"}, 1, ("sdpa", "torch", True, "torch_mm", "torch")),
        ((9, 0), {"deep_ep": "1.2"}, 8, ("sdpa", "torch", True, "torch_mm", "deepep")),
        ((9, 0), {"deep_ep": "1.2"}, 1, ("sdpa", "torch", True, "torch_mm", "torch")),
        ((8, 0), {"deep_ep": "1.2"}, 8, ("sdpa", "torch", True, "torch_mm", "torch")),
        ((8, 0), {"uccl": "0.1"}, 8, ("sdpa", "torch", True, "torch_mm", "uccl_ep")),
        (
            (9, 0),
            {"te": "2.20.2", "deep_ep": "1.2", "uccl": "0.1"},
            8,
            ("sdpa", "te", True, "torch_mm", "deepep"),
        ),
    ],
)
def test_auto_takes_the_first_that_can_run(machine, capability, packages, world_size, expected):
    found = machine(capability, world_size=world_size, **packages)
    assert chosen(resolve(BackendConfig(), found)) == expected


def test_what_is_asked_for_by_name_is_what_runs(hopper):
    config = BackendConfig(
        attn="flex",
        linear="torch",
        rope_fusion=False,
        async_masks=False,
        swiglu="torch",
        loss="torch",
        experts="torch_mm",
        dispatcher="uccl_ep",
    )
    found = resolve(config, hopper)
    assert found.backend == config
    assert not any(each.is_chosen for each in found.fields)


def test_every_field_is_told_once_in_order_with_a_reason(cpu, hopper):
    for found in (resolve(BackendConfig(), cpu), resolve(BackendConfig(), hopper)):
        assert [each.name for each in found.fields] == FIELDS
        assert all(each.reason for each in found.fields)


def test_the_reason_of_a_choice_says_why_the_better_ones_cannot_run(machine):
    found = resolve(BackendConfig(), machine((8, 0), te="1.13.0"))
    assert found.field("linear").reason == (
        "auto: the first of te, torch that fits (fastest first); "
        "not te: transformer-engine is 1.13.0, at least 2.0 is needed"
    )


def test_the_reason_of_a_choice_names_the_field_that_forbids_a_better_one(hopper):
    found = resolve(BackendConfig(compile_attn=True), hopper)
    assert chosen(found)[:3] == ("sdpa", "torch", True)
    assert "not te: compile_attn=True traces the whole attention module" in (
        found.field("linear").reason
    )


def test_a_named_field_says_that_it_was_asked_for(hopper):
    found = resolve(BackendConfig(attn="te"), hopper)
    assert found.field("attn").reason == "as asked; it can run here"


@pytest.mark.parametrize("asked", ["auto", True])
def test_fused_rotary_embeddings_come_with_their_caveat(hopper, asked):
    found = resolve(BackendConfig(rope_fusion=asked), hopper)
    assert found.field("rope_fusion").runs is True
    assert FUSED_ROPE in found.field("rope_fusion").reason
    assert "#3027" in FUSED_ROPE
    assert FUSED_ROPE in found.notes


def test_what_is_not_used_says_so(cpu, hopper):
    alone = resolve(BackendConfig(), cpu)
    assert alone.field("dispatcher_num_sms").reason == "not used with dispatcher='torch'"
    assert resolve(BackendConfig(), hopper).field("dispatcher_num_sms").reason == "as asked"
    assert alone.field("fake_gate_noise").reason == "not used: the router decides"
    fake = resolve(BackendConfig(fake_balanced_gate=True, gate_precision="fp32"), cpu)
    assert fake.field("gate_precision").reason == "not used: there is no router"
    assert any("for benchmarks, not for training" in note for note in fake.notes)


def test_hybridep_does_not_take_the_asynchronous_dispatch(hopper):
    found = resolve(BackendConfig(dispatcher="hybridep"), hopper)
    reason = found.field("dispatcher_async_dispatch").reason
    assert reason == "not used with dispatcher='hybridep'"
    assert any("hybrid-ep branch" in note for note in found.notes)


def test_fp8_has_linear_layers_to_act_on(hopper):
    found = resolve(BackendConfig(te_fp8="current"), hopper)
    assert (found.backend.linear, found.backend.experts) == ("te", "torch_mm")
    assert any("te_fp8 does not act on experts" in note for note in found.notes)


def test_fp8_without_linear_layers_takes_experts_and_their_dispatcher(hopper):
    found = resolve(BackendConfig(te_fp8="current", linear="torch"), hopper)
    assert (found.backend.experts, found.backend.dispatcher) == ("te", "deepep")
    assert "not torch_mm: FP8 needs modules" in found.field("experts").reason
    assert any("te_fp8 acts on the experts only" in note for note in found.notes)


def test_fp8_that_would_have_nothing_to_act_on_is_an_error(machine):
    config = BackendConfig(te_fp8="current", linear="torch")
    text = "\n".join(refused(config, machine((9, 0))))
    assert "te_fp8='current', linear='torch', experts='auto': FP8 needs modules" in text
    assert "not experts='te': transformer-engine is not installed" in text


def test_experts_of_transformer_engine_go_with_any_dispatcher(hopper, machine):
    assert resolve(BackendConfig(experts="te"), hopper).backend.dispatcher == "deepep"
    assert resolve(BackendConfig(experts="torch"), hopper).backend.dispatcher == "torch"
    alone = resolve(BackendConfig(experts="te"), machine((9, 0), te="2.20.2"))
    assert (alone.backend.experts, alone.backend.dispatcher) == ("te", "torch")


def test_the_error_says_what_is_missing_and_what_can_run_instead(cpu):
    (line,) = refused(BackendConfig(attn="te"), cpu)
    assert line == (
        "attn='te': transformer-engine is not installed; there is no CUDA GPU; "
        "here can run: 'sdpa', 'flex', 'eager'"
    )


def test_the_error_lists_all_that_cannot_run(cpu):
    config = BackendConfig(
        attn="tilelang",
        linear="te",
        rms_norm="te",
        experts="te",
        dispatcher="deepep",
        te_fp8="mxfp8",
    )
    said = [line.partition("=")[0] for line in refused(config, cpu)]
    assert said == ["attn", "linear", "rms_norm", "experts", "dispatcher", "te_fp8"]


def test_the_error_offers_recipes_that_can_run(hopper):
    (line,) = refused(BackendConfig(te_fp8="mxfp8"), hopper)
    assert line == (
        "te_fp8='mxfp8': the GPU has compute capability 9.0, at least 10.0 is needed; "
        "here can run: 'current', 'block', None"
    )


def test_the_error_offers_only_what_goes_with_the_rest(hopper):
    config = BackendConfig(attn="tilelang", experts="te", dispatcher="deepep")
    old = attrs.evolve(hopper, packages=hopper.packages[1:])
    by_field = {line.partition("=")[0]: line for line in refused(config, old)}
    assert by_field["experts"].endswith("here can run: 'torch_mm'")
    assert "'torch'" not in by_field["experts"].partition("here can run")[2]


def test_an_unavailable_backend_is_also_an_import_error(cpu):
    with pytest.raises(ImportError):
        resolve(BackendConfig(linear="te"), cpu)


def test_gpus_that_differ_are_remarked_upon(machine):
    both = attrs.evolve(machine((9, 0)), devices=machine((9, 0)).devices + machine((8, 0)).devices)
    notes = resolve(BackendConfig(), both).notes
    assert any("differ in compute capability" in note for note in notes)
    assert resolve(BackendConfig(), machine((9, 0))).notes == (FUSED_ROPE, FUSED_LOSS)
    own = BackendConfig(rope_fusion=False, loss="torch")
    assert resolve(own, machine((9, 0))).notes == ()


@pytest.mark.parametrize("name", ["config", "availability"])
def test_arguments_of_other_types_are_an_error(cpu, name):
    arguments = {"config": BackendConfig(), "availability": cpu, name: {}}
    with pytest.raises(ConfigError, match=f"{name}=dict must be of type "):
        resolve(**arguments)


def test_a_resolution_is_a_value(cpu):
    assert resolve(BackendConfig(), cpu) == resolve(BackendConfig(), cpu)
    assert len({resolve(BackendConfig(), cpu), resolve(BackendConfig(), cpu)}) == 1


def test_an_unknown_field_of_a_resolution_is_an_error(cpu):
    with pytest.raises(ConfigError, match="field='atn' is none of BackendConfig's"):
        resolve(BackendConfig(), cpu).field("atn")


def test_a_resolution_can_be_rendered_as_any_plan(cpu):
    found = resolve(BackendConfig(gate_precision="fp32"), cpu)
    assert isinstance(found, Plan)
    rows = {row.name: row for row in found.rows()}
    assert list(rows) == FIELDS
    assert (rows["attn"].before, rows["attn"].after) == ("auto", "sdpa")
    assert (rows["attn"].action, rows["rms_norm"].action) == ("choose", "take")
    assert rows["gate_precision"].after == "float32"
    assert plan_table(found).row_count == len(FIELDS)


def test_rows_show_the_recipe(hopper):
    found = resolve(BackendConfig(te_fp8="block"), hopper)
    assert found.field("te_fp8").row().after == "block"


def test_a_made_up_resolution_needs_no_machine():
    field = FieldResolution("attn", asked="auto", runs="sdpa", reason="because")
    found = Resolution(BackendConfig(attn="sdpa"), fields=(field,))
    assert found.field("attn") is field
    assert found.notes == ()


class Recipe:
    def __init__(self, kind):
        setattr(self, kind, lambda: True)


@pytest.mark.parametrize(
    ("kind", "can_run"),
    [("delayed", True), ("mxfp8", False), ("nvfp4", False), ("custom", True)],
)
def test_a_recipe_object_is_judged_by_what_it_says_it_is(hopper, kind, can_run):
    config = BackendConfig(te_fp8=TEFp8Config(Recipe(kind)))
    if can_run:
        assert resolve(config, hopper).backend.te_fp8 is config.te_fp8
    else:
        (line,) = refused(config, hopper)
        assert line.startswith(f"te_fp8={kind!r}: the GPU has compute capability 9.0")


def test_without_a_gpu_the_parts_of_a_head_are_float32(cpu, hopper):
    asked = BackendConfig(lm_head_precision="bf16x3")

    reasons = [resolve(asked, each).field("lm_head_precision").reason for each in (cpu, hopper)]
    assert reasons == ["as asked; without a GPU it multiplies in float32", "as asked"]


@pytest.mark.parametrize(("world_size", "num_notes"), [(1, 1), (2, 0)])
def test_one_rank_has_no_gradients_to_hold_back(cpu, world_size, num_notes):
    asked = BackendConfig(enable_fsdp_optimizations=True)
    found = resolve(asked, attrs.evolve(cpu, world_size=world_size))

    assert len([note for note in found.notes if "hold back" in note]) == num_notes


@pytest.mark.parametrize("experts", ["te", "gmm"])
def test_grouped_experts_without_a_dispatcher_are_told_what_each_rank_has_to_have(machine, experts):
    found = machine((9, 0), te="2.20.2", grouped_gemm="0.3", deep_ep="1.2", world_size=8)
    said = "each rank has to have all experts"
    asked = BackendConfig(experts=experts, dispatcher="torch")
    alone = resolve(asked, found)

    assert (alone.backend.experts, alone.backend.dispatcher) == (experts, "torch")
    assert resolve(asked, attrs.evolve(found, world_size=1)).notes == alone.notes
    assert any("runs as asked, since grouped experts need no" in note for note in alone.notes)
    assert [said in note for note in alone.notes].count(True) == 1
    for other in (BackendConfig(experts=experts, dispatcher="deepep"), BackendConfig()):
        assert not any(said in note for note in resolve(other, found).notes)


@pytest.mark.parametrize(
    ("asked", "missing"),
    [
        ({"experts": "gmm"}, "grouped_gemm is not installed"),
        ({"experts": "torch_mm_mxfp8"}, "compute capability 9.0, at least 10.0 is needed"),
        ({"te_fp8": "mxfp8"}, "compute capability 9.0, at least 10.0 is needed"),
        ({"dispatcher": "deepep"}, "world_size=1, at least 2 ranks are needed"),
    ],
)
def test_what_lacks_its_package_its_gpu_or_its_ranks_is_an_error(machine, asked, missing):
    found = machine((9, 0), te="2.20.2", torchao="0.14", deep_ep="1.2")
    (line,) = refused(BackendConfig(**asked), found)

    ((name, value),) = asked.items()
    assert line.startswith(f"{name}={value!r}: ")
    assert missing in line
    assert "; here can run: " in line
    enough = machine((10, 0), te="2.20.2", torchao="0.14", deep_ep="1.2", grouped_gemm="0.3")
    runs = resolve(BackendConfig(**asked), attrs.evolve(enough, world_size=2)).backend
    assert getattr(runs, name) == getattr(BackendConfig(**asked), name)
