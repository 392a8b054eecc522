import pytest
from hypothesis import given
from test_genotype import example, genotypes

from cpnas_jax.architecture.named import named_genotype
from cpnas_jax.architecture.notation import from_darts, load_genotype, to_darts
from cpnas_jax.runtime.errors import UserError

TEXT = to_darts(example("top2"))


@given(genotypes())
def test_round_trip(genotype):
    assert from_darts(to_darts(genotype)) == genotype


def test_what_is_written():
    assert TEXT.startswith("Genotype(normal=[('sep_conv_3x3', 0), ('max_pool_3x3', 1), ")
    assert TEXT.endswith("], reduce_concat=range(2, 6))")


def test_forms_found_in_the_wild():
    listed = TEXT.replace("range(2, 6)", "[2, 3, 4, 5]").replace(", reduce", ",\n  reduce")
    assert from_darts(f"\nMINE = {listed}\n") == example("top2")
    # Two entries of a node in either order are the same cell.
    swapped = TEXT.replace(
        "[('sep_conv_3x3', 0), ('max_pool_3x3', 1),", "[('max_pool_3x3', 1), ('sep_conv_3x3', 0),"
    )
    assert swapped != TEXT
    assert from_darts(swapped) == example("top2")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "0 statements"),
        ("a = 1; b = 2", "2 statements"),
        ("Genotype(", "not readable"),
        ("\0", "not readable"),
        ("(" * 5000, "not readable"),
        ("x" * 30_000, "30000 characters"),
        ("import os", "1 statements"),
        ("__import__('os').system('false')", "it must be Genotype"),
        ("Genotype()", "fields none"),
        ("Genotype(**{'normal': []})", "fields None"),
        (TEXT.replace("normal_concat", "concat"), "fields normal, concat"),
        (TEXT.replace("normal=[", "normal=list("), "not readable"),
        (TEXT.replace("range(2, 6)", "range(2, 5)"), r"normal_concat is range\(2, 5\)"),
        (TEXT.replace("range(2, 6)", "[2, 3]"), r"normal_concat is \[2, 3\]"),
        (TEXT.replace("normal=[('sep_conv_3x3', 0), ", "normal=["), "normal has 7 entries"),
        (TEXT.replace("('sep_conv_3x3', 0), ", ""), "normal has 4 entries and reduce 8"),
        (TEXT.replace("('sep_conv_3x3', ", "('max_pool_3x3', 0), ('skip_connect', "), "12 entries"),
        (TEXT.replace("('sep_conv_3x3', 0)", "('sep_conv_3x3', 7)"), "no edge 7->2"),
        (TEXT.replace("('sep_conv_3x3', 0)", "('sep_conv_3x3', 0 + 0)"), r"0 \+ 0"),
        (TEXT.replace("('sep_conv_3x3', 0)", "('sep_conv_3x3', False)"), "False"),
        (TEXT.replace("('sep_conv_3x3', 0)", "('sep_conv_3x3', 1)"), "edge 1->2 is given twice"),
        (TEXT.replace("'sep_conv_3x3'", "'conv_7x1_1x7'"), "unknown operation 'conv_7x1_1x7'"),
        (TEXT.replace("'sep_conv_3x3'", "'none'"), "is 'none'"),
    ],
)
def test_damage_is_told_in_one_line(text, message):
    with pytest.raises(UserError, match=message) as error:
        from_darts(text, "--config.genotype")
    assert str(error.value).startswith("--config.genotype: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("form", ["json", "darts", "assigned"])
def test_a_file_may_have_either_notation(form, tmp_path):
    genotype = named_genotype("DARTS_V2")
    text = {
        "json": genotype.to_json(),
        "darts": to_darts(genotype) + "\n",
        "assigned": f"DARTS_V2 = {to_darts(genotype)}",
    }[form]
    (tmp_path / "cells").write_text(text)
    assert load_genotype(tmp_path / "cells") == genotype


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not JSON"),
        ("{", "not JSON"),
        ("[1]", "it must be 'cpnas_jax.genotype'"),
        ("Genotype(normal=[])", "Genotype has the fields normal"),
        ("cells", "it must be Genotype"),
    ],
)
def test_a_file_of_neither_notation_is_named(text, message, tmp_path):
    (tmp_path / "cells").write_text(text)
    with pytest.raises(UserError, match=f"{tmp_path}/cells: .*{message}"):
        load_genotype(tmp_path / "cells")
