"""Configurations of PEFT: those that are refused, those that change nothing, and patterns."""

import contextlib
import time

import numpy as np
import pytest
from peft_cases import (
    NAMES,
    Model,
    X,
    adapted,
    edit_config,
    refused,
    save,
)

import nyscaled as nys
from nyscaled.checkpoints.peft_config import Rules


@pytest.fixture
def folder(tmp_path):
    save(adapted(), tmp_path)
    return tmp_path


CONFIGS = {
    "another method": ({"peft_type": "ADALORA"}, "peft_type"),
    "no method": ({"peft_type": None}, "peft_type"),
    "dora": ({"use_dora": True}, "use_dora"),
    "adapted and saved whole": ({"modules_to_save": ["heads"]}, "not among"),
    "modules to save": (
        {"modules_to_save": "heads"},
        "modules_to_save is 'heads'; expected a list",
    ),
    "bias": ({"bias": "some"}, "bias"),
    "lora bias": ({"lora_bias": True}, "lora_bias"),
    "other layers": (
        {"layers_to_transform": 0, "target_modules": ["up", "down", "heads", "out", "0", "1"]},
        "not among",
    ),
    "layers as text": ({"layers_to_transform": ["0"]}, "layers_to_transform"),
    "layers of an expression": (
        {"layers_to_transform": [0], "target_modules": ".*"},
        "expected a list in target_modules",
    ),
    "pattern without layers": ({"layers_pattern": "h"}, "expected layers_to_transform"),
    "pattern and no layer": (
        {"layers_pattern": "h", "layers_to_transform": []},
        "expected layers_to_transform",
    ),
    "tokens": ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    "transposed": ({"fan_in_fan_out": True}, "fan_in_fan_out"),
    "megatron": ({"megatron_config": {"a": 1}}, "megatron_config"),
    "activated": ({"alora_invocation_tokens": [3]}, "alora_invocation_tokens"),
    "qalora": ({"use_qalora": True}, "use_qalora"),
    "replication": ({"layer_replication": [[0, 2]]}, "layer_replication"),
    "parameters": ({"target_parameters": ["w"]}, "target_parameters"),
    "unknown": ({"a_new_variant": {"x": 1}}, "a_new_variant"),
    "pissa": ({"init_lora_weights": "pissa"}, "init_lora_weights.*converted"),
    "olora": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "unknown start": ({"init_lora_weights": "nora"}, "init_lora_weights"),
    "rank": ({"r": 3}, "rank 2, and 3"),
    "rank of none": ({"r": None}, "rank is None"),
    "rank text": ({"r": "2"}, "rank is '2'"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "alpha text": ({"lora_alpha": "16"}, "lora_alpha"),
    "alpha nan": ({"lora_alpha": float("nan")}, "lora_alpha"),
    "scaling text": ({"use_rslora": "no"}, "use_rslora"),
    "rank pattern": ({"rank_pattern": {"heads": 3}}, "rank 2, and 3"),
    "alpha of 400 digits": ({"lora_alpha": 10**400}, "lora_alpha"),
    "dropout of 400 digits": ({"lora_dropout": 10**400}, "lora_dropout"),
    "pattern of 400 digits": ({"alpha_pattern": {"up": 10**400}}, "alpha_pattern"),
    "rank of 400 digits": ({"r": 10**400}, "rank 2, and 1000"),
    "all dropped": ({"lora_dropout": 1}, r"lora_dropout is 1; expected a number in \[0, 1\)"),
    "more than all dropped": ({"lora_dropout": 2}, "lora_dropout is 2; expected"),
    "less than nothing dropped": ({"lora_dropout": -1}, "lora_dropout is -1; expected"),
    "dropout text": ({"lora_dropout": "0.1"}, "lora_dropout"),
    "pattern list": ({"rank_pattern": [3]}, "rank_pattern"),
    "broken pattern": ({"alpha_pattern": {"(": 3}}, "regular expression"),
    "alpha beyond float32": ({"lora_alpha": 1e39}, "the scaling is 5e\\+38"),
    "alpha at the end of float64": (
        {"alpha_pattern": {"up": 1e308}},
        "finite in the file and not|scaling",
    ),
    "target without tensors": ({"target_modules": ["heads", "score"]}, "target_modules"),
    "targets missed": ({"target_modules": ["heads"]}, "not among"),
    "targets by expression": ({"target_modules": "heads|items.*"}, "not among"),
    "broken expression": ({"target_modules": "("}, "regular expression"),
    "targets number": ({"target_modules": 3}, "target_modules"),
    "excluded": ({"exclude_modules": ["heads"]}, "not among"),
}


@pytest.mark.parametrize(("fields", "match"), CONFIGS.values(), ids=CONFIGS.keys())
def test_configuration_refused(fields, match, folder):
    edit_config(folder, **fields)
    refused(folder, match)


# Hangs or other exceptions than ValueError, as expressions of `re`.
HOSTILE = {
    "nested repeats": "(([a-z0-9_.])+)+!",
    "repeats of anything": "(.*)*!",
    "repeats side by side": "(.?){200}" * 20 + "!",
    "count": "a{99999999999999999999}",
    "nesting": "(?:" * 500 + ")" * 500,
    "nesting that can be read": "(" * 90 + "a+" + ")+" * 90 + "!",
    "reference": r"(.+)\1",
    "length": "a" * 1_000_000,
}


@pytest.mark.parametrize("expression", HOSTILE.values(), ids=HOSTILE.keys())
def test_expressions_end(expression, folder):
    """Refused, or read as one that matches nothing: in any case soon."""
    for fields in (
        {"target_modules": expression},
        {"exclude_modules": expression},
        {"rank_pattern": {expression: 2}},
        {"alpha_pattern": {expression: 2}},
        {"layers_to_transform": [0], "layers_pattern": expression},
    ):
        edit_config(folder, **({"target_modules": ["up", "0"]} | fields))
        started = time.process_time()
        with contextlib.suppress(ValueError):
            nys.lora.load_peft(Model(), folder, names=NAMES)
        assert (
            time.process_time() - started < 20
        )  # two seconds, on a machine with nothing else to do


def test_expressions_are_read_inside_their_form(folder):
    """PEFT writes `(.*\\.)?(…)$` around a pattern, which makes other patterns sound."""
    edit_config(folder, alpha_pattern={"(?i)HEADS": 6})
    refused(folder, "not a regular expression")
    model = Model()
    edit_config(folder, alpha_pattern={"heads)|(out": 6})
    nys.lora.load_peft(model, folder, names=NAMES)
    layers = model.heads, model.out, model.items[0]
    assert [layer.adapters["default"].alpha for layer in layers] == [6, 6, 3]


HARMLESS = {
    **{"task_type": "CAUSAL_LM", "auto_mapping": {"base_model_class": "X"}, "revision": "main"},
    **{"peft_version": "0.21.2", "inference_mode": False, "runtime_config": {"a": 1}},
    **{"megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {"bits": 4}},
    **{"init_lora_weights": "gaussian", "lora_dropout": 0.3, "use_dora": False},
    **{"modules_to_save": ["score"], "layers_pattern": None, "exclude_modules": ["score"]},
    **{"target_modules": ["up", "down", "heads", "out", "0", "1"], "alpha_pattern": {}},
    # PEFT keeps names of other architectures in the file.
    **{"rank_pattern": {"c_attn": 8}, "layers_to_transform": 0, "bias": "lora_only"},
}
COMBINED = {
    "names of no layer": {"target_modules": ["up", "down", "heads", "out", "0", "1", "c_attn"]},
    "a name all excluded": {
        "target_modules": ["up", "down", "heads", "out", "0", "1", "score"],
        "exclude_modules": ["score"],
    },
    "all layers": {
        "target_modules": ["up", "down", "items.0", "items.1", "heads", "out"],
        "layers_to_transform": [0, 1],
        "layers_pattern": ["h", "layers"],
        "alpha_pattern": {"c_attn": 8, "h.0.*": 9},
    },
}


@pytest.mark.long_beyond(8)
@pytest.mark.parametrize(
    "fields",
    [*({k: v} for k, v in HARMLESS.items()), *COMBINED.values()],
    ids=[*HARMLESS, *COMBINED],
)
def test_configuration_without_effect(fields, folder):
    expected, actual = Model(), Model()
    nys.lora.load_peft(expected, folder, names=NAMES)
    edit_config(folder, **fields)
    nys.lora.load_peft(actual, folder, names=NAMES)
    np.testing.assert_array_equal(actual(X), expected(X))


def test_empty_fields_and_the_case_of_all_linear(folder):
    last = {"target_modules": ["up", "down", "heads", "out", "0", "1"]}
    edit_config(folder, lora_dropout=None, layers_to_transform=[], **last)
    assert set(nys.lora.load_peft(Model(), folder, names=NAMES)) == set(NAMES)
    start = {"init_lora_weights": "orthogonal", "trainable_token_indices": []}
    edit_config(folder, target_modules="All-Linear", **start)
    assert set(nys.lora.load_peft(Model(), folder, names=NAMES)) == set(NAMES)


def test_whole_names_and_layers_of_a_number():
    """A whole name in target_modules counts in every layer; a pattern that is a name, too."""
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "rank_pattern": {"w+x": 4}}
    config |= {
        "target_modules": ["h.0.fc", "up"],
        "layers_to_transform": [1],
        "layers_pattern": "h",
    }
    rules = Rules(config)
    targeted = [rules.is_targeted(name) for name in ("h.0.fc", "h.0.up", "h.1.up", "up.0.fc")]
    assert targeted == [True, False, True, False]
    assert (rules.rank("w+x"), rules.rank("wwx"), rules.rank("w-x")) == (4, 4, 2)


def test_patterns_are_read_as_peft_does(folder):
    """The first that matches counts; a pattern may be the end of a name."""
    model = Model()
    edit_config(folder, alpha_pattern={"up": 6, r"layers\.\d\.(up|down)": 9})
    nys.lora.load_peft(model, folder, names=NAMES)
    alphas = {p: m.adapters["default"].alpha for p, m in nys.lora.adapted_layers(model).items()}
    assert alphas == dict.fromkeys(NAMES, 3) | {"layers.up": 6, "layers.down": 9}
