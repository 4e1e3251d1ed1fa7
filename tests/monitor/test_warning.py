"""Warnings point to the training loop, and never raise."""

import threading
import warnings

import pytest
import torch

from repflow.monitor import AlertWarning, Monitor, MonitorConfig
from repflow.monitor.warning import warn
from tests.monitor import toy


def test_the_line_shown_with_an_alert_is_one_of_the_training_loop() -> None:
    model = toy.Toy()
    with torch.no_grad():
        next(model.parameters()).fill_(torch.nan)
    monitor = Monitor(model, MonitorConfig(every_n_steps=1))
    with pytest.warns(AlertWarning, match="Values are not finite") as caught:
        for step in range(2):
            with monitor.step(step):
                toy.loss_of(model, toy.batch(seed=step)).backward()
        monitor.close()
    assert [warning.filename for warning in caught] == [__file__]


def test_a_thread_with_nothing_outside_of_repflow_warns_too() -> None:
    with pytest.warns(RuntimeWarning, match="repflow: from a thread"):
        thread = threading.Thread(target=warn, args=("from a thread",))
        thread.start()
        thread.join()


def test_a_filter_that_raises_reaches_nobody(capsys) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warn("told all the same")
    assert capsys.readouterr().err == "RepflowWarning: repflow: told all the same\n"
