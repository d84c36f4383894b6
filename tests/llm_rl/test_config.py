"""`require_sizes` passes over a name that a configuration lacks, so each name must be of one of the two jobs."""

import pytest

from launch.config import field_types
from llm_rl.config import _AT_LEAST_ONE, _BELOW_ONE, _NOT_NEGATIVE, _POSITIVE, ReasonConfig, SFTJobConfig


@pytest.mark.parametrize("name", [*_AT_LEAST_ONE, *_POSITIVE, *_NOT_NEGATIVE, *_BELOW_ONE])
def test_a_size_that_is_checked_is_a_field(name: str) -> None:
    assert name in field_types(ReasonConfig) | field_types(SFTJobConfig)
