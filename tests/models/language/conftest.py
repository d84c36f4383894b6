"""Our policies, and transformers models with random weights."""

from pathlib import Path

import pytest
from transformers import PreTrainedModel

from models.language.decoder import Decoder
from tests.models.language.oracles import ORACLES, oracle_model
from tests.models.language.policies import POLICIES, made


@pytest.fixture(params=POLICIES)
def policy(request: pytest.FixtureRequest) -> Decoder:
    return made(POLICIES[request.param])


@pytest.fixture(params=ORACLES)
def oracle(request: pytest.FixtureRequest) -> PreTrainedModel:
    return oracle_model(request.param)


@pytest.fixture
def oracle_folder(oracle: PreTrainedModel, tmp_path: Path) -> Path:
    oracle.save_pretrained(tmp_path / "oracle")
    return tmp_path / "oracle"
