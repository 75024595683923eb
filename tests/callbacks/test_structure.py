"""Sharing and slicing in the middle of a fit: optimizer, schedule and DDP take it."""

import lightning as L
import pytest
import torch

from lora_lab.adapters.methods.lora import LoRASpec
from lora_lab.callbacks.controllers.structure import structure_changed
from tests.adapters.tiny import relative
from tests.callbacks.controlled import from_two_processes, hand_back, train as train_controlled

STEPS, SHARED, SLICED = 12, 3, 6
TOLERANCE = 1e-5
"""Relative to the largest number: float32 sums of two halves against one sum, over 12 steps of Adam."""


class Changes(L.Callback):
    """Layer3 uses layer2's tensors after SHARED steps; layer1 has two of four components after SLICED."""

    def __init__(self, adapters):
        self.adapters, self.seen, self.gradients = adapters, [], {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        (optimizer,) = trainer.optimizers
        if trainer.global_step == SHARED:
            self.adapters.share("layer3", "layer2")
            structure_changed(trainer, self.adapters)
        if trainer.global_step == SLICED:
            adapter = self.adapters.adapters["layer1"]
            adapter.select_components(torch.tensor([0, 2]))
            for parameter in (adapter.A, adapter.B):
                optimizer.state.pop(parameter)
            structure_changed(trainer, self.adapters)
        names = {id(tensor): name for name, tensor in self.adapters.named_parameters().items()}
        self.seen.append(
            (
                id(optimizer),
                [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
                {names[id(p)] for p in optimizer.state},
                [group["lr"] for group in optimizer.param_groups],
            )
        )
        self.gradients = {name: p.grad.clone() for name, p in self.adapters.named_parameters().items()}


def train(devices=1, stop_after=None, folder=None, resume=False):
    done = []

    def changes(adapters):
        done.append(Changes(adapters))
        return done[0]

    run = train_controlled(
        LoRASpec(rank=4),
        {},
        STEPS,
        devices,
        extra=[changes],
        stop_after=stop_after,
        folder=folder,
        resume=resume,
        loraplus_ratio=2,
        head_learning_rate=0.001,
    )
    return run.adapters, done[0]


def test_the_optimizer_forgets_what_is_trained_no_more_and_the_schedule_goes_on():
    adapters, changes = train()
    assert len({optimizer for optimizer, *_ in changes.seen}) == 1
    _, before, held_before, _ = changes.seen[SHARED - 2]
    _, after, held_after, _ = changes.seen[-1]
    gone = {"layer3.A", "layer3.B"}
    assert [[name for name in group if name not in gone] for group in before] == after
    assert held_before == {name for group in before for name in group}
    assert held_after == {name for group in after for name in group} == held_before - gone
    assert adapters.adapters["layer1"].A.shape == (2, 6)
    rates = [rates for *_, rates in changes.seen]
    assert all(fast == 2 * slow for slow, fast, _ in rates)
    assert [slow for slow, *_ in rates[1:]] == sorted((slow for slow, *_ in rates[1:]), reverse=True)


@pytest.mark.parametrize("stopped", [2, 5, 9])
def test_a_run_resumed_before_or_after_the_change_equals_the_uninterrupted_one(tmp_path, stopped):
    train(stop_after=stopped, folder=tmp_path)
    resumed, changes = train(folder=tmp_path, resume=True)
    whole, expected = train()
    ours, theirs = resumed.state_dict(), whole.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert [seen[1:] for seen in changes.seen] == [seen[1:] for seen in expected.seen[stopped:]]


@pytest.mark.parametrize("fused", [True, False])
def test_an_emptied_group_is_no_obstacle_to_steps_schedule_and_checkpoints(fused):
    def make(second):
        first = torch.nn.Parameter(torch.ones(2))
        optimizer = torch.optim.AdamW([{"params": [first]}, {"params": second, "lr": 1.0}], fused=fused)
        return first, optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))

    first, optimizer, schedule = make([torch.nn.Parameter(torch.ones(2))])
    first.sum().backward()
    optimizer.step()
    optimizer.param_groups[1]["params"] = []
    for _ in range(2):
        schedule.step()
        optimizer.step()
    assert optimizer.param_groups[1]["lr"] == pytest.approx(1 / 3)
    _, other, again = make([])
    other.load_state_dict(optimizer.state_dict())
    again.load_state_dict(schedule.state_dict())
    assert other.state_dict().keys() == optimizer.state_dict().keys()
    assert again.get_last_lr() == schedule.get_last_lr()


@pytest.mark.slow
def test_two_processes_go_on_averaging_their_gradients(tmp_path):
    two = from_two_processes(__file__, tmp_path)
    adapters, changes = train()
    for kind, found in {"weights": adapters.state_dict(), "gradients": changes.gradients}.items():
        for name, tensor in found.items():
            difference = relative(two[kind][name].float(), tensor.float())
            assert difference <= TOLERANCE, (kind, name, difference)


if __name__ == "__main__":  # one of two processes
    adapters, changes = train(devices=2)
    hand_back({"weights": adapters.state_dict(), "gradients": changes.gradients})
