import pytest
import torch

from lora_lab.linalg.pruning import alive, largest_share, smoothed, strongest

ALL = torch.tensor([True, True, True])
WORKED = torch.tensor([6.0, 0.06, 9.0])


@pytest.mark.parametrize(
    ("threshold", "largest", "flags"),
    [
        (0.1, 9.0, [True, False, True]),
        (0.0, 9.0, [True, True, True]),
        (0.9, 9.0, [False, False, True]),
        (6 / 9, 9.0, [False, False, True]),  # a share that is just reached is too little
        (0.1, 70.0, [False, False, True]),  # the largest of the model stands elsewhere
    ],
)
def test_components_up_to_a_share_of_the_largest_die(threshold, largest, flags):
    assert alive(WORKED, ALL, threshold, largest).tolist() == flags
    assert alive(WORKED, ALL, threshold, torch.tensor(largest)).tolist() == flags


def test_the_dead_do_not_come_back_and_a_second_pruning_changes_nothing():
    kept = torch.tensor([True, True, False])
    once = alive(WORKED, kept, 0.1, 9.0)
    assert once.tolist() == [True, False, False]
    assert torch.equal(alive(WORKED, once, 0.1, 9.0), once)


@pytest.mark.parametrize(
    ("min_rank", "flags"),
    [
        (0, [False, False, False]),
        (1, [False, False, True]),
        (2, [True, False, True]),
        (5, [True, True, True]),
    ],
)
def test_the_strongest_stay_whatever_the_threshold(min_rank, flags):
    assert alive(WORKED, ALL, 0.1, 1000.0, min_rank).tolist() == flags


def test_the_strongest_are_chosen_among_those_alive_and_the_first_of_equals():
    kept = torch.tensor([True, True, False])
    assert alive(WORKED, kept, 0.5, 1000.0).tolist() == [True, False, False]
    assert alive(torch.ones(3), ALL, 0.5, 1000.0, 2).tolist() == [True, True, False]


def test_nothing_dies_before_anything_is_learned():
    kept = torch.tensor([True, False, True])
    assert alive(torch.zeros(3), kept, 0.1, 0.0).tolist() == kept.tolist()


def test_flags_given_are_not_changed():
    kept = ALL.clone()
    alive(WORKED, kept, 0.1, 9.0).zero_()
    alive(torch.zeros(3), kept, 0.1, 0.0).zero_()
    assert kept.all()


def test_averages_of_the_worked_example():
    """p = (.5, −1, 2) with the gradients (.2, .1, −.3) and then (.4, 0, .1), β1 = β2 = .85."""
    p = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    averages = torch.zeros_like(p), torch.zeros_like(p)
    for g in ([0.2, 0.1, -0.3], [0.4, 0.0, 0.1]):
        measured = (p * torch.tensor(g, dtype=torch.float64)).abs()
        averages = smoothed(*averages, measured, 0.85, 0.85)
    sensitivity, uncertainty = averages
    assert sensitivity.tolist() == pytest.approx([0.04275, 0.01275, 0.1065], abs=1e-15)
    assert uncertainty.tolist() == pytest.approx([0.034425, 0.01275, 0.07905], abs=1e-15)
    assert (sensitivity * uncertainty).tolist() == pytest.approx(
        [0.00147167, 0.00016256, 0.00841883], abs=5e-9
    )


def test_the_two_averages_have_rates_of_their_own():
    before = torch.tensor([1.0]), torch.tensor([2.0])
    sensitivity, uncertainty = smoothed(*before, torch.tensor([3.0]), 0.9, 0.5)
    assert sensitivity.tolist() == pytest.approx([0.9 * 1 + 0.1 * 3])
    assert uncertainty.tolist() == pytest.approx([0.5 * 2 + 0.5 * (3 - 1.2)])


@pytest.mark.parametrize("valid", [False, torch.tensor(False)])
def test_what_is_not_valid_leaves_no_trace(valid):
    before = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])
    after = smoothed(*before, torch.tensor([torch.inf, torch.nan]), 0.9, 0.5, valid)
    assert all(torch.equal(new, old) for new, old in zip(after, before, strict=True))


def test_strongest_are_those_that_sorting_by_hand_gives():
    """Many equal scores and zeros among them; the first of equals win."""
    generator = torch.Generator().manual_seed(0)
    for count in range(31):
        scores = torch.randint(0, 5, (30,), generator=generator).float() / 4
        order = sorted(range(30), key=lambda i, scores=scores: (-float(scores[i]), i))
        assert strongest(scores, count).nonzero().flatten().tolist() == sorted(order[:count])
    assert strongest(torch.zeros(4), 9).tolist() == [True] * 4


@pytest.mark.parametrize(
    ("values", "share", "kept"),
    [
        ([4, 1, 3, 2], 0.9, [0, 2, 3]),
        ([4, 1, 3, 2], 0.91, [0, 1, 2, 3]),
        ([4, 1, 3, 2], 0.4, [0]),
        ([4, 1, 3, 2], 0.41, [0, 2]),
        ([4, 1, 3, 2], 1e-6, [0]),
        ([0.4, 0.1, 0.3, 0.2], 0.9, [0, 2, 3]),  # .4 + .3 + .2 is just below .9
        ([1, 1, 1, 1], 0.5, [0, 1]),  # the first of equal ones
        ([0, 5, 0], 0.999, [1]),
        ([0, 5, 0], 1.0, [0, 1, 2]),
    ],
)
def test_the_fewest_values_that_make_up_a_share_are_taken(values, share, kept):
    flags = largest_share(torch.tensor(values, dtype=torch.float64), share)
    assert flags.nonzero().flatten().tolist() == kept
