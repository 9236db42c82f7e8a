"""Which samples a step takes."""

from __future__ import annotations

import itertools

import pytest

from sdxl_host.data.order import Order


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_every_epoch_is_a_permutation_and_nothing_is_dropped(count, batch):
    """Batches are cut from an endless chain of epochs, so one may span two or more."""
    order = Order(count, batch, 42, shuffle=True)
    steps = -(-6 * count // batch)
    batches = [order.indices(step) for step in range(1, steps + 1)]
    assert all(len(one) == batch for one in batches)
    chain = list(itertools.chain.from_iterable(batches))
    for epoch in range(6):
        assert sorted(chain[epoch * count : (epoch + 1) * count]) == list(range(count))


def test_the_chain_does_not_depend_on_the_batch():
    """So a run is the same however its batch is split."""
    chains = []
    for batch in (1, 2, 3, 6, 12):
        order = Order(7, batch, 42, shuffle=True)
        chains.append(
            list(
                itertools.chain.from_iterable(
                    order.indices(step) for step in range(1, 84 // batch + 1)
                )
            )
        )
    assert all(chain == chains[0] for chain in chains)


def test_the_order_is_a_function_of_seed_and_epoch():
    order = Order(10, 4, 42, shuffle=True)
    later = order.indices(1000)
    assert Order(10, 4, 42, shuffle=True).indices(1000) == later  # nothing before it is needed
    epochs = [tuple(Order(10, 10, 42, True).indices(epoch)) for epoch in range(1, 6)]
    assert len(set(epochs)) == 5
    assert Order(10, 10, 43, True).indices(1) != list(epochs[0])


def test_without_shuffle_the_order_is_that_of_the_names():
    order = Order(3, 2, 42, shuffle=False)
    assert [order.indices(step) for step in (1, 2, 3, 4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_indices_are_plain_integers():
    for shuffle in (True, False):
        assert {type(i) for i in Order(3, 4, 1, shuffle).indices(1)} == {int}
