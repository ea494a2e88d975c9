"""The published source of Transformer Engine, read and never imported, against the stand-ins."""

import ast
import importlib.metadata
import inspect

import pytest

from automodel_fn.testing import te_stand_ins

PLACES = {
    "linear": "transformer_engine/pytorch/module/linear.py",
    "grouped_linear": "transformer_engine/pytorch/module/grouped_linear.py",
    "layer_norm_linear": "transformer_engine/pytorch/module/layernorm_linear.py",
    "layer_norm_mlp": "transformer_engine/pytorch/module/layernorm_mlp.py",
    "multihead_attention": "transformer_engine/pytorch/attention/multi_head_attention.py",
    "transformer_layer": "transformer_engine/pytorch/transformer.py",
}
NORMS = {
    "rms_norm": "transformer_engine/pytorch/module/rmsnorm.py",
    "layer_norm": "transformer_engine/pytorch/module/layernorm.py",
}
OPERATION = "transformer_engine/pytorch/ops/op.py"
# What _shapes.py reads of a module.
ATTRIBUTES = {
    "linear": {"out_features", "return_bias", "sequence_parallel", "parallel_mode", "tp_size"},
    "grouped_linear": {"out_features", "return_bias", "num_gemms"},
    "layer_norm_linear": {
        "out_features",
        "return_bias",
        "return_layernorm_output",
        "return_layernorm_output_gathered",
        "sequence_parallel",
        "parallel_mode",
        "tp_size",
    },
    "layer_norm_mlp": {
        "return_bias",
        "return_layernorm_output",
        "return_layernorm_output_gathered",
        "sequence_parallel",
        "set_parallel_mode",
        "tp_size",
    },
}
# Arguments of the constructors that a stand-in or build gives.
GIVEN = {
    "linear": {"in_features", "out_features", "bias", "device", "params_dtype", "return_bias"},
    "grouped_linear": {"num_gemms", "in_features", "out_features", "bias", "return_bias"},
    "layer_norm_linear": {"in_features", "out_features", "bias", "return_layernorm_output"},
    "layer_norm_mlp": {"hidden_size", "ffn_hidden_size", "bias", "return_layernorm_output"},
    "multihead_attention": {"hidden_size", "num_attention_heads"},
    "transformer_layer": {"hidden_size", "ffn_hidden_size", "num_attention_heads"},
}


@pytest.fixture(scope="module")
def source():
    try:
        distribution = importlib.metadata.distribution("transformer-engine")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("the package transformer-engine is not installed, so its source is not here")
    files = {str(file): file for file in distribution.files or ()}
    wanted = (*PLACES.values(), *NORMS.values(), OPERATION)
    missing = [place for place in wanted if place not in files]
    if missing:
        pytest.skip(f"transformer-engine {distribution.version} has no {', '.join(missing)}")
    read = {place: ast.parse(files[place].locate().read_text("utf-8")) for place in wanted}

    def class_of(place, name):
        return next(
            node
            for node in ast.walk(read[place])
            if isinstance(node, ast.ClassDef) and node.name == name
        )

    return class_of


@pytest.fixture(scope="module")
def stand_ins():
    return te_stand_ins()


def method(node, name):
    found = [item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == name]
    return found[0] if found else None


def parameters(function):
    """Name, kind and default of each parameter of a function that was only read."""
    arguments = function.args
    ordinary = [*arguments.posonlyargs, *arguments.args]
    without = [inspect.Parameter.empty] * (len(ordinary) - len(arguments.defaults))
    defaults = without + [ast.literal_eval(default) for default in arguments.defaults]
    found = [
        (argument.arg, inspect.Parameter.POSITIONAL_OR_KEYWORD, default)
        for argument, default in zip(ordinary, defaults, strict=True)
    ]
    if arguments.vararg:
        found.append(
            (arguments.vararg.arg, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.empty)
        )
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        value = inspect.Parameter.empty if default is None else ast.literal_eval(default)
        found.append((argument.arg, inspect.Parameter.KEYWORD_ONLY, value))
    if arguments.kwarg:
        found.append((arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD, inspect.Parameter.empty))
    return found


def parameters_of_stand_in(function):
    signature = inspect.signature(function)
    return [(p.name, p.kind, p.default) for p in signature.parameters.values()]


def attributes_set(node):
    return {
        target.attr
        for statement in ast.walk(node)
        if isinstance(statement, ast.Assign | ast.AnnAssign)
        for target in getattr(statement, "targets", None) or [statement.target]
        if isinstance(target, ast.Attribute)
        and isinstance(target.value, ast.Name)
        and target.value.id == "self"
    }


@pytest.mark.parametrize("field", PLACES)
def test_a_forward_has_the_parameters_of_its_stand_in(source, stand_ins, field):
    stand_in = getattr(stand_ins, field)
    real = method(source(PLACES[field], stand_in.__name__), "forward")

    assert parameters(real) == parameters_of_stand_in(stand_in.forward)


@pytest.mark.parametrize("field", PLACES)
def test_a_forward_takes_the_microbatch_and_is_off_by_default(source, stand_ins, field):
    real = method(source(PLACES[field], getattr(stand_ins, field).__name__), "forward")

    assert ("is_first_microbatch", inspect.Parameter.POSITIONAL_OR_KEYWORD, None) in parameters(
        real
    )


@pytest.mark.parametrize("field", NORMS)
def test_a_norm_inherits_its_forward_through_the_operation_of_its_name(source, stand_ins, field):
    name = getattr(stand_ins, field).__name__
    node = source(NORMS[field], name)

    assert method(node, "forward") is None
    assert [ast.unparse(base) for base in node.bases] == [f"_{name}Op"]


@pytest.mark.parametrize("field", NORMS)
def test_the_forward_of_an_operation_has_the_parameters_of_the_norms(source, stand_ins, field):
    real = method(source(OPERATION, "BasicOperation"), "forward")

    assert parameters(real) == parameters_of_stand_in(getattr(stand_ins, field).forward)
    assert "forward" not in vars(getattr(stand_ins, field))


@pytest.mark.parametrize("field", ATTRIBUTES)
def test_what_shape_inference_reads_of_a_module_is_there(source, stand_ins, field):
    real = source(PLACES[field], getattr(stand_ins, field).__name__)

    assert ATTRIBUTES[field] - attributes_set(method(real, "__init__")) == set()


@pytest.mark.parametrize("field", PLACES)
def test_a_constructor_takes_what_is_given_to_it(source, stand_ins, field):
    real = method(source(PLACES[field], getattr(stand_ins, field).__name__), "__init__")
    stand_in = inspect.signature(getattr(stand_ins, field))

    assert GIVEN[field] - {name for name, _, _ in parameters(real)} == set()
    assert GIVEN[field] - set(stand_in.parameters) == set()


def test_the_attributes_of_a_single_and_of_many_biases_are_named_as_they_are_read(source):
    text = ast.unparse(method(source(PLACES["grouped_linear"], "GroupedLinear"), "__init__"))

    assert "f'bias{i}'" in text
