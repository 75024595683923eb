"""Loaders alone and under a real Trainer: randomness, processes, and going on in the middle of an epoch."""

from types import SimpleNamespace

import lightning as L
import pytest
import torch

from lora_lab.data import build_data
from lora_lab.data.toy import ToyConfig
from lora_lab.errors import CheckpointError, DataError

BATCHES_PER_EPOCH = 6


def toy_data(seed=0, **options):
    """22 examples in batches of 4: six batches, one of them of two examples."""
    options = {"size": 22, "features": 2, "batch_size": 4, **options}
    return build_data(ToyConfig(**options), None, "regression", seed)


def contents(batch):
    return batch["features"][:, 0].tolist()


class Recorder(L.LightningModule):
    """Trains one linear map and remembers epoch, batch number and contents of every batch."""

    def __init__(self, asks_for_number_of_steps):
        super().__init__()
        self.linear = torch.nn.Linear(2, 1)
        self.asks_for_number_of_steps = asks_for_number_of_steps
        self.seen = []

    def training_step(self, batch, number):
        self.seen.append((self.current_epoch, number, contents(batch)))
        return (self.linear(batch["features"]) - batch["labels"]).square().mean()

    def validation_step(self, batch, number):
        self.log("loss", self.linear(batch["features"]).mean())

    def configure_optimizers(self):
        if self.asks_for_number_of_steps:
            # Makes Lightning build the training loader before it restores its progress from a checkpoint.
            assert self.trainer.estimated_stepping_batches
        return torch.optim.SGD(self.parameters(), 1e-3)


class Interruption(Exception):
    pass


class SaveAndInterrupt(L.Callback):
    """Writes a checkpoint at one point of the run and ends it there."""

    def __init__(self, point, epoch, batches, path):
        self.point, self.epoch, self.batches, self.path = point, epoch, batches, path

    def reached(self, trainer, point):
        done = trainer.fit_loop.epoch_loop.batch_progress.current.ready
        if (point, trainer.current_epoch, done) == (self.point, self.epoch, self.batches):
            trainer.save_checkpoint(self.path)
            raise Interruption

    def on_train_batch_end(self, trainer, *_):
        self.reached(trainer, "batch")

    def on_validation_end(self, trainer, _):
        self.reached(trainer, "validation")

    def on_train_epoch_end(self, trainer, _):
        self.reached(trainer, "epoch")


def make_trainer(callbacks=(), **options):
    return L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        callbacks=list(callbacks),
        **options,
    )


def test_every_epoch_has_its_own_order_under_a_trainer():
    module, data = Recorder(False), toy_data()
    make_trainer(max_epochs=3, limit_val_batches=0).fit(module, data)
    epochs = [[batch for epoch, _, batch in module.seen if epoch == number] for number in range(3)]
    assert [len(epoch) for epoch in epochs] == [BATCHES_PER_EPOCH] * 3
    assert epochs[0] == [contents(batch) for batch in toy_data().train_dataloader()]
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]


INTERRUPTIONS = [
    ("batch", 0, 2),
    ("batch", 2, 3),
    ("batch", 1, BATCHES_PER_EPOCH),
    ("validation", 1, 3),
    ("validation", 1, BATCHES_PER_EPOCH),
    ("epoch", 1, BATCHES_PER_EPOCH),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "length", [{"max_epochs": 4}, {"max_epochs": -1, "max_steps": 21}], ids=["epochs", "steps"]
)
@pytest.mark.parametrize("asks", [False, True], ids=["plain", "asks_for_steps"])
@pytest.mark.parametrize(("point", "epoch", "batches"), INTERRUPTIONS)
def test_resumed_run_sees_exactly_the_remaining_batches(tmp_path, point, epoch, batches, asks, length):
    path = tmp_path / "run.ckpt"
    options = {"val_check_interval": 0.5, **length}
    whole, resumed = Recorder(asks), Recorder(asks)
    make_trainer(**options).fit(whole, toy_data())
    with pytest.raises(Interruption):
        make_trainer([SaveAndInterrupt(point, epoch, batches, path)], **options).fit(
            Recorder(asks), toy_data()
        )
    make_trainer(**options).fit(resumed, toy_data(), ckpt_path=path)
    assert resumed.seen == whole.seen[epoch * BATCHES_PER_EPOCH + batches :]


@pytest.mark.filterwarnings("ignore")
def test_resuming_works_with_workers_and_accumulation_and_without_validation(tmp_path):
    path = tmp_path / "run.ckpt"
    options = {"max_epochs": 3, "accumulate_grad_batches": 2, "limit_val_batches": 0}
    whole, resumed = Recorder(True), Recorder(True)
    make_trainer(**options).fit(whole, toy_data())
    with pytest.raises(Interruption):
        make_trainer([SaveAndInterrupt("batch", 1, 4, path)], **options).fit(
            Recorder(True), toy_data(workers=1)
        )
    make_trainer(**options).fit(resumed, toy_data(workers=1), ckpt_path=path)
    assert resumed.seen == whole.seen[BATCHES_PER_EPOCH + 4 :]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("other", "named"),
    [({"split_seed": 5}, "fingerprint"), ({"seed": 5}, "seed"), ({"batch_size": 5}, "global_batch_size")],
)
def test_going_on_with_other_data_is_refused_but_testing_is_not(tmp_path, other, named):
    path = tmp_path / "run.ckpt"
    trainer = make_trainer(max_epochs=1)
    trainer.fit(Recorder(False), toy_data())
    trainer.save_checkpoint(path)
    with pytest.raises(CheckpointError, match=f"data: {named} differ"):
        make_trainer(max_epochs=2).fit(Recorder(False), toy_data(**other), ckpt_path=path)
    make_trainer().validate(Recorder(False), toy_data(**other), ckpt_path=path, verbose=False)


@pytest.mark.parametrize("workers", [0, 1])
def test_loaders_leave_the_global_generator_alone(workers):
    before = torch.get_rng_state()
    data = toy_data(workers=workers)
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader()):
        assert len(list(loader)) == len(loader)
    assert torch.equal(torch.get_rng_state(), before)


def test_workers_give_the_same_batches():
    alone, helped = (toy_data(workers=workers).train_dataloader() for workers in (0, 2))
    assert [contents(batch) for batch in alone] == [contents(batch) for batch in helped]


def on_device(rank, world_size, **options):
    data = toy_data(**options)
    loop = SimpleNamespace(restarting=False, epoch_loop=None)
    loop.epoch_loop = SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=0)))
    data.trainer = SimpleNamespace(global_rank=rank, world_size=world_size, current_epoch=0, fit_loop=loop)
    return data


def test_each_process_loads_its_share():
    whole = toy_data(batch_size=4)
    shares = [on_device(rank, 2, batch_size=2) for rank in (0, 1)]
    batches = zip(whole.train_dataloader(), *(share.train_dataloader() for share in shares), strict=True)
    for one, first, second in batches:
        assert sorted(contents(one)) == sorted(contents(first) + contents(second))
    validated = [row for share in shares for batch in share.val_dataloader() for row in contents(batch)]
    everything = [row for batch in whole.val_dataloader() for row in contents(batch)]
    assert sorted(validated) == sorted(everything)
    assert len(set(everything)) == 22


def test_a_process_without_a_row_of_the_last_batch_has_one_that_does_not_count():
    data = on_device(1, 2, size=17, batch_size=2)
    batches = list(data.train_dataloader())
    assert len(batches) == 5
    counted = [int((~batch["labels"].isnan()).sum()) for batch in batches]
    assert sorted(counted) == [0, 2, 2, 2, 2]
    assert all(len(batch["labels"]) for batch in batches)


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_fewer_examples_than_processes_are_refused(split):
    data = on_device(1, 3, **{f"{split}_limit": 2})
    message = f"trainer.devices: 3 processes need at least one example each, and the {split} split has 2"
    loader = {"train": data.train_dataloader, "validation": data.val_dataloader, "test": data.test_dataloader}
    with pytest.raises(DataError, match=message):
        loader[split]()
    with pytest.raises(DataError, match=message):
        data.batches_per_epoch(3)
