"""Tokens and settings that stand beside `tokenizer.json`; ids are those of transformers.

`peers/test_special_tokens.py` compares the same and more with transformers itself.
"""

import pytest
from tokenizer_cases import byte_level, sentence_piece, token, word_piece, written
from tokenizers import processors

import nyscaled as nys
from nyscaled.models.tokenizers.files import open_tokenizer


def opened(folder, *args, **options):
    return open_tokenizer(written(folder, *args, **options))


def test_tokens_that_only_the_settings_have(tmp_path):
    """They follow the vocabulary in an order that is not theirs: end, pad, those without a role."""
    settings = {
        "additional_special_tokens": ["<|user|>", token("<x>", lstrip=True)],
        "pad_token": "[PAD]",
        "eos_token": "<|end|>",
        "image_token": "<image>",
        "extra": "no token",
    }
    tokenizer = opened(tmp_path, byte_level(), settings)
    assert tokenizer.encode("<|end|>[PAD]<image><|user|>he  <x>").ids == [
        *(259, 260, 261, 262, 258, 263),
    ]
    assert tokenizer.pad_id == 260
    assert tokenizer.decode([258, 259, 262]) == "he"  # they are special
    # Once saved, they are in the file, and transformers has no need of a list.
    tokenizer.save(tmp_path / "saved")
    (tmp_path / "saved" / "tokenizer_config.json").unlink()
    again = open_tokenizer(tmp_path / "saved")
    assert again.encode("<|user|>he<x>").ids == [262, 258, 263]


def test_tokens_of_the_older_files(tmp_path):
    """`special_tokens_map.json` comes before the settings, unless these list the added tokens."""
    special = {"pad_token": {"content": "<p>", "lstrip": True}, "eos_token": "<s>"}
    others = {"special_tokens_map": special, "added_tokens": {"<b>": 301, "<a>": 300, "<p>": 299}}
    settings = {"pad_token": "<end>", "cls_token": "<c>"}
    tokenizer = opened(tmp_path, byte_level(), settings, **others)
    assert tokenizer.encode("<p><a><b><c>").ids == [259, 260, 261, 262]
    assert tokenizer.pad_id == 259
    assert tokenizer.decode([259, 260]) == "<a>"  # which is not special
    settings["added_tokens_decoder"] = {"301": {"content": "<b>"}, "300": {"content": "he"}}
    tokenizer = opened(tmp_path, byte_level(), settings, **others)
    assert tokenizer.encode("<b><c><p>").ids[:2] == [259, 260]
    assert len(tokenizer.encode("<p>").ids) == 3
    assert tokenizer.pad_id == 0


def test_named_extra_tokens(tmp_path):
    settings = {"extra_special_tokens": {"image": "<image>", "boi_token": "<boi>"}}
    settings["chat_template"] = "{{ image }}{{ boi_token }}"
    tokenizer = opened(tmp_path, byte_level(), settings)
    assert tokenizer.encode("<boi><image>").ids == [260, 259]
    assert tokenizer.chat([{"role": "user"}]) == "<image><boi>"


@pytest.mark.parametrize(
    ("settings", "ids"),
    [
        ({}, {"Hello": [5], "Café": [6], "中文": [10, 1]}),
        ({"do_lower_case": False}, {"Hello": [8], "Café": [1], "中文": [10, 1]}),
        ({"do_lower_case": False, "strip_accents": True}, {"Hello": [8], "Café": [9]}),
        ({"strip_accents": False, "tokenize_chinese_chars": False}, {"Café": [7], "中文": [11]}),
        ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"Hello": [8], "Café": [1]}),
    ],
)
def test_bert_normalizes_as_its_settings_say(settings, ids, tmp_path):
    """Without a class in the settings by the model; the general class follows the file."""
    inner = word_piece(lowercase=False, strip_accents=False)
    tokenizer = opened(tmp_path, inner, settings, "bert")
    general = "tokenizer_class" in settings
    for text, expected in ids.items():
        assert tokenizer.encode(text).ids == (expected if general else [2, *expected, 3])
    if not general:
        assert tokenizer.pad_id == 0
        assert tokenizer.encode("Hello", "hello").type_ids == [0, 0, 0, 1, 1]
    tokenizer.save(tmp_path)
    again = open_tokenizer(tmp_path)
    assert again.encode("Hello Café 中文").ids == tokenizer.encode("Hello Café 中文").ids


def test_bert_begins_and_ends_with_the_tokens_of_its_settings(tmp_path):
    settings = {"tokenizer_class": "BertTokenizer", "cls_token": "<s>", "sep_token": "<new>"}
    assert opened(tmp_path, word_piece(), settings).encode("hello").ids == [12, 5, 13]


@pytest.mark.parametrize("prefix", [False, True])
def test_a_space_before_the_text(prefix, tmp_path):
    """By the settings of GPT-2's class and of LLaMA's; the general one follows the file."""
    inner = byte_level(prefix)
    for name, settings, expected in (
        ("GPT2TokenizerFast", {}, False),
        ("GPT2Tokenizer", {"add_prefix_space": True}, True),
        ("GPT2Tokenizer", {"add_prefix_space": None}, False),
        ("PreTrainedTokenizerFast", {"add_prefix_space": not prefix}, prefix),
        ("LlamaTokenizer", {"add_prefix_space": not prefix}, prefix),  # Llama 3's, so labelled
    ):
        tokenizer = opened(tmp_path, inner, {"tokenizer_class": name, **settings})
        assert (tokenizer.encode("he").tokens[0] == "Ġ") == expected, name
    for settings, expected in (({}, True), ({"add_prefix_space": prefix}, prefix)):
        settings["tokenizer_class"] = "LlamaTokenizerFast"
        tokenizer = opened(tmp_path, sentence_piece(), settings)
        assert tokenizer.encode("he").tokens == (["▁he"] if expected else ["he"])
        assert tokenizer.decode(tokenizer.encode("he he").ids) == "he he"


def test_special_tokens_of_a_model_by_their_roles(tmp_path):
    settings = {"model_specific_special_tokens": {"image_token": "<image>"}, "eos_token": "</s>"}
    tokenizer = opened(tmp_path, byte_level(), settings)
    assert tokenizer.encode("<image></s>").ids == [260, 259]
    assert tokenizer.decode([258, 260]) == "he"
    # transformers takes what stands beside them in their place.
    for name, value in (("x_token", "<x>"), ("extra_special_tokens", {"x_token": "<x>"})):
        tokenizer = opened(tmp_path, byte_level(), settings | {name: value})
        assert tokenizer.encode("<x></s>").ids == [260, 259]
        assert len(tokenizer.encode("<image>").ids) > 1


def test_a_class_with_other_rules_is_named(tmp_path):
    settings = {"tokenizer_class": "RobertaTokenizerFast"}
    with pytest.warns(UserWarning, match="a tokenizer of the class RobertaTokenizer: what that"):
        opened(tmp_path, byte_level(), settings)
    electra = opened(tmp_path, word_piece(), {"tokenizer_class": "ElectraTokenizer"}, "bert")
    assert electra.encode("Hello").ids == [2, 5, 3]


def test_a_link_to_nothing_is_no_absence(tmp_path):
    folder = written(tmp_path, byte_level(), {})
    for name in ("chat_template.jinja", "special_tokens_map.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to("a blob that is lost")
        with pytest.raises(ValueError, match=rf"No such file.*{name}"):
            open_tokenizer(folder)
        (folder / name).unlink()
        if name == "tokenizer.json":
            assert open_tokenizer(folder) is None


def test_classes_have_tokens_of_their_own(tmp_path):
    tokenizer = opened(tmp_path, byte_level(), {"tokenizer_class": "GPT2Tokenizer"})
    assert tokenizer.encode("<|endoftext|>").ids == [259]
    assert tokenizer.pad_id == 259
    tokenizer = opened(tmp_path, sentence_piece(), {"tokenizer_class": "LlamaTokenizer"})
    assert tokenizer.pad_id == 2


def test_ends_are_those_of_the_file(tmp_path):
    """Not of `add_bos_token`, which counts where there is no `tokenizer.json`."""
    inner = byte_level()
    settings = {"bos_token": "<s>", "add_bos_token": True, "add_eos_token": True}
    assert opened(tmp_path, inner, settings).encode("he").ids == [258]
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    settings["add_bos_token"] = False
    assert opened(tmp_path, inner, settings).encode("he").ids == [1, 258]


def test_special_tokens_as_text(tmp_path):
    tokenizer = opened(tmp_path, byte_level(), {"split_special_tokens": True})
    assert len(tokenizer.encode("<s>").ids) == 3


def test_a_list_of_added_tokens_takes_others_from_classes(tmp_path):
    """They make their tokenizer anew, of the vocabulary and the list."""
    settings = {"added_tokens_decoder": {"1": {"content": "<s>"}}}
    for name, count in (("GPT2Tokenizer", 5), ("PreTrainedTokenizerFast", 1)):
        tokenizer = opened(tmp_path, byte_level(), settings | {"tokenizer_class": name})
        assert len(tokenizer.encode("<end>").ids) == count
        assert tokenizer.encode("<s>").ids == [1]


def test_long_texts_are_cut_where_the_settings_say(tmp_path):
    inner = byte_level()
    for settings, cut in (({}, "abc"), ({"truncation_side": "left"}, "cde")):
        tokenizer = opened(tmp_path, inner, settings)
        tokens, _ = tokenizer(["abcde"], max_length=3)
        assert tokenizer.decode(tokens[0]) == cut
    inner.enable_truncation(2, direction="left")
    tokens, _ = opened(tmp_path, inner, {})(["abcde"], max_length=3)
    assert tokenizer.decode(tokens[0]) == "cde"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"added_tokens_decoder": {"x": "<a>"}}, "added_tokens_decoder is .*; expected tokens by"),
        ({"added_tokens_decoder": {"5": 5}}, "added_tokens_decoder has 5; expected a text, or"),
        ({"additional_special_tokens": "<a>"}, "extra_special_tokens is '<a>'; expected a list"),
        ({"additional_special_tokens": [[]]}, r"extra_special_tokens has \[\]; expected a text"),
        ({"pad_token": token("<a>", lstrip=1)}, "pad_token has .*; expected a text, or"),
        ({"pad_token": token(5)}, "pad_token has .*; expected a text, or"),
        ({"split_special_tokens": "yes"}, "split_special_tokens is 'yes'; expected true or false"),
        ({"truncation_side": "both"}, "truncation_side is 'both'; expected 'left' or 'right'"),
        (
            {"tokenizer_class": "BertTokenizer", "cls_token": ""},
            "refuses what the settings ask for",
        ),
        (
            {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": 1},
            "add_prefix_space is 1; expected true or false",
        ),
    ],
)
def test_settings_that_are_refused(settings, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        opened(tmp_path, byte_level(), settings)


def test_templates_have_files_of_their_own(tmp_path):
    """`additional_chat_templates/` too, which goes when a tokenizer is saved over it."""
    settings = {"chat_template": [{"name": "default", "template": "old"}]}
    folder = written(tmp_path / "a", byte_level(), settings)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("tools é", "utf-8")
    messages = [{"role": "user", "content": "x"}]
    assert open_tokenizer(folder).chat(messages) == "old"
    (folder / "chat_template.jinja").write_text("new")
    tokenizer = open_tokenizer(folder)
    assert tokenizer.chat(messages) == "new"
    assert tokenizer.chat(messages, template="tool_use") == "tools é"
    assert tokenizer.chat(messages, tools=[]) == "tools é"
    tokenizer.save(folder)
    assert not (folder / "additional_chat_templates").exists()
    assert open_tokenizer(folder).chat(messages, template="tool_use") == "tools é"
    one = nys.models.Tokenizer(byte_level(), {"chat_template": "one"})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("stale")
    one.save(folder)
    assert open_tokenizer(folder).chat(messages, tools=[]) == "one"
