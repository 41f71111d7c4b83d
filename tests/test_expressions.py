"""Expressions from files against Python's `re`, which has the same meaning and no limit of time."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nyscaled.checkpoints.expressions import Budget, Expression

NAMES = [
    *("layers.0.self_attn.q_proj", "model.layers.11.mlp.up_proj", "lm_head", "a", "aaaa", ""),
    *("model.layers.0.self_attn.q_proj", "model.text.layers.3.mlp.experts.0.gate_proj"),
]
WRITTEN = [
    *(".*", r"model\.layers\.\d+\.self_attn\.(q|v)_proj", "(?i)LM_HEAD", "", "a|", "a*?"),
    *(r"^(?!.*mlp).*(?:q_proj|v_proj)$", r"^(model(?=\.).*\.(q_proj|up_proj))$", "a{2,3}a?"),
    r"(?:.*?(?:language|text).*?(?:attn|mlp).*?(?:q_proj|gate_proj).*?)"
    r"|(?:\bmodel\.layers\.[\d]{1,}\.(?:mlp|self_attn)\.(?:(?:q_proj|up_proj)))",
    *(r".*(?<=mlp\.)up_proj", "(a?){5}", r"(?:\b|a)*", r"[^.]+\.\d\..*", "(?x) lm_ head"),
    *("(?s:.*)(?-i:proj)", "(|a)+", ".{3,}?d", "(?i:Q)_x|.*(?i:Q_PROJ)", "(a|b)*c|a", ".*?d"),
]


@pytest.mark.parametrize("form", ["{}", r"(.*\.)?({})$"])
@pytest.mark.parametrize("pattern", WRITTEN)
def test_written_expressions(pattern, form):
    try:
        compiled = re.compile(form.replace("{}", pattern))
    except re.error:
        with pytest.raises(ValueError, match="not a regular expression"):
            Expression(pattern, form)
        return
    expression = Expression(pattern, form)
    for name in NAMES:
        assert expression.fullmatch(name) == (compiled.fullmatch(name) is not None), name
        assert expression.match(name) == (compiled.match(name) is not None), name


ATOMS = st.sampled_from(["a", "b", ".", "[ab]", "[^a]", r"\b", "^", "$", "ab", "(?<=a)", "(?<!.b)"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.builds("{}{}".format, inner, inner),
        st.builds("(?:{}|{})".format, inner, inner),
        st.builds(
            "({}){}".format, inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "*?", "{2,}"])
        ),
        st.builds("({}{})".format, st.sampled_from(["?=", "?!", "?:"]), inner),
    ),
    max_leaves=8,
)


@given(PATTERNS, st.text("ab.", max_size=6))
def test_any_expression_matches_as_in_re(pattern, name):
    expression = Expression(pattern)
    assert expression.fullmatch(name) == (re.fullmatch(pattern, name) is not None)
    assert expression.match(name) == (re.match(pattern, name) is not None)


@pytest.mark.long
def test_steps_are_bounded_and_shared():
    budget = Budget(10_000)
    many = [Expression(f"(.*.*)*[{i}]", budget=budget) for i in range(20)]
    with pytest.raises(ValueError, match="too long to match"):
        assert not any(expression.fullmatch("a" * 100 + "b") for expression in many)
    # A pattern per module of a model is well within the limit; most of the time is checks of types.
    names = [f"model.layers.{i}.self_attn.{m}_proj" for i in range(10) for m in "qkvo"]
    budget = Budget()
    exact = [Expression(f"^{re.escape(name)}", r"(.*\.)?({})$", budget) for name in names]
    assert sum(e.match(name) for e in exact for name in names) == len(names)
