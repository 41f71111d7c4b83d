"""Make images of a text, and adapt a U-Net to a subject, on a tiny pipeline with random weights."""

# region generate
import jax
import optax
from flax import nnx

import nyscaled as nys

key = jax.random.key(0)
pipe = nys.diffusion.load("tests/fixtures/diffusion/sd1")  # or any folder, or owner/name
images = nys.diffusion.generate(pipe, ["a photo of a dog"], key=key, steps=4, guidance=7.5)
print(images.shape)
# endregion generate

# region adapt
attention = r".*\.(to_q|to_k|to_v|to_out\.0)"
layers = nys.lora.apply(pipe.unet, rank=4, targets=attention, init="nora", key=key)
optimizer = nnx.Optimizer(pipe.unet, nys.nora_plus(optax.adamw(1e-4)), wrt=nnx.LoRAParam)


def loss(unet, latents, context, noise, times):
    return nys.diffusion.denoising_loss(unet, pipe.schedule, latents, context, noise, times)


@nnx.jit
def step(unet, optimizer, autoencoder, images, context, key):
    keys = jax.random.split(key, 3)
    latents = autoencoder.encode(images, key=keys[0])
    noise = jax.random.normal(keys[1], latents.shape)
    times = jax.random.randint(keys[2], (len(latents),), 0, 1000)
    wrt = nnx.DiffState(0, nnx.LoRAParam)
    value, grads = nnx.value_and_grad(loss, argnums=wrt)(unet, latents, context, noise, times)
    optimizer.update(unet, grads)
    return value


context = pipe.encode_texts(["a photo of sks dog"])
photos = 2 * images - 1  # from −1 to 1; here the pipeline's own
for i in range(3):
    value = step(
        pipe.unet, optimizer, pipe.autoencoder, photos, context, jax.random.fold_in(key, i)
    )
print(len(layers), f"{value:.2f}")
nys.lora.save_diffusers(pipe.unet, "build/adapter")  # for load_lora_weights of diffusers
# endregion adapt
