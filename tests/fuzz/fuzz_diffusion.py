"""The files of Stable Diffusion: settings, tokenizers, weights, and adapters in two namings."""

import functools
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from fuzz_target import TESTS, Target, array

PIPELINE = TESTS / "fixtures" / "diffusion" / "sd1"
WEIGHTS, ADAPTERS = "diffusion_pytorch_model.safetensors", "pytorch_lora_weights.safetensors"
SIDES = {"to_q": (6, 8), "proj_in": (8, 5)}


def _make_pipeline(folder: Path) -> None:
    without = shutil.ignore_patterns("expected.safetensors")
    shutil.copytree(PIPELINE, folder, dirs_exist_ok=True, ignore=without)


def _arrays(model: Any) -> Any:
    from flax import nnx

    flat = nnx.to_flat_state(nnx.state(model))
    return {".".join(map(str, path)): array(value[...]) for path, value in flat}


def _read_pipeline(folder: Path, full: bool) -> Any:
    import nyscaled as nys
    from nyscaled.diffusion import samplers

    pipe = nys.diffusion.load(folder)
    samplers_of = [(name, 3) for name in ("ddim", "plms", "euler", "ddpm")]
    for name, steps in samplers_of if pipe.schedule.num_train_timesteps >= 100 else ():
        numbers = samplers.table(pipe.schedule, name, steps)
        assert all(np.isfinite(x).all() for x in numbers), f"numbers of {name} are not finite"
    if full:
        models = (pipe.unet, pipe.autoencoder, pipe.text_encoder)
        return repr(pipe.schedule), [(repr(m.config), _arrays(m)) for m in models]
    return repr(pipe.schedule), repr(pipe.unet.config), repr(pipe.autoencoder.config)


def _make_clip(folder: Path) -> None:
    shutil.copytree(PIPELINE / "tokenizer", folder, dirs_exist_ok=True)
    (folder / "expected.safetensors").unlink()
    token = {"content": "<|endoftext|>", "special": True, "lstrip": False, "normalized": True}
    (folder / "special_tokens_map.json").write_text(json.dumps({"pad_token": token}))


def _read_clip(folder: Path, full: bool) -> Any:
    from nyscaled.diffusion.tokenizer import open_clip_tokenizer, text_tokens

    tokenizer = open_clip_tokenizer(folder)
    texts = ["a photo of the dog's tail", "é 12 <|endoftext|>", ""]
    return text_tokens(tokenizer, texts, 20).tolist(), repr(sorted(tokenizer.settings, key=str))


def _make_unet(folder: Path) -> None:
    for name in ("config.json", WEIGHTS):
        shutil.copy(PIPELINE / "unet" / name, folder)


@functools.cache
def _outline() -> Any:
    import nyscaled as nys
    from nyscaled.models import Numerics

    config = json.loads((PIPELINE / "unet" / "config.json").read_text())
    return nys.diffusion.UNet.outline(nys.diffusion.UNetConfig.from_json(config), Numerics())


def _read_unet(folder: Path, full: bool) -> Any:
    import nyscaled as nys
    from nyscaled.checkpoints.folder import open_folder
    from nyscaled.diffusion.component import matched

    if full:
        return _arrays(nys.diffusion.load_unet(folder))
    opened = open_folder(folder, nys.diffusion.UNet.stem)
    places = matched(opened, _outline()).values()
    return {place.names[0]: array(opened.read(place.names[0])) for place in places}


def _layers() -> Any:
    from flax import nnx

    return nnx.Dict({n: nnx.Linear(*sides, rngs=nnx.Rngs(0)) for n, sides in SIDES.items()})


def _make_adapters(folder: Path) -> None:
    import jax
    import safetensors.numpy

    import nyscaled as nys

    model = _layers()
    nys.lora.apply(model, 2, 6.0, targets=".*", init="pissa", key=jax.random.key(0))
    nys.lora.save_diffusers(model, folder / "peft")
    generator, tensors = np.random.default_rng(0), {}
    for name, (inputs, outputs) in SIDES.items():
        for side, shape in (("down", (2, inputs)), ("up", (outputs, 2))):
            factor = generator.normal(size=shape).astype("f")
            tensors[f"lora_unet_{name}.lora_{side}.weight"] = factor
        tensors[f"lora_unet_{name}.alpha"] = np.array(3, "f")
    (folder / "kohya").mkdir()
    safetensors.numpy.save_file(tensors, folder / "kohya" / ADAPTERS)


def _read_adapters(folder: Path, full: bool) -> Any:
    import jax.numpy as jnp

    import nyscaled as nys
    from nyscaled.checkpoints import diffusers_lora

    meanings = []
    for path in sorted(folder.iterdir()):
        if full:
            model = _layers()
            layers = nys.lora.load_diffusers(model, path)
            outputs = {n: layer(jnp.ones((1, SIDES[n][0]))) for n, layer in layers.items()}
            assert all(np.isfinite(y).all() for y in outputs.values()), "outputs are not finite"
            meanings.append({name: array(y) for name, y in outputs.items()})
        else:
            saved = diffusers_lora.read(path, {"unet": SIDES})["unet"].updates
            meanings.append({m: (array(u.down), array(u.up), u.alpha) for m, u in saved.items()})
    return meanings


JSONS = "config.json", "scheduler_config.json", "model_index.json"
TOKENS = "vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json"
DIFFUSION = {
    "clip": Target(_make_clip, TOKENS, _read_clip),
    "unet": Target(_make_unet, (WEIGHTS,), _read_unet),
    "diffusers": Target(_make_adapters, (ADAPTERS,), _read_adapters),
    "pipeline": Target(_make_pipeline, JSONS, _read_pipeline),
}
