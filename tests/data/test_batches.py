import pytest
import torch

from lora_lab.data.batches import BucketedBatches, EvaluationBatches, stratified_sample
from lora_lab.errors import DataError


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
def test_an_epoch_has_every_example_at_most_once_and_only_a_remainder_is_left_out(bucketed):
    seen = [row for batch in BucketedBatches(some_lengths(1003), 8, 0, bucketed) for row in batch]
    assert len(seen) == len(set(seen)) == 1000


def test_the_rows_left_out_are_not_the_longest():
    lengths = torch.arange(1003)
    left_out = []
    for seed in range(20):
        seen = {row for batch in BucketedBatches(lengths, 8, seed) for row in batch}
        left_out += sorted(set(range(1003)) - seen)
    assert len(left_out) == 60
    assert 350 < sum(left_out) / 60 < 650


def test_order_depends_on_seed_and_epoch_and_nothing_else():
    lengths = some_lengths(500)
    first, again, other_seed, other_epoch = (BucketedBatches(lengths, 8, seed) for seed in (1, 1, 2, 1))
    other_epoch.set_epoch(1)
    torch.rand(7)
    assert list(first) == list(again) == list(first)
    assert list(first) != list(other_seed)
    assert list(first) != list(other_epoch)
    assert {row for batch in other_epoch for row in batch} != {row for batch in first for row in batch}


def test_bucketing_removes_most_padding_and_still_mixes():
    lengths = some_lengths(6000)
    plain, bucketed = (list(BucketedBatches(lengths, 32, 0, choice)) for choice in (False, True))
    tokens = int(lengths[torch.tensor(plain).flatten()].sum())
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
    assert len(batches) == len(whole) == 12


def test_a_set_smaller_than_a_batch_is_one_short_batch():
    batches = BucketedBatches(some_lengths(5), 8, 0)
    assert [sorted(batch) for batch in batches] == [[0, 1, 2, 3, 4]]
    assert len(batches) == 1


def test_a_set_smaller_than_a_global_batch_is_refused_on_several_devices():
    with pytest.raises(DataError, match="7 training examples .* 4 on each of 2 devices; .* at most 3"):
        BucketedBatches(some_lengths(7), 4, 0, rank=1, world_size=2)


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
