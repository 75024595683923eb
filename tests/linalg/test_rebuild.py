"""Activations that are made again."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lora_lab.callbacks.saved_tensors import SavedTensors
from lora_lab.linalg.rebuild import in_pieces, source


def hidden(dtype=torch.float32):
    return torch.randn(2, 7, 12, dtype=dtype, requires_grad=True) * 1.0


def frozen(module, dtype=torch.float32):
    for parameter in module.requires_grad_(False).parameters():
        parameter.copy_(torch.randn_like(parameter))
    return module.to(dtype)


def swiglu(h):
    return F.silu(h.flip(0)) * h


KNOWN = {
    "layer norm": lambda dtype: frozen(nn.LayerNorm(12), dtype),
    "layer norm without bias": lambda dtype: frozen(nn.LayerNorm(12, bias=False), dtype),
    "layer norm without weight": lambda dtype: nn.LayerNorm(12, elementwise_affine=False),
    "gelu": lambda dtype: F.gelu,
    "gelu by tanh": lambda dtype: lambda h: F.gelu(h, approximate="tanh"),
    "swiglu": lambda dtype: swiglu,
    "rms norm": lambda dtype: frozen(LlamaRMSNorm(12), dtype),
}
UNKNOWN = {
    "an input": lambda h: h.detach(),
    "a leaf": lambda h: h.detach().requires_grad_(),
    "tanh": torch.tanh,
    "a view": lambda h: F.gelu(h).transpose(0, 1),
    "a product with a matrix": lambda h: h * torch.randn(7, 12, requires_grad=True),
    "layer norm of two axes": nn.LayerNorm((7, 12)),
    "a vector": lambda h: F.gelu(h[0, 0]),
    "changed in place": lambda h: F.gelu(h).add_(1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", KNOWN)
@torch.no_grad()
def test_activation_is_made_again_of_what_its_own_backward_pass_keeps(name, dtype):
    make = KNOWN[name](dtype)
    saved = SavedTensors()
    with torch.enable_grad():
        saved.start()
        x = make(hidden(dtype))
        saved.stop()
    count = saved.count()
    build, tensors = source(x)
    assert x.untyped_storage().data_ptr() not in {t.untyped_storage().data_ptr() for t in tensors}
    tolerance = {} if dtype != torch.bfloat16 else {"atol": 2e-2, "rtol": 1e-2}
    assert build(*tensors).dtype == dtype
    torch.testing.assert_close(build(*tensors), x, **tolerance)
    pieces = list(in_pieces(build, tensors, x.shape[:-1], 4))
    assert [len(piece) for piece in pieces] == [4, 4, 4, 2]
    torch.testing.assert_close(torch.cat(pieces).view_as(x), x, **tolerance)
    # Saving them once more keeps nothing new.
    with torch.enable_grad():
        saved.start()
        y = Keep.apply(x, *tensors)
        saved.stop()
    assert saved.count() == count
    del y


class Keep(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, *tensors):
        ctx.save_for_backward(*tensors)
        return x.clone()


def is_itself(x):
    build, tensors = source(x)
    return tensors[0] is x and build(*tensors) is x


@pytest.mark.parametrize("name", UNKNOWN)
def test_activation_of_unknown_origin_is_kept_itself(name):
    assert is_itself(UNKNOWN[name](hidden()))


def test_hooks_that_do_more_than_look_are_never_called():
    def refused(_):
        raise AssertionError

    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, refused):
        during = F.gelu(hidden())
    assert is_itself(during)
    before = F.gelu(hidden())
    with torch.autograd.graph.save_on_cpu():
        assert is_itself(before)
    assert not is_itself(before)


def test_activation_whose_graph_is_freed_or_overwritten_is_kept_itself():
    freed = F.gelu(hidden())
    freed.sum().backward()
    h = hidden()
    overwritten = F.gelu(h)
    h.zero_()
    assert is_itself(freed)
    assert is_itself(overwritten)


def test_what_a_checkpointed_part_returns_is_kept_itself():
    x = checkpoint(lambda h: F.gelu(h), hidden(), use_reentrant=False)
    assert is_itself(x)
    x.sum().backward()
