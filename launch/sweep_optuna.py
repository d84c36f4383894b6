"""The search of `longstride sweep --search optuna`, apart since it alone needs Optuna."""

from typing import Any

import optuna
from ray.tune.search.optuna import OptunaSearch

from launch.sweep_search import Settings, Untried

PROPOSALS = 20  # all of them tried already, after which a trial is drawn at random


class UntriedOptuna(OptunaSearch):
    """A tree-structured Parzen estimator; among few choices its proposals repeat themselves, and those are dropped."""

    def __init__(self, untried: Untried, **options: Any) -> None:
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        super().__init__(**options)
        self._untried = untried

    def suggest(self, trial_id: str) -> Settings | None:
        study: Any = self._ot_study
        for _ in range(PROPOSALS):
            settings: Any = super().suggest(trial_id)
            if self._untried.claim(settings):
                return settings
            study.tell(self._ot_trials.pop(trial_id), state=optuna.trial.TrialState.FAIL)  # it learns nothing
        study.enqueue_trial(self._untried.draw())
        return super().suggest(trial_id)
