"""Matrices head by head, against loops."""

import torch

from lora_lab.linalg.heads import per_head, stack_heads

HEADS, SHARE, WIDTH, N = 2, 3, 4, 5


def test_parts_of_a_group_stand_transposed_one_below_the_other():
    rows = torch.randn(HEADS * SHARE * WIDTH, N)
    stacked = stack_heads(rows, HEADS, WIDTH)
    for head, parts in enumerate(rows.split(SHARE * WIDTH)):
        assert torch.equal(stacked[head], torch.cat([part.T for part in parts.split(WIDTH)]))


def test_every_part_is_multiplied_by_the_matrix_of_its_group():
    K, y = torch.randn(HEADS, WIDTH, 2), torch.randn(7, 6, HEADS * SHARE * WIDTH)
    groups = y.split(SHARE * WIDTH, dim=-1)
    expected = [part @ K[head] for head, group in enumerate(groups) for part in group.split(WIDTH, dim=-1)]
    torch.testing.assert_close(per_head(y, K), torch.cat(expected, dim=-1))
    assert per_head(y[:0], K).shape == (0, 6, HEADS * SHARE * 2)
    torch.testing.assert_close(per_head(y[0, 0], K), torch.cat(expected, dim=-1)[0, 0])
