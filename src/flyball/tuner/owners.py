"""Whose a running trial is, so that a second process on the same study does not take it for lost.

A trial notes the machine and process that run it. It is lost when that process is gone from this machine, or when it
gave no sign of life for a while: the heartbeats are Optuna's, by the clock of the database.
"""

from __future__ import annotations

import os
import platform
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import optuna
from optuna.exceptions import ExperimentalWarning
from optuna.storages import fail_stale_trials
from optuna.trial import FrozenTrial, TrialState

BEAT_S = 20  # between two signs of life
SILENCE_S = 120  # after which a trial is lost
_OWNER = "flyball:owner"


def sign(trial: optuna.Trial) -> None:
    """Note that this process runs the trial."""
    trial.set_user_attr(_OWNER, [platform.node(), os.getpid()])


def end_lost(study: optuna.Study, *, alone: bool) -> None:
    """Mark the trials as failed that nobody runs any more; `alone`: nobody else can be running one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)  # pinned with Optuna's major version
        fail_stale_trials(study)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if alone or _gone(trial):
            study.tell(trial.number, state=TrialState.FAIL)


def _gone(trial: FrozenTrial) -> bool:
    owner = trial.user_attrs.get(_OWNER)
    if owner is None:
        return True  # it was asked for and not begun
    node, process = owner
    if node != platform.node():
        return False
    try:
        os.kill(process, 0)  # signal 0 only asks whether it exists
    except ProcessLookupError:
        return True
    except PermissionError:
        return False
    return False


@contextmanager
def alive(study: optuna.Study, running: set[int]) -> Iterator[None]:
    """Give signs of life for the trials whose ids are in `running`, which may change, while the block runs."""
    storage: Any = study._storage  # the one way to Optuna's heartbeats outside its own loop
    over = threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            for trial in list(running):
                storage.record_heartbeat(trial)

    thread = threading.Thread(target=beat, name="flyball-heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
