"""What a sweep tries next: settings that it has not tried, since a run is named by its settings and one is enough."""

import json
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
from ray import tune

from launch.sweep_space import Dimension

Settings = dict[str, Any]


class Untried:
    """Settings drawn at random, none twice. name: what tells settings apart; tried: the names of those tried before."""

    def __init__(
        self, space: Mapping[str, Dimension], seed: int, name: Callable[[Settings], Hashable], tried: set[Any]
    ) -> None:
        self._domains = {key: domain(dimension) for key, dimension in space.items()}
        self._random = np.random.RandomState(seed)  # what Tune's domains take
        self._name, self._tried = name, tried

    def claim(self, settings: Settings) -> bool:
        """Whether nobody tried them; from now on somebody has."""
        name = self._name(settings)
        is_new = name not in self._tried
        self._tried.add(name)
        return is_new

    def draw(self) -> Settings:
        """Does not end if there are none left."""
        while True:
            settings = {key: domain.sample(random_state=self._random) for key, domain in self._domains.items()}
            if self.claim(settings):
                return settings


def domain(dimension: Dimension) -> Any:
    """As Tune has it."""
    if dimension.choices:
        return tune.choice([as_drawn(choice) for choice in dimension.choices])
    low, high = dimension.low, dimension.high
    if dimension.whole:
        return (tune.lograndint if dimension.log else tune.randint)(int(low), int(high) + 1)
    return (tune.loguniform if dimension.log else tune.uniform)(low, high)


def as_drawn(value: Any) -> Any:
    """The search knows a list among the choices as its JSON text; files and runs have the list."""
    return json.dumps(value) if isinstance(value, list | tuple) else value


def as_set(settings: Settings) -> Settings:
    return {n: json.loads(v) if isinstance(v, str) and v.startswith("[") else v for n, v in settings.items()}
