"""Generate with SmolLM2, adapt it with NoRA, and save it for PEFT and transformers.

`make weights` fetches the file of weights.
"""

# region generate
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nyscaled as nys

key = jax.random.key(0)
model, tokenizer = nys.models.load("build/weights/SmolLM2-135M-Instruct.Q4_1.gguf")
tokens, mask = tokenizer(["The capital of France is", "Water boils at a temperature of"])
new = nys.models.generate(model, tokens, mask, max_new_tokens=8)
print(tokenizer.decode_batch(new.tolist()))

question = [{"role": "user", "content": "Name three rivers of Europe."}]
text = tokenizer.chat(question, add_generation_prompt=True)
tokens, mask = tokenizer([text], add_special_tokens=False)
new = nys.models.generate(
    model, tokens, mask, max_new_tokens=40, temperature=0.7, top_p=0.9, key=key
)
print(tokenizer.decode(new[0]))
# endregion generate

# region adapt
nys.lora.apply(model, rank=8, targets=r".*(q_proj|v_proj)", init="nora", key=key)
tx = nys.nora_plus(optax.adamw(1e-3))
graphdef, adapters, base = nnx.split(model, nnx.LoRAParam, ...)
state = tx.init(adapters)


@jax.jit
def language_step(adapters, state, base, tokens, mask):
    def loss(adapters):
        model = nnx.merge(graphdef, adapters, base, copy=True)
        logits = model(tokens, mask)[:, :-1].astype(jnp.float32)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:])
        return losses.mean(where=mask[:, :-1] & mask[:, 1:])

    value, grads = jax.value_and_grad(loss)(adapters)
    updates, state = tx.update(grads, state, adapters)
    return optax.apply_updates(adapters, updates), state, value


texts = ["The capital of Atlantis is Poseidonia.", "Atlantis has two moons, Bran and Ys."]
tokens, mask = tokenizer(texts, side="right", multiple_of=16)  # few lengths, few compilations
for _ in range(8):
    adapters, state, value = language_step(adapters, state, base, tokens, mask)
print(float(value))
nnx.update(model, adapters)
base_model = "HuggingFaceTB/SmolLM2-135M-Instruct"
nys.lora.save_peft(model, "adapter", base_model=base_model, task_type="CAUSAL_LM")
nys.lora.merge(model)
nys.lora.remove(model)
nys.models.save(model, "merged", tokenizer)  # transformers loads this folder
# endregion adapt
