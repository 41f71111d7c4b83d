"""Models with adapters pass from process to process by pickle, as plain ones do."""

import copy
import importlib.util
import pickle
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx
from lora_cases import apply, call, inputs, net

import nyscaled as nys

READ = """
import pickle, sys
import numpy as np
sys.path.insert(0, {tests!r})
with open({path!r}, "rb") as file:
    graphdef, state, model, x, expected = pickle.load(file)
from flax import nnx
import nyscaled as nys
for again in (nnx.merge(graphdef, state), model):
    np.testing.assert_allclose(again(x), expected, atol=1e-6)
    assert nnx.graphdef(again) == graphdef
    nys.lora.remove(again)
    assert type(again.blocks[0].up) is nnx.Linear
"""


def adapted():
    model = net()
    apply(model, "pissa", dropout=0.1)
    apply(model, name="second")
    model.eval()
    return model


@pytest.mark.long
@pytest.mark.parametrize("by", ["pickle", "cloudpickle"])
def test_a_fresh_process_reads_what_was_pickled(by, tmp_path):
    dumps = pickle.dumps if by == "pickle" else pytest.importorskip(by).dumps
    model, path = adapted(), tmp_path / "model"
    path.write_bytes(
        dumps((*nnx.split(model), model, np.asarray(inputs()), np.asarray(call(model))))
    )
    tests = str(importlib.util.find_spec("lora_cases").origin).rpartition("/")[0]
    script = READ.format(tests=tests, path=str(path))
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)


def test_layers_of_equal_names_stay_apart():
    def make():
        class Dense(nnx.Linear):
            """Not one that a module has."""

        return Dense

    kinds = [make(), make()]
    model = nnx.Sequential(*(kind(4, 4, rngs=nnx.Rngs(0)) for kind in kinds))
    nys.lora.apply(model, 2, targets=".*", key=jax.random.key(0))
    assert [type(layer).base_class for layer in model.layers] == kinds
    with pytest.raises((pickle.PicklingError, AttributeError), match="local"):
        pickle.dumps(nnx.graphdef(model))  # as without adapters


def test_copies():
    model = adapted()
    for again in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert nnx.graphdef(again) == nnx.graphdef(model)
        assert hash(nnx.graphdef(again)) == hash(nnx.graphdef(model))
        np.testing.assert_array_equal(call(again), call(model))
        again.blocks[0].up.kernel[...] += 1  # of its own
    np.testing.assert_array_equal(model.blocks[0].up.kernel[...], net().blocks[0].up.kernel[...])
