"""Which samples a step takes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from sdxl_host.data.order import Order


@pytest.mark.parametrize("count", [1, 5, 8])
@pytest.mark.parametrize("batch", [1, 3, 8, 20])
def test_every_epoch_is_a_permutation_and_nothing_is_dropped(count, batch):
    """Batches are cut from an endless chain of epochs, so one may span two or more."""
    order = Order([np.arange(count)], batch, 42, shuffle=True)
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
        order = Order([np.arange(7)], batch, 42, shuffle=True)
        chains.append(
            list(
                itertools.chain.from_iterable(
                    order.indices(step) for step in range(1, 84 // batch + 1)
                )
            )
        )
    assert all(chain == chains[0] for chain in chains)


def test_the_order_is_a_function_of_seed_and_epoch():
    order = Order([np.arange(10)], 4, 42, shuffle=True)
    later = order.indices(1000)
    assert (
        Order([np.arange(10)], 4, 42, shuffle=True).indices(1000) == later
    )  # nothing before it is needed
    epochs = [tuple(Order([np.arange(10)], 10, 42, True).indices(epoch)) for epoch in range(1, 6)]
    assert len(set(epochs)) == 5
    assert Order([np.arange(10)], 10, 43, True).indices(1) != list(epochs[0])


def test_without_shuffle_the_order_is_that_of_the_names():
    order = Order([np.arange(3)], 2, 42, shuffle=False)
    assert [order.indices(step) for step in (1, 2, 3, 4)] == [[0, 1], [2, 0], [1, 2], [0, 1]]


def test_indices_are_plain_integers():
    for shuffle in (True, False):
        assert {type(i) for i in Order([np.arange(3)], 4, 1, shuffle).indices(1)} == {int}


# ---- groups, of which a batch holds one


def runs(counts: list[int], batch: int, steps: int, **more) -> list[tuple[int, list[int]]]:
    starts = np.cumsum([0, *counts])
    groups = [np.arange(a, b) for a, b in itertools.pairwise(starts)]
    order = Order(groups, batch, 42, **{"shuffle": True, **more})
    return [(order.group(step), order.indices(step)) for step in range(1, steps + 1)]


@pytest.mark.parametrize("counts", [[7, 5], [1, 1, 30], [100, 3, 8], [2, 2, 2]])
@pytest.mark.parametrize("batch", [1, 4, 9])
def test_a_batch_is_of_one_group_and_nothing_is_dropped(counts, batch):
    """Each group's samples come as an endless chain of permutations, whatever the others do."""
    starts = np.cumsum([0, *counts])
    chains = [[] for _ in counts]
    for group, indices in runs(counts, batch, 200):
        assert len(indices) == batch
        assert all(starts[group] <= index < starts[group + 1] for index in indices)
        chains[group] += indices
    for group, (chain, count) in enumerate(zip(chains, counts, strict=True)):
        assert chain
        for epoch in range(len(chain) // count):
            part = sorted(chain[epoch * count : (epoch + 1) * count])
            assert part == list(range(starts[group], starts[group] + count))


def test_each_group_has_its_share_of_every_epoch():
    """10,000 and 100 samples in batches of 8: 1,250 and 12 or 13 batches an epoch."""
    found = [group for group, _ in runs([10_000, 100], 8, 1262 * 3)]
    for epoch in range(3):
        part = found[epoch * 1262 : (epoch + 1) * 1262]
        assert 11 <= part.count(1) <= 14
    assert len({tuple(found[i * 1262 : (i + 1) * 1262]) for i in range(3)}) == 3


def test_a_step_s_batch_needs_no_earlier_one():
    every = runs([7, 5, 23], 4, 300)
    order = Order([np.arange(0, 7), np.arange(7, 12), np.arange(12, 35)], 4, 42, shuffle=True)
    assert (order.group(300), order.indices(300)) == every[-1]


def test_what_takes_the_place_of_a_sample_is_the_next_in_its_chain():
    order = Order([np.arange(7), np.arange(7, 12)], 4, 42, shuffle=True)
    for step in range(1, 30):
        later = next(s for s in range(step + 1, 60) if order.group(s) == order.group(step))
        chain = order.indices(step) + order.indices(later)
        assert [order.following(step, 1, tries) for tries in range(5)] == chain[1:6]


def test_a_sample_that_is_repeated_comes_so_often():
    order = Order([np.array([0, 0, 0, 1])], 4, 42, shuffle=True)
    assert all(sorted(order.indices(step)) == [0, 0, 0, 1] for step in range(1, 9))
