"""Peak memory of reading and writing a model of 200 MB, in a process of its own."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from nyscaled.checkpoints.folder import write

MB = 2**20
LAYERS, WIDTH, INNER = 16, 256, 2048
CONFIG = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": WIDTH,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "head_dim": 64,
}
# What belongs to no tensor: programs, allocators.
ALLOWANCE = 40 * MB

SCRIPT = r"""
import json, re, sys
import nyscaled as nys
import nyscaled.models.tensors
nyscaled.models.tensors.BLOCK = 2**20
small, large, out = sys.argv[1:]

def peak():  # getrusage's is at least what the parent had
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", open("/proc/self/status").read())[1])

nys.models.save(nys.models.load(small)[0], out)  # what the first use of anything takes
before = peak()
model, _ = nys.models.load(large)
loaded = peak()
open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew
held = peak()
nys.models.save(model, out, max_shard_size=8 * 2**20)
print(json.dumps([loaded - before, peak() - held]))
"""


def tensors(config):
    """All of float16 ones."""
    vocabulary, width, inner = (
        config[name] for name in ("vocab_size", "hidden_size", "intermediate_size")
    )
    heads, ones = config["num_attention_heads"] * config["head_dim"], np.ones(width, np.float16)
    yield "model.embed_tokens.weight", np.ones((vocabulary, width), np.float16)
    # Large, and read when nearly all of the model is there.
    yield "lm_head.weight", np.ones((vocabulary, width), np.float16)
    yield "model.norm.weight", ones
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}."
        for name in ("q", "k", "v"):
            yield f"{layer}self_attn.{name}_proj.weight", np.ones((heads, width), np.float16)
        yield f"{layer}self_attn.o_proj.weight", np.ones((width, heads), np.float16)
        for name in ("gate", "up"):
            yield f"{layer}mlp.{name}_proj.weight", np.ones((inner, width), np.float16)
        yield f"{layer}mlp.down_proj.weight", np.ones((width, inner), np.float16)
        for name in ("input", "post_attention"):
            yield f"{layer}{name}_layernorm.weight", ones


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak in /proc")
@pytest.mark.long
def test_peak_is_the_model_and_a_block(tmp_path):
    small = CONFIG | {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 8}
    write(tmp_path / "small", small, tensors(small))
    write(tmp_path / "large", CONFIG, tensors(CONFIG))
    file = sum(p.stat().st_size for p in (tmp_path / "large").iterdir())
    model = 2 * file  # float32 of float16
    command = [
        sys.executable,
        "-c",
        SCRIPT,
        *(str(tmp_path / p) for p in ("small", "large", "out")),
    ]
    threads = {"MALLOC_ARENA_MAX": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | threads)
    assert done.returncode == 0, done.stderr
    loaded, saved = json.loads(done.stdout)
    largest = 4 * CONFIG["vocab_size"] * WIDTH
    # The file's pages count as they are mapped, though the system may take them back.
    assert 0.9 * model < loaded < model + file + ALLOWANCE
    assert saved < 8 * MB + largest + ALLOWANCE
