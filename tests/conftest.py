"""What all tests share: seeds, tiny random models with their batches, and no network."""

import gc
import os
import socket

# Of tiny tensors several threads only wait for each other, in the processes that tests start too.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest  # noqa: E402
import torch  # noqa: E402
import torch._dynamo.guards as guards  # noqa: E402
from lightning.pytorch.trainer.connectors import callback_connector  # noqa: E402

from lora_lab.testing import tiny_batch, tiny_model  # noqa: E402

torch.set_num_threads(1)

LOCAL = ("localhost", "127.0.0.1", "::1", "0.0.0.0", "")


def pytest_collection_finish():
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuses connections to other machines: a test that passes only online is a fault."""
    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in LOCAL:
            raise OSError(f"tests run offline; connection to {address} refused")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_locally)
        yield


@pytest.fixture(autouse=True, scope="session")
def nothing_aside():
    """Leaves out what libraries do beside their work, time and again.

    Lightning looks for callbacks in the metadata of every installed package, for every Trainer. torch empties
    the processor's cache after every compilation, to note how long its guards take.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(callback_connector, "_load_external_callbacks", lambda group: [])
        patch.setattr(guards, "profile_guard_manager", lambda *_: 0.0, raising=False)
        yield


@pytest.fixture(autouse=True, scope="module")
def imports_are_kept():
    """Spares the garbage collector what stays until the end, such as imported modules and collected tests."""
    yield
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def seeded():
    # `torch.manual_seed` formats the whole stack for each kind of device that is not in use.
    torch.default_generator.manual_seed(0)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(0)


@pytest.fixture
def register(monkeypatch):
    """`lora_lab.register`, for the length of one test."""
    from lora_lab import CONTROLLERS, METHODS, register

    for table in (METHODS, CONTROLLERS):
        monkeypatch.setattr(table, "_kinds", dict(table))
    return register


@pytest.fixture(scope="session")
def make_model():
    return tiny_model


@pytest.fixture(scope="session")
def make_batch():
    return tiny_batch
