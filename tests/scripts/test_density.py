"""The counting rules of scripts/density.py, and the package within its limits."""

import density
import pytest
from density import LIMITS, PACKAGE, Counts, count, count_in


def faults(code: str) -> list[str]:
    return [offence.rpartition(": ")[2] for offence in count_in(code, "code").offences]


def test_comprehensions_of_every_kind_and_conditional_expressions_are_counted():
    code = """
a = [x for x in y]
b = {x for x in y}
c = {x: x for x in y}
d = sum(x for x in y)
e = 1 if a else 2
if a:
    for x in y:
        pass
"""
    counts = count_in(code, "code")
    assert (counts.lines, counts.comprehensions, counts.conditionals) == (9, 4, 1)
    assert not counts.offences
    assert counts.per_thousand()["comprehensions"] == pytest.approx(4 / 9 * 1000)


@pytest.mark.parametrize(
    ("code", "fault"),
    [
        ("[[x for x in row] for row in y]", "comprehension inside a comprehension"),
        ("sum(x for x in {z for z in y})", "comprehension inside a comprehension"),
        ("[x if x else 0 for x in y]", "conditional expression inside a comprehension"),
        ("[\n    x\n    for x in y\n    if x\n]", "comprehension over 3 lines"),
        ("(1 if a else\n 2)", "conditional expression over several lines"),
    ],
)
def test_what_is_hard_to_read_is_an_offence(code, fault):
    assert faults(code) == [fault]


def test_a_nested_conditional_expression_is_an_offence():
    assert faults("1 if a else 2 if b else 3") == [
        "conditional expression inside a conditional expression"
    ]


@pytest.mark.parametrize(
    "code",
    [
        "[x for x in y if x]",
        "[\n    x\n    for x in y\n]",
        "[x for x in y\n if x]",
        "f(1 if a else 2, 3 if b else 4)",
        "a = [x for x in y]; b = [z for z in a]",
    ],
)
def test_what_can_be_read_is_none(code):
    assert faults(code) == []


def test_an_offence_or_a_rate_above_a_limit_is_an_exit_status_of_1(tmp_path, capsys):
    sparse = tmp_path / "sparse.py"
    sparse.write_text("a = [x for x in y]\n" + "b = 1\n" * 99)
    dense = tmp_path / "dense.py"
    dense.write_text("a = [x for x in y]\n")
    offending = tmp_path / "offending.py"
    offending.write_text("a = [[x for x in z] for z in y]\n" + "b = 1\n" * 999)
    assert [density.main([str(file)]) for file in (sparse, dense, offending)] == [0, 1, 1]
    assert "offending.py:1: comprehension inside a comprehension" in capsys.readouterr().out


def test_the_package_has_no_offence_and_is_within_the_limits():
    total = Counts()
    for file in sorted(PACKAGE.rglob("*.py")):
        total.add(count(file))
    assert total.offences == []
    rates = total.per_thousand()
    assert all(rates[name] <= limit for name, limit in LIMITS.items()), rates
