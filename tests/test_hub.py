"""Models of the Hugging Face hub, through a stand-in for its client."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from model_cases import MODELS, arrays

import nyscaled as nys

TOOLS = "additional_chat_templates/tool_use.jinja"


class Hub:
    """Stands for huggingface_hub: one repository, whose files are a fixture's."""

    def __init__(self, monkeypatch, cache):
        import huggingface_hub

        self.cache, self.asked = cache, []
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def download(self, name, *, revision, allow_patterns, ignore_patterns):
        from huggingface_hub.errors import LocalEntryNotFoundError
        from huggingface_hub.utils import filter_repo_objects

        self.asked.append((name, revision))
        if name == "owner/broken":
            raise RuntimeError("the connection broke")
        if name != "owner/llama":
            raise LocalEntryNotFoundError(f"no {name} in the cache, and no network")
        names = ["config.json", "model.safetensors", "merges.txt", "pytorch_model.bin", "a/b.json"]
        names += [
            "onnx/config.json",
            "model/x.safetensors",
            "other.json",
            TOOLS,
            "a/tool_use.jinja",
        ]
        options = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        for file in filter_repo_objects(names, **options):
            there = MODELS / "llama" / file
            (self.cache / file).parent.mkdir(exist_ok=True)
            (self.cache / file).write_bytes(there.read_bytes() if there.is_file() else b"")
        if revision == "pickled":
            (self.cache / "model.safetensors").unlink()
        return str(self.cache)


def test_models_of_the_hub(monkeypatch, tmp_path):
    hub = Hub(monkeypatch, tmp_path)
    got, _ = nys.models.load("owner/llama", revision="v1")
    expected, _ = nys.models.load(MODELS / "llama")
    jax.tree.map(np.testing.assert_array_equal, arrays(got), arrays(expected))
    assert hub.asked == [("owner/llama", "v1")]
    expected = {"config.json", "model.safetensors", "merges.txt", TOOLS}
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == expected
    with pytest.raises(ValueError, match=r"owner/other is not a folder here.*no network"):
        nys.models.load("owner/other")
    with pytest.raises(ValueError, match=r"owner/broken is not a folder here.*connection broke"):
        nys.models.load("owner/broken")
    for local in (MODELS / "llama", str(MODELS / "llama"), Path("owner/llama")):
        with pytest.raises(ValueError, match="is not from the hub; expected no revision, got 'v1'"):
            nys.models.load(local, revision="v1")
    with pytest.raises(ValueError, match=r"came without model\*\.safetensors: .*refs/pr/N"):
        nys.models.load("owner/llama", revision="pickled")
    assert len(hub.asked) == 4
    # A folder here comes before a repository of the same name.
    monkeypatch.chdir(tmp_path)
    shutil.copytree(MODELS / "llama3", "owner/llama")
    assert nys.models.load("owner/llama")[0].config.head_dim == 8
    assert len(hub.asked) == 4
    assert json.loads(Path("owner/llama/config.json").read_text())["head_dim"] == 8
