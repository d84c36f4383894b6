from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest
import torch._dynamo


@pytest.fixture(autouse=True)
def _compiler_as_it_was() -> Iterator[None]:
    """vLLM's engines switch the compiler off for the whole process on a CPU."""
    with torch._dynamo.config.patch(disable=torch._dynamo.config.disable):
        yield


@pytest.fixture(scope="session")
def engines() -> Iterator[ProcessPoolExecutor]:
    """A process for vLLM's engines, one after another: it changes the process that it runs in, and takes long to
    import."""
    pytest.importorskip("vllm")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.fixture
def engine_of_its_own() -> Iterator[ProcessPoolExecutor]:
    """The same for one test, if it leaves something behind: on a GPU a part of its memory, or a hook."""
    pytest.importorskip("vllm")
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool
