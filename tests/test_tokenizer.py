"""Text to arrays and chats to text; tokenizers of folders."""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors
from tokenizers.processors import TemplateProcessing

import nyscaled as nys
from nyscaled.models import Tokenizer

FIXTURES = Path(__file__).parent / "fixtures"
WORDS = ["[PAD]", "[CLS]", "[SEP]", "a", "b", "c", "d"]
MESSAGES = [{"role": "user", "content": "a <b> & é"}, {"role": "assistant", "content": "c"}]


def words():
    """A tokenizer as BERT's: [CLS] a [SEP] b [SEP]."""
    inner = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, "[PAD]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 1), ("[SEP]", 2)],
    )
    inner.add_special_tokens(WORDS[:3])
    return inner


@pytest.fixture
def tokenizer():
    return Tokenizer(words(), {"pad_token": "[PAD]"})


def test_batches(tokenizer):
    left, mask = tokenizer(["a b c", "d"])
    assert (left.dtype, mask.dtype) == (np.int32, bool)
    np.testing.assert_array_equal(left, [[1, 3, 4, 5, 2], [0, 0, 1, 6, 2]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    right, mask = tokenizer(["a b c", "d"], side="right", multiple_of=4)
    np.testing.assert_array_equal(right, [[1, 3, 4, 5, 2, 0, 0, 0], [1, 6, 2, 0, 0, 0, 0, 0]])
    np.testing.assert_array_equal(mask.sum(1), [5, 3])
    bare, _ = tokenizer(["a b c", ""], add_special_tokens=False)
    np.testing.assert_array_equal(bare, [[3, 4, 5], [0, 0, 0]])
    assert tokenizer([""], add_special_tokens=False)[1].shape == (1, 1)


def test_texts_that_are_too_long_keep_their_special_tokens(tokenizer):
    cut, mask = tokenizer(["a b c d", "d"], max_length=4, multiple_of=4)
    np.testing.assert_array_equal(cut, [[1, 3, 4, 2], [0, 1, 6, 2]])
    assert mask.sum() == 7
    assert tokenizer.encode("a b c d").ids == [1, 3, 4, 5, 6, 2]  # the library's is not changed
    tokens, mask, types = tokenizer.pairs(["a b c d"], ["d c"], max_length=6, multiple_of=8)
    np.testing.assert_array_equal(tokens, [[1, 3, 4, 2, 6, 2, 0, 0]])
    np.testing.assert_array_equal(types, [[0, 0, 0, 0, 1, 1, 0, 0]])


def bare():
    inner = words()
    inner.post_processor = processors.ByteLevel()  # adds nothing
    return inner


def swapped():
    """Pairs whose second text comes first."""
    inner = words()
    special = [("[CLS]", 1), ("[SEP]", 2)]
    inner.post_processor = TemplateProcessing(
        single="[CLS] $A", pair="$B:1 [SEP]:1 [CLS] $A [SEP]", special_tokens=special
    )
    return inner


TEXT = st.lists(st.sampled_from([*WORDS, "x"]), max_size=9).map(" ".join)


@pytest.mark.long
@pytest.mark.parametrize("make", [words, bare, swapped])
@hypothesis.given(TEXT, TEXT, st.integers(3, 20))
@hypothesis.settings(max_examples=200)
def test_texts_are_cut_as_the_library_cuts_them(make, first, second, length):
    """The texts have special tokens in them."""
    tokenizer, library = Tokenizer(make(), {"pad_token": "[PAD]"}), make()
    library.enable_truncation(length)
    for special in (True, False):
        tokens, mask = tokenizer([first], max_length=length, add_special_tokens=special)
        assert list(tokens[mask]) == library.encode(first, add_special_tokens=special).ids
    expected = library.encode(first, second)
    tokens, mask, types = tokenizer.pairs([first], [second], max_length=length)
    assert (list(tokens[mask]), list(types[mask])) == (expected.ids, expected.type_ids)


def test_calls_at_once_do_not_cut_one_another(tokenizer):
    texts = ["a b c d " * 50] * 20

    def width(length):
        return {tokenizer(texts, max_length=length)[0].shape[1] for _ in range(20)}

    with ThreadPoolExecutor() as pool:
        assert list(pool.map(width, (5, 90, 17, None))) == [{5}, {90}, {17}, {202}]


def test_pairs(tokenizer):
    tokens, mask, types = tokenizer.pairs(["a", "a b c"], ["b c", "d"])
    assert (tokens.dtype, mask.dtype, types.dtype) == (np.int32, bool, np.int32)
    np.testing.assert_array_equal(tokens, [[1, 3, 2, 4, 5, 2, 0], [1, 3, 4, 5, 2, 6, 2]])
    np.testing.assert_array_equal(mask, tokens != 0)
    np.testing.assert_array_equal(types, [[0, 0, 0, 1, 1, 1, 0], [0, 0, 0, 0, 0, 1, 1]])


def test_the_side_of_padding():
    """By the call, else the settings, else `tokenizer.json`, else on the left."""
    inner = words()
    tokenizer = Tokenizer(inner, {"pad_token": "[PAD]"})
    assert tokenizer(["a", "b c"])[0][0, 0] == 0
    assert Tokenizer(inner, tokenizer.settings | {"padding_side": "right"})(["a", "b c"])[1][0, 0]
    inner.enable_padding(direction="right", pad_token="d", pad_id=6)
    tokenizer = Tokenizer(inner)
    tokens, _ = tokenizer(["a", "b c"])
    np.testing.assert_array_equal(tokens, [[1, 3, 2, 6], [1, 4, 5, 2]])
    assert not tokenizer(["a", "b c"], side="left")[1][0, 0]
    inner.enable_padding(direction="right", pad_token="d", pad_id=6)
    tokenizer = Tokenizer(inner, {"pad_token": "[PAD]", "padding_side": "left"})
    np.testing.assert_array_equal(tokenizer(["a", "b c"])[0], [[0, 1, 3, 2], [1, 4, 5, 2]])
    with pytest.raises(ValueError, match="padding_side is 'both'; expected 'left' or 'right'"):
        Tokenizer(inner, {"padding_side": "both"})


@pytest.mark.parametrize("name", ["bert", "bert_encoder", "llama"])
def test_models_without_a_side_in_their_folder(name, tmp_path):
    """Encoders pad on the right, as transformers does, also after a save; decoders on the left."""
    model, _ = nys.models.load(FIXTURES / "models" / name)
    nys.models.save(model, tmp_path, Tokenizer(words(), {"pad_token": "[PAD]"}))
    for _ in range(2):
        _, tokenizer = nys.models.load(tmp_path)
        assert tokenizer(["a", "b c"])[1][0, 0] == (name != "llama")
        nys.models.save(model, tmp_path, tokenizer)
    settings = {"padding_side": "left", "pad_token": "[PAD]"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert not nys.models.load(tmp_path)[1](["a", "b c"])[1][0, 0]


def test_the_token_to_pad_with():
    given = {"pad_token": {"content": "[PAD]"}, "eos_token": "[SEP]"}
    assert Tokenizer(words(), given).pad_id == 0
    assert Tokenizer(words(), {"pad_token": None, "eos_token": "[SEP]"}).pad_id == 2
    without = Tokenizer(words())
    assert without.pad_id is None
    assert without(["a", "b"])[1].all()
    with pytest.raises(ValueError, match="padding needs a pad_token or an eos_token"):
        without(["a", "b c"])


def test_what_is_no_tokenizer_or_no_settings_is_refused(tmp_path):
    for inner in (None, "tokenizer.json"):
        with pytest.raises(ValueError, match=r"inner is .*; expected a tokenizer of the package"):
            Tokenizer(inner)
    with pytest.raises(ValueError, match="JSON has no form for"):
        Tokenizer(words(), {"x": object()}).save(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: t("a b"), "texts is 'a b'; expected a list of texts, one at least"),
        (lambda t: t([]), r"texts is \[\]"),
        (lambda t: t(["a"], max_length=0), "max_length is 0"),
        (lambda t: t(["a"], max_length=True), "max_length is True; expected a positive integer"),
        (lambda t: t(["a"], max_length=1), "max_length is 1; the special tokens alone are 2"),
        (lambda t: t.pairs(["a"], ["b"], max_length=2), "is 2; the special tokens alone are 3"),
        (lambda t: t(["a"], multiple_of=0), "multiple_of is 0; expected a positive integer"),
        (lambda t: t(["a"], multiple_of=True), "multiple_of is True"),
        (lambda t: t.pairs(["a"], []), "second is"),
        (lambda t: t.pairs(["a"], ["a", "b"]), "1 first and 2 second texts"),
        (lambda t: t.chat(MESSAGES), "the tokenizer has no chat template"),
    ],
)
def test_calls_that_are_refused(call, message, tokenizer):
    with pytest.raises(ValueError, match=message):
        call(tokenizer)


@pytest.mark.parametrize(
    ("template", "text"),
    [
        # A block takes its line, as in the templates that come with models.
        ("{% for m in messages %}\n  {% if 1 %}\n{{ m.content }};\n{% endif %}{% endfor %}", None),
        ("{{ bos_token }}{{ messages[0].content | tojson }}", '[CLS]"a <b> & é"'),
        ("{{ tools is none }}{{ undefined is defined }}{{ extra }}", "TrueFalse7"),
        ("{% if add_generation_prompt %}> {% endif %}", "> "),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("{% generation %}{{ messages[1]['content'] }}{% endgeneration %}!", "c!"),
        ("{% set n = namespace(x=1) %}{% set n.x = 2 %}{{ n.x }}", "2"),
        ("{{ strftime_now('%Y') | length }}", "4"),
    ],
)
def test_chats(template, text):
    tokenizer = Tokenizer(words(), {"bos_token": "[CLS]", "chat_template": template})
    got = tokenizer.chat(MESSAGES, add_generation_prompt=True, extra=7)
    assert got == (text or "a <b> & é;\nc;\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{% for %}", "Expected"),
        ("{{ messages + 1 }}", "can only concatenate"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ 'a'.index('b') }}", "substring not found"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "maximum recursion depth"),
    ],
)
def test_templates_that_refuse_or_do_harm(template, message):
    tokenizer = Tokenizer(words(), {"chat_template": template})
    with pytest.raises(ValueError, match=f"the chat template refuses the messages.*({message})"):
        tokenizer.chat(MESSAGES)


def test_a_template_among_several():
    named = [{"name": "default", "template": "one"}, {"name": "tool_use", "template": "two"}]
    tokenizer = Tokenizer(words(), {"chat_template": named})
    assert tokenizer.chat(MESSAGES) == "one"
    assert tokenizer.chat(MESSAGES, template="tool_use") == "two"
    assert tokenizer.chat(MESSAGES, tools=[{}]) == "two"
    assert tokenizer.chat(MESSAGES, tools=[{}], template="default") == "one"
    with pytest.raises(ValueError, match=r"no chat template 'rag'; .* has default, tool_use"):
        tokenizer.chat(MESSAGES, template="rag")


@pytest.mark.parametrize("given", [5, True, [{"x": 1}], [5], {"default": 5}, [["default", "x"]]])
def test_templates_of_another_type_are_refused(given, tmp_path):
    nys.models.save(nys.models.load(FIXTURES / "models" / "llama")[0], tmp_path, Tokenizer(words()))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": given}))
    with pytest.raises(
        ValueError, match=r"tokenizer_config\.json: chat_template is .*expected a text"
    ):
        nys.models.load(tmp_path)


def test_tokenizers_are_saved_with_models_and_loaded(tmp_path):
    inner = words()
    inner.enable_padding(length=9)
    inner.enable_truncation(2)
    model, _ = nys.models.load(FIXTURES / "models" / "llama")
    settings = {"pad_token": "[PAD]", "chat_template": "{{ messages[0].content }}"}
    nys.models.save(model, tmp_path, Tokenizer(inner, settings))
    _, again = nys.models.load(tmp_path)
    assert again.settings.items() >= settings.items()
    assert again.settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert again.encode("a b c").ids == [1, 3, 4, 5, 2]  # neither padded nor cut
    assert again.chat(MESSAGES) == "a <b> & é"
    # Older folders have special tokens in their own file, newer ones the template.
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": "[SEP]"}')
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "chat_template.jinja").write_text("{{ eos_token }} é", encoding="utf-8")
    _, again = nys.models.load(tmp_path)
    assert (again.pad_id, again.chat(MESSAGES)) == (2, "[SEP] é")
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(ValueError, match=r"tokenizer_config\.json is not JSON"):
        nys.models.load(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(ValueError, match=r"chat_template\.jinja is not a text in UTF-8"):
        nys.models.load(tmp_path)


OPT = {
    "tokenizer_class": "GPT2Tokenizer",
    "add_prefix_space": False,
    "add_bos_token": True,
    "bos_token": {"content": "</s>", "lstrip": False, "__type": "AddedToken"},
    "pad_token": "<pad>",
}


@pytest.fixture
def opt(tmp_path):
    """A folder as those of OPT, whose tokenizer is a vocabulary and its merges."""
    nys.models.save(nys.models.load(FIXTURES / "models" / "opt")[0], tmp_path)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "</s>", *alphabet, "lo", "low", "Ġlow", "##"]
    (tmp_path / "vocab.json").write_text(json.dumps({t: i for i, t in enumerate(tokens)}))
    (tmp_path / "merges.txt").write_text("#version: 0.2\nl o\nlo w\nĠ low\n# #\n", "utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(OPT))
    return tmp_path


def load_tokenizer(folder):
    return nys.models.load(folder)[1]


@pytest.mark.filterwarnings("ignore:.*has a tokenizer of")
def test_a_vocabulary_with_merges(opt):
    tokenizer = load_tokenizer(opt)
    assert tokenizer.encode("low low</s>##é").tokens == [
        *("</s>", "low", "Ġlow", "</s>", "##", "Ã", "©"),
    ]
    assert tokenizer.encode("l", "o").tokens == ["</s>", "l", "</s>", "o"]
    assert (tokenizer.pad_id, tokenizer.decode([1, 0, tokenizer.token_to_id("low")])) == (0, "low")
    changes = {"add_prefix_space": True, "add_bos_token": False, "add_eos_token": True}
    (opt / "tokenizer_config.json").write_text(json.dumps(OPT | changes))
    assert load_tokenizer(opt).encode("low").tokens == ["Ġlow", "<|endoftext|>"]
    for name, text, message in (
        ("merges.txt", "l q", "the merges are not of these tokens"),
        ("merges.txt", "l o w", "a merge is 'l o w'; expected two tokens"),
        ("vocab.json", '{"l": -1}', r"vocab\.json has ids that are none; expected integers"),
        ("vocab.json", '{"l": "o"}', r"vocab\.json has ids that are none; expected integers"),
        ("vocab.json", "[]", r"vocab\.json holds a list"),
    ):
        (opt / name).write_text(text)
        with pytest.raises(ValueError, match=message):
            nys.models.load(opt)


@pytest.mark.filterwarnings("ignore:.*has a tokenizer of")
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("special_tokens_map.json", {"additional_special_tokens": ["<x>"]}),
        ("added_tokens.json", {"<x>": 263}),
        ("tokenizer_config.json", OPT | {"additional_special_tokens": ["<x>"]}),
        ("tokenizer_config.json", OPT | {"added_tokens_decoder": {"263": {"content": "<x>"}}}),
        ("tokenizer_config.json", OPT | {"extra_special_tokens": {"image_token": "<x>"}}),
        ("tokenizer_config.json", OPT | {"model_specific_special_tokens": {"x_token": "<x>"}}),
    ],
)
def test_added_tokens_beside_a_vocabulary_with_merges(name, content, opt):
    (opt / name).write_text(json.dumps(content))
    assert load_tokenizer(opt).encode("low<x>low").tokens == ["</s>", "low", "<x>", "low"]


@pytest.mark.parametrize("changed", ["class", "merges.txt", "vocab.txt", "tokenizer.model"])
def test_tokenizers_of_other_forms_are_none_with_a_warning(changed, opt):
    if changed == "class":
        kind = {"tokenizer_class": "RobertaTokenizer"}
        (opt / "tokenizer_config.json").write_text(json.dumps(OPT | kind))
    else:
        (opt / "merges.txt").unlink()
    if changed in ("vocab.txt", "tokenizer.model"):
        (opt / "vocab.json").rename(opt / changed)
    name = changed if changed in ("vocab.txt", "tokenizer.model") else "vocab.json"
    with pytest.warns(UserWarning, match=f"has {name}, from which no tokenizer"):
        assert load_tokenizer(opt) is None


OLDER = {
    "chat_template.jinja": "old",
    "special_tokens_map.json": '{"pad_token": "[SEP]", "bos_token": "a"}',
    "added_tokens.json": '{"old": 9}',
}


@pytest.mark.parametrize("alone", [True, False])
def test_files_that_would_override_a_saved_tokenizer_go(alone, tmp_path):
    tokenizer = Tokenizer(words(), {"pad_token": "[PAD]", "chat_template": "new"})
    model, _ = nys.models.load(FIXTURES / "models" / "llama")
    nys.models.save(model, tmp_path)
    for name, text in OLDER.items():
        (tmp_path / name).write_text(text)
    nys.models.save(model, tmp_path)  # leaves them alone
    assert all((tmp_path / name).is_file() for name in OLDER)
    tokenizer.save(tmp_path) if alone else nys.models.save(model, tmp_path, tokenizer)
    _, again = nys.models.load(tmp_path)
    assert (again.pad_id, again.chat(MESSAGES)) == (0, "new")
    assert "bos_token" not in again.settings
    models = {"config.json", "generation_config.json", "model.safetensors"}
    names = {p.name for p in tmp_path.iterdir()}
    assert names == models | {"tokenizer.json", "tokenizer_config.json"}


def test_a_failure_leaves_the_tokenizer_with_the_weights(tmp_path):
    """Both are replaced, or neither."""
    model, _ = nys.models.load(FIXTURES / "models" / "llama")
    nys.models.save(model, tmp_path, Tokenizer(words(), {"chat_template": "old"}))
    (tmp_path / "added_tokens.json").mkdir()
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    with pytest.raises(ValueError, match=r"added_tokens\.json is a directory"):
        nys.models.save(model, tmp_path, Tokenizer(words(), {"chat_template": "new"}))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before
