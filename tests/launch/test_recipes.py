"""The recipes that come with longstride."""

import pytest
import yaml

from launch import jobs
from launch.config import RECIPES, RunConfig, TrainOptions, apply_entries, combine, read_recipe


@pytest.mark.parametrize("recipe", sorted(path.stem for path in RECIPES.glob("*.yaml")))
def test_every_key_and_value_of_a_recipe_is_one_of_its_job(recipe: str) -> None:
    name = yaml.safe_load((RECIPES / f"{recipe}.yaml").read_text())["job"]
    job = jobs.find(name)
    combined = combine("Train", options=TrainOptions, run=RunConfig, job=job.config_class())
    apply_entries(combined, read_recipe(recipe, name), f"recipe {recipe}")
