import pytest
import torch

from lora_lab.data.batches import BucketedBatches, EvaluationBatches, stratified_sample


def some_lengths(count):
    return torch.randint(3, 60, (count,), generator=torch.Generator().manual_seed(count))


def padded_tokens(batches, lengths):
    return sum(len(batch) * int(lengths[batch].max()) for batch in batches)


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize("count", [64, 1000, 1003])
def test_two_processes_see_the_global_batches_of_one(count, bucketed):
    lengths = some_lengths(count)
    one = BucketedBatches(lengths, 8, 3, bucketed)
    two = [BucketedBatches(lengths, 4, 3, bucketed, rank, 2) for rank in (0, 1)]
    for batches in (one, *two):
        batches.set_epoch(5)
    assert len(one) == len(two[0]) == len(two[1]) == len(list(one))
    for whole, first, second in zip(one, *two, strict=True):
        assert whole[0::2] == first
        assert whole[1::2] == second


@pytest.mark.parametrize("bucketed", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_has_every_example_once_and_one_batch_is_short(bucketed, world_size):
    shares = [
        BucketedBatches(some_lengths(1003), 8, 0, bucketed, rank, world_size) for rank in range(world_size)
    ]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(1003))
    together = [sum(map(len, batches)) for batches in zip(*shares, strict=True)]
    assert sorted(together)[1:] == [8 * world_size] * (1003 // (8 * world_size))
    assert min(together) == 1003 % (8 * world_size)


def test_the_rows_of_the_short_batch_are_not_the_longest():
    lengths = torch.arange(1003)
    short = [min(BucketedBatches(lengths, 8, seed), key=len) for seed in range(20)]
    assert [len(batch) for batch in short] == [3] * 20
    assert 350 < sum(map(sum, short)) / 60 < 650


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    lengths = some_lengths(500)
    first, again, other_seed, other_epoch = (BucketedBatches(lengths, 8, seed) for seed in (1, 1, 2, 1))
    other_epoch.set_epoch(1)
    torch.rand(7)
    assert list(first) == list(again) == list(first)
    assert list(first) != list(other_seed)
    assert list(first) != list(other_epoch)


def test_bucketing_removes_most_padding_and_still_mixes():
    lengths = some_lengths(6000)
    plain, bucketed = (list(BucketedBatches(lengths, 32, 0, choice)) for choice in (False, True))
    tokens = int(lengths.sum())
    waste_plain = padded_tokens(plain, lengths) / tokens - 1
    waste_bucketed = padded_tokens(bucketed, lengths) / tokens - 1
    assert waste_plain > 0.5
    assert waste_bucketed < 0.1
    longest = [int(lengths[batch].max()) for batch in bucketed]
    assert longest != sorted(longest)


def test_skipped_batches_leave_the_rest_and_the_length_as_they_are():
    batches = BucketedBatches(some_lengths(100), 8, 0)
    whole = list(batches)
    batches.skip = 5
    assert list(batches) == whole[5:]
    assert len(batches) == len(whole) == 13


def test_a_set_smaller_than_a_batch_is_one_short_batch():
    batches = BucketedBatches(some_lengths(5), 8, 0)
    assert [sorted(batch) for batch in batches] == [[0, 1, 2, 3, 4]]
    assert len(batches) == 1


def test_a_set_smaller_than_a_global_batch_is_one_short_batch_of_which_each_process_has_its_share():
    first, second = (BucketedBatches(some_lengths(7), 8, 0, rank=rank, world_size=2) for rank in (0, 1))
    assert [len(batch) for batch in first] == [4]
    assert [len(batch) for batch in second] == [3]


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 7, 64, 101])
def test_evaluation_has_every_example_exactly_once_over_all_processes(count, world_size):
    lengths = some_lengths(count)
    shares = [EvaluationBatches(lengths, 8, rank, world_size) for rank in range(world_size)]
    assert sorted(row for share in shares for batch in share for row in batch) == list(range(count))
    assert all(len(share) == len(list(share)) == len(list(share)) for share in shares)
    assert all(batch for share in shares for batch in share)
    longest = [int(lengths[batch].max()) for batch in shares[0]]
    assert longest == sorted(longest)


def test_a_sample_has_of_every_class_its_share_rounded_up():
    classes = torch.tensor([0] * 70 + [1] * 25 + [2] * 5)[torch.randperm(100)]
    for size, counts in ((20, [14, 5, 1]), (10, [7, 3, 1]), (1, [1, 1, 1]), (100, [70, 25, 5])):
        chosen = stratified_sample(size, classes, seed=3)
        assert classes[chosen].bincount().tolist() == counts
        assert chosen.tolist() == sorted(set(chosen.tolist()))


def test_a_sample_follows_from_its_seed_alone():
    classes, state = torch.zeros(1000), torch.get_rng_state()
    one, again, other = (stratified_sample(100, classes, seed) for seed in (3, 3, 4))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), state)
    # Drawn from all over the examples.
    assert one.float().mean() == pytest.approx(500, abs=100)
