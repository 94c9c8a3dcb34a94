import pytest

from megacocomix.data.tokens import permuted_index


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, 65, 1000])
def test_every_epoch_visits_every_item_once(size):
    for epoch in range(3):
        assert sorted(permuted_index(5, epoch, i, size) for i in range(size)) == list(range(size))


def test_epochs_and_seeds_differ():
    orders = [tuple(permuted_index(seed, epoch, i, 50) for i in range(50)) for seed in range(5) for epoch in range(5)]
    assert len(set(orders)) == len(orders)


def test_order_is_the_one_of_earlier_versions():
    """A run that resumes under a newer version must go on with the samples it has not seen."""
    assert [permuted_index(22, 1, i, 10) for i in range(10)] == [8, 6, 4, 2, 9, 7, 3, 5, 1, 0]
    assert permuted_index(22, 3, 123_456_789_012, 10**12) == 97_553_930_770
