import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora_lab.adapters import inject
from lora_lab.adapters.families.positions import cached_tokens, prompt_slots
from lora_lab.adapters.methods.reft import Edit, ReFT, ReFTSpec
from lora_lab.adapters.storage import load_adapter, save_adapter
from lora_lab.errors import ConfigError, IncompatibleError
from lora_lab.testing import Variant, contract

test_contract = contract(
    ReFT,
    Variant(
        "",
        {"rank": 4},
        on={
            "bert": {"layers": [0]},
            "t5": {"positions": "all"},
            "plain": {"targets": ["block"]},
            "nf4": {"layers": [0]},
        },
        rounded=("folder",),
    ),
    Variant("all", {"rank": 4, "positions": "all"}, on={"bert": {"layers": [0]}}, rounded=("folder",)),
    Variant(
        "shared",
        {"rank": 4, "positions": "f2+l2", "share_weights": True},
        on={"bert": {"layers": [0]}},
        rounded=("folder",),
    ),
    Variant(
        "noreft",
        {"rank": 4, "intervention": "noreft"},
        on={"bert": {"layers": [0]}},
        rounded=("folder",),
    ),
    Variant(
        "direft",
        {"rank": 4, "intervention": "direft", "act_fn": "silu"},
        on={"bert": {"layers": [0]}},
        rounded=("folder",),
    ),
    Variant(
        "nodireft",
        {"rank": 4, "intervention": "nodireft", "init": "identity"},
        start="exact",
        on={"bert": {"layers": [0]}},
        rounded=("folder",),
    ),
    Variant(
        "consreft", {"rank": 4, "intervention": "consreft"}, on={"bert": {"layers": [0]}}, rounded=("folder",)
    ),
    Variant(
        "lobireft", {"rank": 4, "intervention": "lobireft"}, on={"bert": {"layers": [0]}}, rounded=("folder",)
    ),
    Variant(
        "identity",
        {"rank": 4, "init": "identity"},
        start="rounded",
        on={"bert": {"layers": [0]}},
        rounded=("folder",),
    ),
)


FAMILY = ("loreft", "noreft", "direft", "nodireft", "consreft", "lobireft")
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}


def changed_positions(model, adapters, **inputs) -> list[tuple[int, int]]:
    """Returns the (row, time) pairs at which the first adapter changes its block's output by a single bit."""
    adapter, seen = next(iter(adapters)), {}
    hooks = [
        adapter.base.register_forward_hook(lambda *call: seen.update(before=call[-1])),
        adapter.register_forward_hook(lambda *call: seen.update(after=call[-1])),
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    before, after = (x[0] if isinstance(x, tuple) else x for x in (seen["before"], seen["after"]))
    return [tuple(pair) for pair in (before != after).any(-1).nonzero().tolist()]


# The family -----------------------------------------------------------------------------------------------


def test_worked_edit():
    edit = Edit(3, ReFTSpec(rank=1), torch.float64)
    edit.original.data.copy_(torch.tensor([[1.0], [0], [0]]))
    edit.W.data.copy_(torch.tensor([[0.0, 1, 0]]))
    edit.b.data.fill_(0.5)
    h = torch.tensor([1.0, 2, 3], dtype=torch.float64)
    torch.testing.assert_close(h + edit(h), torch.tensor([2.5, 2, 3], dtype=torch.float64))


@pytest.mark.parametrize("intervention", FAMILY)
def test_formula(intervention):
    sourced = intervention in ("loreft", "noreft", "direft", "nodireft")
    act_fn = "tanh" if sourced else "none"
    spec = ReFTSpec(rank=3, intervention=intervention, act_fn=act_fn)
    edit = Edit(8, spec, torch.float64)
    h = torch.randn(2, 5, 8, dtype=torch.float64)
    R, projected = edit.R, h @ edit.R
    expected = {
        "loreft": lambda: (h @ edit.W.T + edit.b).tanh() - projected,
        "noreft": lambda: (h @ edit.W.T + edit.b).tanh() - projected,
        "direft": lambda: (h @ edit.W.T + edit.b).tanh(),
        "nodireft": lambda: (h @ edit.W.T + edit.b).tanh(),
        "consreft": lambda: edit.b - projected,
        "lobireft": lambda: edit.b.expand_as(projected),
    }[intervention]()
    torch.testing.assert_close(edit(h), expected @ R.T)
    orthonormal = torch.allclose(R.T @ R, torch.eye(3, dtype=torch.float64), atol=1e-12)
    assert orthonormal == (intervention not in ("noreft", "nodireft"))


def test_loreft_sets_its_subspace_and_leaves_the_rest():
    edit = Edit(8, ReFTSpec(rank=3), torch.float64)
    h = torch.randn(5, 8, dtype=torch.float64)
    R, after = edit.R, h + edit(h)
    torch.testing.assert_close(after @ R, h @ edit.W.T + edit.b)
    rest = torch.eye(8, dtype=torch.float64) - R @ R.T
    torch.testing.assert_close(after @ rest, h @ rest)


@pytest.mark.parametrize(
    ("intervention", "count"),
    [
        ("loreft", 2 * 3 * 8 + 3),
        ("noreft", 2 * 3 * 8 + 3),
        ("direft", 2 * 3 * 8 + 3),
        ("nodireft", 2 * 3 * 8 + 3),
        ("consreft", 3 * 8 + 3),
        ("lobireft", 3 * 8 + 3),
    ],
)
def test_number_of_parameters(intervention, count):
    edit = Edit(8, ReFTSpec(rank=3, intervention=intervention), torch.float32)
    assert sum(p.numel() for p in edit.parameters()) == count


def test_number_of_parameters_of_a_7b_model():
    assert sum(p.numel() for p in Edit(4096, ReFTSpec(rank=4), torch.float32).parameters()) == 32_772


@pytest.mark.parametrize("intervention", ["loreft", "noreft", "direft", "nodireft", "lobireft"])
def test_identity_start(intervention):
    spec = ReFTSpec(rank=3, intervention=intervention, init="identity")
    edit = Edit(8, spec, torch.float32)
    h = torch.randn(5, 8)
    torch.testing.assert_close(h + edit(h), h, atol=1e-6, rtol=0)


def test_basis_stays_orthonormal_in_training():
    edit = Edit(8, ReFTSpec(rank=3), torch.float32)
    before, optimizer = edit.R.detach(), torch.optim.SGD(edit.parameters(), lr=0.3)
    target = torch.randn(20, 8)
    for _ in range(5):
        optimizer.zero_grad()
        (target + edit(target)).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(edit.R.T @ edit.R, torch.eye(3), atol=1e-5, rtol=0)
    assert (edit.R - before).abs().max() > 0.01


@pytest.mark.parametrize("intervention", FAMILY)
def test_gradients(intervention):
    edit = Edit(6, ReFTSpec(rank=2, intervention=intervention), torch.float64)
    names, values = zip(*edit.named_parameters(), strict=True)
    h = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)

    def call(h, *values):
        return torch.func.functional_call(edit, dict(zip(names, values, strict=True)), (h,))

    assert torch.autograd.gradcheck(call, (h, *values))


def test_dropout_acts_on_the_edited_state():
    h = torch.randn(1000, 8)
    edit = Edit(8, ReFTSpec(rank=3, dropout=0.5), torch.float32)
    change = edit(h)
    assert (h + change == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    assert not (change == 0).any()
    edit.eval()
    assert not (edit(h) == 0).any()


# Positions ------------------------------------------------------------------------------------------------


def positions(start: int, length: int, time: int = 10, **counts: int) -> dict[str, list[int]]:
    slots = prompt_slots(torch.tensor([start]), torch.tensor([length]), counts, time)
    return {key: sorted(index[used].tolist()) for key, (index, used) in slots.items()}


def test_first_and_last_tokens_count_from_the_prompt():
    assert positions(0, 10, f=2, l=3) == {"f": [0, 1], "l": [7, 8, 9]}
    assert positions(4, 6, f=2, l=3) == {"f": [4, 5], "l": [7, 8, 9]}
    assert positions(0, 6, f=2, l=3) == {"f": [0, 1], "l": [3, 4, 5]}
    assert positions(2, 5, l=1) == {"l": [6]}


@pytest.mark.parametrize("length", range(12))
def test_short_prompts_share_their_tokens_without_overlap(length):
    found = positions(0, length, time=12, f=4, l=4)
    assert not set(found["f"]) & set(found["l"])
    assert len(found["f"]) == min(4, length // 2)
    assert len(found["l"]) == min(4, (length + 1) // 2)
    assert all(0 <= place < length for place in found["f"] + found["l"])


@pytest.mark.parametrize("name", ["bert", "llama", "gpt2"])
def test_other_tokens_stay_bitwise(name, make_model):
    model = make_model(name)
    adapters = inject(model, ReFTSpec(rank=2, positions="f1+l2"))
    ids = torch.randint(5, 100, (2, 7))
    right = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])
    expected = [(0, 0), (0, 5), (0, 6), (1, 0), (1, 2), (1, 3)]
    assert changed_positions(model, adapters, input_ids=ids, attention_mask=right) == expected
    expected = [(0, 0), (0, 5), (0, 6), (1, 3), (1, 5), (1, 6)]
    assert changed_positions(model, adapters, input_ids=ids, attention_mask=right.flip(1)) == expected
    assert len(changed_positions(model, adapters, input_ids=ids)) == 6
    assert len(changed_positions(model, adapters, inputs_embeds=torch.randn(2, 7, 32))) == 6


def test_prompt_lengths_end_the_prompt_and_never_reach_the_model(make_model):
    model = make_model("llama")
    adapters = inject(model, ReFTSpec(rank=2))
    ids, mask = torch.randint(5, 100, (2, 6)), torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    found = changed_positions(
        model, adapters, input_ids=ids, attention_mask=mask, prompt_lengths=torch.tensor([4, 2])
    )
    assert found == [(0, 0), (0, 3), (1, 2), (1, 3)]


def test_prompt_lengths_are_welcome_where_they_do_not_matter(make_model):
    model = make_model("llama")
    inject(model, ReFTSpec(rank=2, positions="all"))
    model(input_ids=torch.randint(5, 100, (2, 6)), prompt_lengths=torch.tensor([4, 2]))


def test_arguments_may_be_given_by_position(make_model):
    model = make_model("bert")
    inject(model, ReFTSpec(rank=2))
    ids, mask = torch.randint(5, 100, (2, 6)), torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    assert torch.equal(model(ids, mask).logits, model(input_ids=ids, attention_mask=mask).logits)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@torch.no_grad()
def test_left_and_right_padding_agree(name, make_model):
    model = make_model(name)
    inject(model, ReFTSpec(rank=2, positions="f2+l2"))
    ids, pad = torch.randint(5, 100, (1, 5)), torch.zeros(1, 3, dtype=torch.long)
    real, none = torch.ones_like(ids), torch.zeros_like(pad)
    whole = model(ids).logits
    right = model(torch.cat([ids, pad], 1), attention_mask=torch.cat([real, none], 1)).logits[:, :5]
    order = torch.cat([none, torch.arange(5)[None]], 1)
    mask = torch.cat([none, real], 1)
    left = model(torch.cat([pad, ids], 1), attention_mask=mask, position_ids=order).logits[:, 3:]
    torch.testing.assert_close(right, whole, **ROUNDING)
    torch.testing.assert_close(left, whole, **ROUNDING)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("places", ["f2+l2", "all"])
@torch.no_grad()
def test_generation_with_a_cache_equals_the_full_forward(name, places, make_model):
    """The prompt is edited once, at prefill; teacher forcing with its length gives the same tokens."""
    model = make_model(name)
    adapters = inject(model, ReFTSpec(rank=2, positions=places))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    ids = torch.tensor([[7, 8, 9, 10, 11, 12], [0, 0, 20, 21, 22, 23]])
    mask = (ids != 0).long()
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    written = model.generate(
        input_ids=ids, attention_mask=mask, output_logits=True, return_dict_in_generate=True, **options
    )
    full_mask = torch.cat([mask, torch.ones(2, 5, dtype=torch.long)], 1)
    order = (full_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=written.sequences, attention_mask=full_mask, position_ids=order, prompt_lengths=mask.sum(1)
    ).logits
    torch.testing.assert_close(torch.stack(written.logits, 1), logits[:, 5:-1], **ROUNDING)


@torch.no_grad()
def test_a_static_cache_without_padding_writes_the_same_text(make_model):
    model = make_model("llama")
    adapters = inject(model, ReFTSpec(rank=2, positions="f1+l2"))
    for parameter in adapters.trainable_parameters():
        parameter += 0.3 * torch.randn_like(parameter)
    ids, options = torch.randint(5, 100, (2, 6)), {"max_new_tokens": 5, "do_sample": False}
    written = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), written)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_cache": False}, "use_cache: False"),
        ({"prefill_chunk_size": 3}, "3 tokens at once follow 3 in a cache"),
        ({"cache_implementation": "static"}, "with a dynamic cache"),
    ],
)
def test_generation_that_hides_the_prompt_is_refused(options, message, make_model):
    model = make_model("llama")
    inject(model, ReFTSpec(rank=2))
    ids = torch.tensor([[7, 8, 9, 10, 11, 12], [0, 0, 20, 21, 22, 23]])
    with pytest.raises(IncompatibleError, match=message):
        model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=3, **options)


def test_a_cache_counts_whatever_its_name(make_model):
    class Held:
        def get_seq_length(self):
            return torch.tensor(4)

    assert cached_tokens({"input_ids": torch.zeros(1, 1), "use_cache": True, "new_name": Held()}) == 4
    assert cached_tokens({"cache": None, "attention_mask": {}}) == 0
    with pytest.raises(IncompatibleError, match="states, a tuple that does not say"):
        cached_tokens({"states": (torch.zeros(1),)})


def test_one_edit_each_or_one_for_both(make_model):
    apart = inject(make_model("llama"), ReFTSpec(rank=2, positions="f1+l1", layers=[1]))
    shared = inject(make_model("llama"), ReFTSpec(rank=2, positions="f1+l1", layers=[1], share_weights=True))
    assert apart.trainable_count() == 2 * shared.trainable_count() == 2 * (2 * 2 * 32 + 2)
    only = inject(make_model("llama"), ReFTSpec(rank=2, positions="l3", layers=[1]))
    assert only.trainable_count() == shared.trainable_count()


def test_encoder_decoders_take_all_positions_alone(make_model, make_batch):
    model = make_model("t5")
    with pytest.raises(IncompatibleError, match="Use positions: all"):
        inject(model, ReFTSpec(rank=2))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not model._forward_pre_hooks
    adapters = inject(model, ReFTSpec(rank=2, positions="all"))
    assert len(adapters) == 4
    model(**make_batch("t5"))


def test_a_call_past_the_model_is_refused(make_model):
    model = make_model("bert")
    inject(model, ReFTSpec(rank=2))
    ids = torch.randint(5, 100, (2, 6))
    with pytest.raises(IncompatibleError, match="Call the whole model"):
        model.bert(ids)
    model(ids)
    with pytest.raises(IncompatibleError, match="Call the whole model"):
        model.bert(ids[:, :4])


def test_masks_of_other_shapes_are_refused(make_model):
    model = make_model("bert")
    inject(model, ReFTSpec(rank=2))
    with pytest.raises(IncompatibleError, match="attention_mask"):
        model(torch.randint(5, 100, (2, 6)), attention_mask=torch.ones(2, 1, 6, 6))


def test_blocks_that_change_the_width_are_refused():
    model = nn.Sequential(nn.Sequential(nn.Linear(6, 4), nn.Tanh()))
    inject(model, ReFTSpec(rank=2, targets="regex:0", positions="all"))
    with pytest.raises(IncompatibleError, match="reads width 6 and returns 4"):
        model(torch.randn(2, 3, 6))


# Life with a model ----------------------------------------------------------------------------------------


def test_copies_find_their_own_positions(make_model):
    """A copy's adapters must follow the copy's inputs, not those of the model it was made from."""
    model = make_model("bert")
    inject(model, ReFTSpec(rank=2))
    short, long = torch.randint(5, 100, (2, 4)), torch.randint(5, 100, (3, 7))
    model(short)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(long).logits, model(long).logits)
        twin(long)
        expected = model(short).logits
        twin(long)
        assert torch.equal(twin(short).logits, expected)


def test_removing_takes_the_hook_along(make_model, make_batch):
    model = make_model("bert")
    adapters = inject(model, ReFTSpec(rank=2))
    assert len(model._forward_pre_hooks) == 1
    twin, twin_adapters = copy.deepcopy((model, adapters))
    adapters.remove()
    assert not model._forward_pre_hooks
    assert len(twin._forward_pre_hooks) == 1
    twin_adapters.remove()
    assert not twin._forward_pre_hooks


class Checkpointed(nn.Module):
    """Recomputes its blocks, adapters included, in the backward pass."""

    def __init__(self, recompute: bool):
        super().__init__()
        self.recompute = recompute
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute else block(x)
        return x


def test_recomputed_edits_have_the_positions_of_their_forward():
    x, mask = torch.randn(2, 5, 6), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    gradients = []
    for recompute in (False, True):
        model = Checkpointed(recompute)
        adapters = inject(model, ReFTSpec(rank=2, targets=r"regex:blocks\.[01]"))
        model(x, attention_mask=mask).square().sum().backward()
        gradients.append([p.grad for p in adapters.trainable_parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable:FutureWarning")
def test_two_forwards_before_one_backward(make_model):
    """transformers checkpoints the block alone, so that the edit is not recomputed with later positions."""
    first, second = torch.randint(5, 100, (2, 4)), torch.randint(5, 100, (3, 7))
    gradients = []
    for recompute in (False, True):
        model = make_model("llama").train()
        adapters = inject(model, ReFTSpec(rank=2))
        if recompute:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        loss = model(first).logits.square().mean() + model(second).logits.square().mean()
        loss.backward()
        gradients.append([p.grad for p in adapters.trainable_parameters()])
    for found, expected in zip(*gradients, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("intervention", FAMILY)
def test_folder_holds_the_basis_itself(intervention, make_model, make_batch, tmp_path):
    model, batch = make_model("bert"), make_batch("bert")
    adapters = inject(model, ReFTSpec(rank=2, intervention=intervention))
    with torch.no_grad():
        for parameter in adapters.trainable_parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    stored = next(iter(adapters)).peft_tensors()
    torch.testing.assert_close(stored["reft_f.R"], next(iter(adapters)).edits["f"].R)
    save_adapter(adapters, tmp_path / "adapter")
    again = make_model("bert")
    loaded = load_adapter(again, tmp_path / "adapter")
    torch.testing.assert_close(again(**batch).logits, model(**batch).logits, atol=1e-6, rtol=1e-5)
    for name, tensor in next(iter(loaded)).peft_tensors().items():
        torch.testing.assert_close(tensor, stored[name], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"rank": 0}, "adapter.rank: must be at least 1"),
        ({"positions": "first"}, "adapter.positions: must be 'all', or like"),
        ({"positions": "f0"}, "adapter.positions"),
        ({"positions": "f1l1"}, "adapter.positions"),
        ({"positions": "f1+f2"}, "adapter.positions"),
        ({"positions": "+l1"}, "adapter.positions"),
        ({"positions": ""}, "adapter.positions"),
        ({"init": "identity", "intervention": "consreft"}, "adapter.init: consreft"),
        ({"init": "identity", "act_fn": "relu"}, "adapter.init: loreft with an act_fn"),
        ({"act_fn": "relu", "intervention": "lobireft"}, "adapter.act_fn: lobireft"),
        ({"dropout": 1.0}, "adapter.dropout"),
    ],
)
def test_faulty_specs_are_refused(options, fault, make_model):
    with pytest.raises(ConfigError, match=fault):
        inject(make_model("bert"), ReFTSpec(**options))


def test_rank_above_the_width_is_refused(make_model):
    with pytest.raises(IncompatibleError, match="a linear map of 33 inputs or more"):
        inject(make_model("bert"), ReFTSpec(rank=33))
