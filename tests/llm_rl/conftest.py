from collections.abc import Iterator

import pytest
import torch._dynamo


@pytest.fixture(autouse=True)
def _compiler_as_it_was() -> Iterator[None]:
    """vLLM's engines switch the compiler off for the whole process on a CPU."""
    with torch._dynamo.config.patch(disable=torch._dynamo.config.disable):
        yield
