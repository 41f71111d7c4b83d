"""REPORT.md, and how a generated one is held against the committed one."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Mapping
from pathlib import Path

from paper_checks import common
from paper_checks.claim import SECTIONS, Limit, Measured, Outcome

COMMAND = "python -m paper_checks --report paper_checks/REPORT.md"
TITLES = {
    "symmetric_exact": "Symmetric, exactly parametrized (r = r_A)",
    "phases": "Symmetric: the two phases of Theorems 1 and 5",
    "symmetric_under": "Symmetric, under-parametrized (r < r_A)",
    "counterexamples": "Theorem 2 (i): where it fails",
    "theorem_2": "Theorem 2 and Lemma 10: where they hold",
    "lemma_5": "Lemma 5 and (19) to (23)",
    "symmetric_over": "Symmetric, over-parametrized (r > r_A)",
    "starts": "Small and perturbed starts (Figures 1 and 4)",
    "equations": "Equations inside the proofs",
    "asymmetric": "Asymmetric",
    "corollary": "Corollary 1",
    "factorization": "Remark 1",
    "helpers": "Helper lemmas",
    "adapters": "Adapters and starts from gradients",
    "order": "Orders, in extended precision",
    "table1": "Table 1",
    "table1_others": "Table 1: the rows of other papers",
    "fastest": "Accelerated iterations",
    "ours": "Ours",
    "rounding": "Ours: rounding",
    "neighbours": "Neighbouring algorithms: sensing with too many columns",
    "robust": "Robust PCA",
}


TOLERANCE = 0.02
"""How far two numbers of a report may lie apart, relative to the larger.

It covers the third digit of what is printed. Numbers that rounding decides are printed as bounds.
"""


def number(value: float) -> str:
    """A number as the report shows it: whole numbers in full, others in three digits."""
    return f"{value:.0f}" if value == round(value, 0) and abs(value) < 1e6 else f"{value:.3g}"


def bound(value: float) -> str:
    """A bound, in as many digits as it has."""
    return f"{value:.6g}"


def fact(value: float | Limit) -> str:
    """A further number; where rounding decides it, its limit."""
    if isinstance(value, Limit) and value.holds:
        return f"{value.sense} {bound(value.limit)}"
    return number(value.value if isinstance(value, Limit) else value)


def shown(measured: Measured) -> str:
    """The measurement; where rounding decides it, what it does not exceed or fall below."""
    if measured.rounding and measured.satisfied:
        return f"{measured.sense} {bound(measured.bound)}"
    least = measured.at_least
    if least is not None and measured.violated and measured.measured >= least:
        return f"≥ {bound(least)}"
    return number(measured.measured)


def margin(measured: Measured) -> str:
    """How far the measurement is from its bound, as a factor."""
    return f"{measured.margin:.3g}" if measured.margin <= 1e4 else "> 1e4"


def facts(measured: Measured) -> str:
    """The measurement's further numbers."""
    return "; ".join(f"{name}: {fact(value)}" for name, value in measured.facts.items())


def _entry(outcome: Outcome) -> list[str]:
    claim, check, control = outcome.claim, outcome.check, outcome.control
    more = f" ({facts(check)})" if check.facts else ""
    far = "" if check.rounding else f", margin {margin(check)}"
    name, line = claim.function
    return [
        f"### {claim.id}",
        "",
        f"**{claim.statement}**",
        "",
        f"- hypotheses: {claim.hypotheses}",
        f"- bound: {check.sense} {bound(check.bound)}",
        f"- measured: {shown(check)}{far}; {check.detail}{more}",
        f"- control: without {claim.removes}; instead, {claim.instead}",
        f"- control measured: {shown(control)}" + ("" if outcome.passed else " **FAILS**"),
        f"- code: [`{name}`]({claim.section}.py#L{line})",
        "",
    ]


def _loose(outcomes: Mapping[str, Outcome]) -> list[str]:
    def of(id: str, name: str) -> str:  # noqa: A002
        return fact(outcomes[id].check.facts[name])

    def measured(id: str) -> str:  # noqa: A002
        return shown(outcomes[id].check)

    ten = outcomes["lem-10"].control
    return [
        "## Where the paper is loose, vacuous or needs a hypothesis it does not state",
        "",
        "* **Theorem 2 (i), (17) and “no dependence on κ” are false as stated.** Take Σ = diag(1, 1/κ), Φ_0 = (y, y)ᵀ and 2κy² = 1. "
        f"This is a Nyström start with B_0 = ½(1 + 1/κ) ≥ 1/3. At η = 0.3 (17) allows about 1.55 after one step. The error is {of('E8', 'r = 1, κ = 1e+02: ‖B_1 − I‖_F')} "
        f"at κ = 1e2, {of('E8', 'r = 1, κ = 1e+04: ‖B_1 − I‖_F')} at κ = 1e4 and {of('E8', 'r = 1, κ = 1e+06: ‖B_1 − I‖_F')} at κ = 1e6: "
        f"{of('E8', 'r = 1, κ = 1e+02: error over the bound')}, {of('E8', 'r = 1, κ = 1e+04: error over the bound')} and {of('E8', 'r = 1, κ = 1e+06: error over the bound')} times the bound (E8). "
        f"The steps to 4η are {of('E8', 'r = 1, κ = 1e+02: steps to 4η')}, {of('E8', 'r = 1, κ = 1e+04: steps to 4η')} and {of('E8', 'r = 1, κ = 1e+06: steps to 4η')}: they grow like log κ. "
        f"So do those of (ii): at ε = 0.2 the proof allows T = {of('E8-count', '(ii) T of the proof, at any κ')} for every κ, and {of('E8-count', '(ii) steps at κ = 1e12')} are needed at κ = 1e12 (E8-count). "
        f"Gaussian starts break (17) too: {_counts(outcomes)} (E8-how-often). With the factor (κ+1)²/(4κ) on 3ηr it holds for all Φ_0 "
        f"(thm-2i-repaired, largest ratio {measured('thm-2i-repaired')}), and without it if (κ+1)²/(4κ) ≤ √r (thm-2i).",
        f"* **Lemma 10, on which it rests, is false as stated.** ‖ΘᵀΣΘ‖_F ≤ r/σ_r(B) fails for {fact(ten.facts['violations at r=1, of 400'])} of 400 "
        f"Gaussian Φ at r = 1, {fact(ten.facts['violations at r=2, of 400'])} at r = 2 and {fact(ten.facts['violations at r=5, of 400'])} "
        f"at r = 5, by factors up to {shown(ten)} (κ = 1e6). At r = 1 it reads φᵀΣφ·φᵀΣ⁻¹φ ≤ (φᵀφ)²: "
        "the Cauchy–Schwarz inequality has the opposite sign, and equality is for eigenvectors only. The proof says that Σ^{1/2}Θ and Σ^{−1/2}Φ share "
        f"their column space (eq-25). They do if range(Φ) is invariant under Σ, and then the lemma is true (lem-10). For all Φ "
        f"‖B⁻¹‖_F ≤ ‖ΘᵀΣΘ‖_F ≤ (κ+1)²/(4κ)‖B⁻¹‖_F, which is nearly attained (lem-10-repaired, largest ratio {measured('lem-10-repaired')}).",
        f"* **Theorem 2's O(ηr) is a bound on a transient.** With constant η the error after 500 steps was {measured('E6-thm-2')} times the floor η√r + 3ηr (E6-thm-2), "
        "and X was at a global optimum (E3-global). No small step size is needed.",
        "* **The step schedule after Theorem 2 can stop short.** η = .1, .01, … “every a few iterations” has a finite sum. With 10 steps at each level "
        f"‖B_0 − I‖_F had fallen by a factor of at most {measured('E3-staircase')} after 400 steps; with η = .1 throughout it fell by a factor {shown(outcomes['E3-staircase'].control)} (E3-staircase). "
        "With 200 steps at each level the schedule does what is said of it, and the first level is what does it (thm-2-staircase).",
        "* **Lemma 1, 11: “with high probability” is weaker than the truth.** rank(X_0) = min(r, r_A) holds almost surely; "
        "the stated probability keeps a term e^{−C₂d} that no τ removes. "
        f"{fact(outcomes['lem-1'].check.facts['draws'])} starts had {fact(outcomes['lem-1'].check.facts['rank-deficient draws'])} deficient ones. "
        f"C₁ = {of('lem-19', 'C₁')} and C₂ = {of('lem-19', 'C₂')}, fitted on matrices of at most 8 rows, cover the tails of those of 20 and 40 rows; "
        "10 is the largest C₂ tried: no draw needs that term.",
        "* **Theorem 1's first phase assumes a start that is large enough, and not too large.** Its proof takes σ_r(B_0) ≥ σ_r(Σ)/3, by a large ξ or by a few steps of constant size first; "
        "the statement names neither. With the step size of phase 1 and the start times 1e-4 the right side of Lemma 7 is exceeded "
        f"{shown(outcomes['lem-7'].control)} times. And T₁ = O(κ³√r log κ) has no ‖B_0 − Σ‖_F in it, though Theorem 1 has “no requirement on the magnitude”: "
        f"from a start times 1e9 κ² × error was still {measured('E6-large-start')} after 5κ³√r log κ = {of('E6-large-start', 'steps')} steps at κ = 3 (E6-large-start).",
        "* **Phase 1 must end below 2/(3κ²), which O(1/κ²) does not say.** Lemma 8 needs that constant. Lemma 7 with η = c/(κ³‖A‖_F) gives c(3 + 1/κ) and the decaying term, "
        "so that c must be below about 1/6; with c = 1 it gives 3 + 1/κ + 1. In fact the error goes on to 0: κ² × error was at most "
        f"{of('thm-1-phase1', 'κ² × error at T₁, largest')} after T₁ steps.",
        "* **Theorem 1's phase 1 is not needed (E1).** From the same starts η = 1/2 reached 1e-10 in at most "
        f"{of('E6-phase-1', 'steps with η = 1/2, most')} steps where phase 1 takes T₁ ≥ {of('E6-phase-1', 'T₁, least')} (κ = 5); for Fig. 1 (a), κ = 100, "
        f"T₁ would be {of('E6-phase-1', 'T₁ for the matrix of Fig. 1 (a), κ = 100, ‖B_0 − Σ‖_F = 3.35')}. The count grows like log κ: at most "
        f"{of('E1-count', 'steps at κ = 1e+02, ξ = σ_1 = 1')} steps at κ = 1e2, {of('E1-count', 'steps at κ = 1e+06, ξ = σ_1 = 1')} at κ = 1e6.",
        "* **Lemma 8's constant is loose.** κe²/(4(1 − κe)) is what holds with e < 1/κ alone, and it is attained (E9). At e = 2/(3κ²) it is 3κ − 2 times smaller than (3κ²/4)e², "
        "and the error falls from e < 4/(5κ) on, so that phase 1 need reach O(1/κ) only. With 600 digits the largest e_{t+1}/((3κ²/4)e_t²) was "
        f"{of('lem-8-extended', 'largest e_{t+1}/((3κ²/4)e_t²)')}.",
        "* **Theorem 1 has units.** Its step size c/(κ³‖A‖_F) and its 1/κ² assume σ_1(A) = 1, as the paper does, and so does Lemma 5. The claims take Theorem 1 in units of σ_1(A). The other statements on (1) hold at every scale.",
        "* **Corollary 1 cannot start where Lemma 7 does, and its first phase does not need the Nyström start.** Φ_1Ψ_1ᵀ = ηΣ for every Ω (eq-31), so "
        "σ_r(B_1) = ησ_r(Σ) < σ_r(Σ)/3 for the step size of phase 1, and no ξ changes that. A constant number of further 1/η is enough: κ² times the error was "
        f"{measured('cor-1-phase1')} after T₁ steps, and {of('cor-1-phase1', 'the same from a random X_0 with Y_0 = 0')} from a random X_0 with Y_0 = 0. "
        "The quadratic phase does need it (cor-1-phase2-start). By E2 the error is |c_t − 1|‖A‖_F, free of κ.",
        f"* **Lemma 5 says less than weak optimality alone.** ‖X − X*‖_F ≤ 2√r needs no iteration (E6-lem-5): at r = 30 that is "
        f"{of('E6-lem-5', '2√r at r = 30')} against {of('E6-lem-5', '√(3r+2r^{3/2}) at r = 30')} in the proof, and the largest seen was {of('lem-5', 'r = 30: largest distance')}. "
        "That distance is to X* = Q₁Σ₁^{1/2} itself. The limit is a global optimum (E3-global): X*U for an orthogonal U.",
        "* **Weak optimality is not accuracy.** Theorems 3, 4 and 6 compute the range projection P_{range(AΩ)}A (E3-projection). After Theorem 4's one step, weakly optimal to "
        "1e-9, the error over the best of rank r was "
        + ", ".join(
            f"{fact(value)} ({name.removeprefix('error over the best, ')})"
            for name, value in outcomes["E6-range"].check.facts.items()
        )
        + ".",
        "* **Table 1 compares worst cases.** At the sizes here the counts of gradient descent from small starts grew like κ^"
        f"{of('table1-gd-asymmetric', 'power of κ from κ = 2')} (asymmetric; κ⁴ in the table) and κ^{of('table1-gd-symmetric', 'power of κ from κ = 2, EP')} "
        f"(symmetric; κ⁸), those of alternating descent like κ^{of('table1-altgd', 'power of κ, EP')} (κ²). The κ³ of ScaledGD's own row is not seen "
        "either (table1-symmetric). The bounds hold, and are tested as upper bounds with constants chosen here; the lower-order terms are not. "
        "“GD, asymptotic” has no rate to test: only its limit is (table1-gd-under).",
        "* **The pseudo-inverse of (26) requires care.** pinv(XᵀX) squares the condition number: the largest error after step 50 was "
        f"{of('E7', 'pinv(XᵀX), rcond = 1e-15')} with rcond 1e-15 and {of('E7', 'pinv(XᵀX), rcond = 1e-10')} with 1e-10, at κ = 1e6. Cutting X anew at every step "
        f"left {shown(outcomes['E7'].control)}, cutting it once {measured('E7')} (E7).",
        "* **Lemma 15 needs no semidefiniteness** (it is Weyl's inequality), only symmetry. **Lemmas 2 (ii) and 9** hold for η ≤ 1.",
        "",
    ]


def _counts(outcomes: Mapping[str, Outcome]) -> str:
    """How often (17) fails, for each r."""
    facts = outcomes["E8-how-often"].check.facts
    found = {name.partition(", all: failures of ") for name in facts if ", all: failures" in name}
    return ", ".join(
        f"{fact(facts[''.join(parts)])} of {parts[2]} at {parts[0]}" for parts in sorted(found)
    )


def render(outcomes: list[Outcome]) -> str:
    """The report as Markdown."""
    passed = sum(o.passed for o in outcomes)
    versions = ", ".join(
        f"{p} {importlib.metadata.version(p)}" for p in ("nyscaled", "jax", "numpy", "mpmath")
    )
    lines = [
        "# The paper's statements, run",
        "",
        "Li, Zhang, Mokhtari, He, *On the Crucial Role of Initialization for Matrix Factorization*, ICLR 2025. "
        "Every numbered statement is a claim that the library is held to, and every claim has a control: the same measurement "
        "with one hypothesis removed, which must break the bound. A claim whose control holds fails. "
        "Statements marked *ours* are this project's, those marked *literature* are of the papers that they cite; constants that those leave open are chosen here.",
        "",
        f"{passed} of {len(outcomes)} claims pass.",
        "",
        f"Generated by `{COMMAND}`, seed {common.SEED}, float64 unless said otherwise. Most numbers are ratios to what is allowed, so their bound is 1; "
        "“margin” is bound over measurement (the reverse for ≥). A number that rounding decides is given as a bound (“≤ 1”, “≥ 0.001”) and not as a number, "
        f"so that the report is the same on every processor. `python -m paper_checks --check` compares all others to {TOLERANCE:.0%}.",
        "",
        f"Versions: {versions}, Python {platform.python_version()}.",
        "",
    ]
    lines += _loose({o.claim.id: o for o in outcomes})
    lines += [
        "## All claims",
        "",
        "| id | whose | bound | measured | control | |",
        "|---|---|---|---|---|---|",
    ]
    for o in outcomes:
        lines.append(
            f"| [{o.claim.id}](#{o.claim.id.lower()}) | {o.claim.source} | {o.check.sense} {bound(o.check.bound)} "
            f"| {shown(o.check)} | {shown(o.control)} | {'pass' if o.passed else '**FAIL**'} |"
        )
    lines.append("")
    for section in SECTIONS:
        lines += [f"## {TITLES[section]}", ""]
        for outcome in outcomes:
            if outcome.claim.section == section:
                lines += _entry(outcome)
    return "\n".join(lines)


# Digits inside ids, names and exponents of formulas are text; these are numbers that stand free.
_NUMBER = re.compile(r"(?<![\w.^{+−-])(?:> )?(-?\d+(?:\.\d+)?(?:e[+-]?\d+)?|-?inf)(?![\w^.]*\w)")
_MOVING = ("- measured:", "- control measured:", "* **", "| [")
_PATH = Path(__file__).with_name("REPORT.md")


def committed() -> str:
    """The report as it is in the repository."""
    return _PATH.read_text(encoding="utf-8")


def _agree(a: float, b: float) -> bool:
    """Whether two numbers are equal to TOLERANCE; 0 and inf equal only themselves."""
    return a == b or abs(a - b) <= TOLERANCE * max(abs(a), abs(b)) < float("inf")


def differences(old: str, new: str) -> list[str]:
    """The lines in which two reports differ by more than the last printed digit.

    Ids, statements, hypotheses, bounds and all other text must be equal. Numbers in the lines of
    measurements, in the table and in the section on looseness may differ by TOLERANCE. Versions are
    not compared.
    """
    before, after = old.splitlines(), new.splitlines()
    if len(before) != len(after):
        return [f"{len(before)} lines committed, {len(after)} generated"]
    changed = []
    for i, (a, b) in enumerate(zip(before, after, strict=True), start=1):
        if a.startswith("Versions:") and b.startswith("Versions:"):
            continue
        if a != b and not (b.startswith(_MOVING) and _same_but_for_numbers(a, b)):
            changed.append(f"line {i}: committed {a!r}, generated {b!r}")
    return changed


def _same_but_for_numbers(a: str, b: str) -> bool:
    if _NUMBER.sub("#", a) != _NUMBER.sub("#", b):
        return False
    pairs = zip(_NUMBER.findall(a), _NUMBER.findall(b), strict=True)
    return all(_agree(float(x), float(y)) for x, y in pairs)
