"""The numbers of each update: one column each, in the order in which the step reads them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from sdxl_host.training.ema import ema_shares
from sdxl_host.training.optimizer import AdamW
from sdxl_host.training.step import UpdateRows
from sdxl_host.training.update_table import COLUMNS, update_table


def test_columns() -> None:
    rates = np.geomspace(1e-3, 1e-5, 20)
    optimizer = AdamW(beta1=0.8, beta2=0.95, weight_decay=0.1)
    table = update_table(optimizer, rates, 2.5, 0.9)
    assert (table.shape, table.dtype) == ((20, len(COLUMNS)), np.float32)
    found = dict(zip(COLUMNS, table.T, strict=True))
    for name, column in zip(COLUMNS, optimizer.table(rates).T, strict=False):
        np.testing.assert_array_equal(found[name], column)
    assert set(found["beta1"]) == {np.float32(0.8)}
    assert set(found["beta2"]) == {np.float32(0.95)}
    assert set(found["max_grad_norm"]) == {2.5}
    np.testing.assert_array_equal(found["ema_share"], ema_shares(0.9, 20).astype(np.float32))


def test_without_clipping_no_norm_is_above_the_limit() -> None:
    assert (update_table(AdamW(), np.ones(3))[:, 6] == np.inf).all()


def test_rows_are_loaded_before_they_run_out() -> None:
    """Never so that a call may need one that is not there; a call takes one or many."""
    for steps, expected in ((1, [0, 4, 8]), (2, [0, 2, 4, 6, 8]), (3, list(range(10)))):
        events: list[str] = []
        step: Any = SimpleNamespace(
            rows=np.zeros((4, 8)), load_rows=lambda table, seen=events: seen.append("load")
        )
        rows = UpdateRows(step, np.zeros((1, 8)))
        for _ in range(10):
            rows.provide(steps)
            events.append("call")
        calls = [i for i, event in enumerate(events) if event == "call"]
        after = [sum(i < at for i in calls) for at, e in enumerate(events) if e == "load"]
        assert after == expected
