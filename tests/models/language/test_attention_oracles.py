"""Outputs within 1e-5 and gradients within 1e-4 of every oracle, in float32."""

import pytest

from tests.models.language.attention_oracles import CASES, FLA, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.oracle}")
def test_against_the_oracle(case: Case) -> None:
    if case.oracle == FLA:  # of the extra `fla`: its plain functions run without a GPU
        pytest.importorskip("fla")
    output, gradient = case.differences()
    assert output <= 1e-5
    assert gradient <= 1e-4
