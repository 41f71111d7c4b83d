"""What every public function says of itself: its arguments, and an example that runs."""

import importlib
import inspect

import pytest

ROOMS = (
    "nyscaled",
    *(
        f"nyscaled.{room}"
        for room in (
            "diffusion",
            "dynamics",
            "finetune",
            "finetune.dreambooth",
            "initializers",
            "linalg",
            "lora",
            "lowrank",
            "models",
            "optimality",
            "problems",
            "problems.completion",
            "problems.onebit",
            "problems.phase",
            "problems.robust",
            "problems.sensing",
            "sklearn",
            "solvers",
            "spectra",
            "transforms",
        )
    ),
)


def public_functions():
    functions = {}
    for room in ROOMS:
        module = importlib.import_module(room)
        for name in module.__all__:
            if inspect.isfunction(function := getattr(module, name)):
                functions.setdefault(function, f"{room}.{name}")
    return {name: function for function, name in functions.items()}


FUNCTIONS = public_functions()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_public_functions_have_an_example_and_their_arguments(name):
    function, doc = FUNCTIONS[name], inspect.getdoc(FUNCTIONS[name]) or ""
    assert ">>> " in doc
    if len(inspect.signature(function).parameters) > 1:
        assert "Args:" in doc
