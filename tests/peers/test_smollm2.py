"""SmolLM2, real and quantized, against transformers on the same file: text, tokens, logits."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is a file

import pydoc_data.topics
from pathlib import Path

import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import tokenizers  # noqa: E402
from flax import nnx  # noqa: E402

import nyscaled as nys  # noqa: E402

WEIGHTS = Path(__file__).parents[2] / "build" / "weights"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
pytestmark = pytest.mark.skipif(
    not (WEIGHTS / FILE).is_file(), reason=f"no {FILE}: `make weights` fetches it"
)
PARAGRAPH = (
    "The Sun is the star at the center of the Solar System. It is a great ball of hot gas, made "
    "mostly of hydrogen and helium, and it gives the Earth light and heat. The Earth takes one "
    "year to go around the Sun, and the Moon takes about one month to go around the Earth. Plants "
    "use the light of the Sun to make food from water and air, and animals eat the plants. Without "
    "the Sun there would be no life on Earth."
)
UNUSUAL = [
    "naïve Ångström e\u0301 ﬁ ſ, 中文 日本語, עברית العربية हिन्दी",
    "🤖👩‍👩‍👧 \u200b\u00a0\u3000 ½ Ⅷ ² ٣ \x00\x07\ufffd",
    "<|im_start|>user<|im_end|><|endoftext|> <file_sep>",
    "\ttabs\t\t and \r\n lines\r\n\r\n   ",
]
CHAT = [
    {"role": "user", "content": "What is 12 + 30?\n"},
    {"role": "assistant", "content": "42 <exactly> & no more"},
    {"role": "user", "content": "Why?"},
]


@pytest.fixture(scope="module")
def ours():
    return nys.models.load(WEIGHTS / FILE)


@pytest.fixture(scope="module")
def theirs():
    model = transformers.AutoModelForCausalLM.from_pretrained(
        WEIGHTS, gguf_file=FILE, dtype=torch.float32
    )
    return model.eval()


@pytest.fixture(scope="module")
def their_tokenizer():
    return transformers.AutoTokenizer.from_pretrained(WEIGHTS, gguf_file=FILE)


@pytest.fixture(scope="module")
def lines():
    """English with code, from the documentation that comes with Python, and unusual characters."""
    texts = (line for topic in pydoc_data.topics.topics.values() for line in topic.splitlines())
    return [line for line in texts if line.strip()][:3000] + UNUSUAL


@nnx.jit
def logits(model, tokens):
    return model(tokens)


def test_tokens_are_those_of_transformers(ours, their_tokenizer, lines):
    _, tokenizer = ours
    got = [encoding.ids for encoding in tokenizer.encode_batch(lines)]
    assert all(tokenizer.decode(ids, False) == line for ids, line in zip(got, lines, strict=True))
    # transformers 5.23 reads "smollm" as "gpt-2": its digits are not apart from what precedes them.
    # That matters where the spaces before a digit are several. Elsewhere the two agree:
    expected = their_tokenizer(lines)["input_ids"]
    differ = [line for line, a, b in zip(lines, got, expected, strict=True) if a != b]
    assert all(any(c.isnumeric() for c in line) for line in differ)
    assert len(differ) < 50 < len([line for line in lines if any(map(str.isnumeric, line))])
    # … and everywhere, once it is given the digits of the model's own tokenizer.json.
    split = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    their_tokenizer.backend_tokenizer.pre_tokenizer = split
    assert got == their_tokenizer(lines)["input_ids"]


@pytest.mark.parametrize("prompt", [False, True])
def test_chats_are_those_of_transformers(prompt, ours, their_tokenizer):
    options = {"add_generation_prompt": prompt}
    expected = their_tokenizer.apply_chat_template(CHAT, tokenize=False, **options)
    assert ours[1].chat(CHAT, **options) == expected
    assert expected.count("<|im_start|>") == 4 + prompt


def test_logits_are_those_of_transformers(ours, theirs):
    model, tokenizer = ours
    tokens, _ = tokenizer([PARAGRAPH])
    got = np.asarray(logits(model, tokens))
    with torch.no_grad():
        expected = theirs(input_ids=torch.tensor(tokens)).logits.numpy()
    np.testing.assert_allclose(got, expected, atol=1e-3, rtol=0)  # of up to 35; 2e-4 was seen
    losses = [
        optax.softmax_cross_entropy_with_integer_labels(x[0, :-1], tokens[0, 1:]).mean()
        for x in (got, expected)
    ]
    np.testing.assert_allclose(*losses, atol=1e-5, rtol=0)
    assert losses[0] < 2  # 1.90 was seen, and 3.59 with q and k in llama.cpp's order


def test_prompts_are_continued_as_in_transformers(ours, theirs):
    model, tokenizer = ours
    tokens, mask = tokenizer(
        ["The capital of France is", "Once upon a time", "Two plus two is 4, so"]
    )
    assert not mask.all()
    new = nys.models.generate(model, tokens, mask, max_new_tokens=20)
    ids, seen = torch.tensor(tokens).long(), torch.tensor(mask).long()
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": tokenizer.pad_id}
    expected = theirs.generate(ids, attention_mask=seen, **options).numpy()[:, tokens.shape[1] :]
    np.testing.assert_array_equal(new, expected)
    assert tokenizer.decode(new[0]).startswith(" Paris")


def test_the_saved_tokenizer_in_transformers(ours, lines, tmp_path):
    """As `nys.models.save` writes it; transformers would choose another by the model's class."""
    _, tokenizer = ours
    tokenizer.save(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again(lines)["input_ids"] == [e.ids for e in tokenizer.encode_batch(lines)]
    assert again.apply_chat_template(CHAT, tokenize=False) == tokenizer.chat(CHAT)
    assert again.pad_token_id == tokenizer.pad_id == 2
    assert (again.bos_token, again.eos_token) == ("<|im_start|>", "<|im_end|>")
