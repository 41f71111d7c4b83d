"""Vectors of sentences from MiniLM, and a classifier trained on two of them.

`make weights` fetches the folder of weights.
"""

# region vectors
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import nyscaled as nys

key = jax.random.key(0)
encoder, tokenizer = nys.models.load("build/weights/all-MiniLM-L6-v2")
tokens, mask = tokenizer(["A cat sat.", "A cat was sitting.", "Stocks fell."])
vectors = nys.models.sentence_vectors(encoder(tokens, mask), mask)
print(jax.device_get(vectors @ vectors.T).round(2))
# endregion vectors

# region classify
model = nys.models.BertClassifier(encoder, ["negative", "positive"], rngs=nnx.Rngs(0))
nys.lora.apply(model, rank=8, targets=r".*(query|value)", init="nora", key=key)
tokens, mask = tokenizer(["a joy from start to end", "dull and far too long"])
trained = nnx.Any(nnx.LoRAParam, nnx.PathContains("classifier"))
optimizer = nnx.Optimizer(model, nys.nora_plus(optax.adamw(1e-3)), wrt=trained)


@nnx.jit
def label_step(model, optimizer, tokens, mask, labels):
    def loss(model):
        logits = model(tokens, mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, trained))(model)
    optimizer.update(model, grads)
    return value


labels = jnp.array([1, 0])
for _ in range(8):
    print(float(label_step(model, optimizer, tokens, mask, labels)))
nys.lora.save_peft(
    model,
    "reviews",
    base_model="sentence-transformers/all-MiniLM-L6-v2",
    modules_to_save=["classifier"],
    task_type="SEQ_CLS",
)
# endregion classify
