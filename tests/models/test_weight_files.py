"""Files of weights written tensor by tensor: what safetensors reads from them."""

import json

import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lora_lab.linalg.lazy import LazyTensor
from lora_lab.models.weight_files import write_weights

UNTIDY = {
    "odd": torch.arange(7, dtype=torch.int8),
    "half": torch.randn(3, 5).bfloat16(),
    "yes": torch.tensor([True, False, True]),
    "transposed": torch.randn(4, 6).T,
    'ä "quoted"': torch.randn(11)[3:8],
    "number": torch.tensor(3, dtype=torch.int64),
    "nothing": torch.empty(0, 5),
    "eight": torch.randn(2, 3).to(torch.float8_e4m3fn),
    "parameter": torch.nn.Parameter(torch.randn(2, 2, dtype=torch.float64)),
}


def test_safetensors_reads_what_is_written(tmp_path):
    path = tmp_path / "model.safetensors"
    lazy = LazyTensor.of(lambda: UNTIDY["half"].float(), (3, 5), torch.float32)
    write_weights(path, UNTIDY | {"lazy": lazy, "sum": lazy.T + 1}, [])
    expected = UNTIDY | {"lazy": UNTIDY["half"].float(), "sum": UNTIDY["half"].float().T + 1}
    found = load_file(path)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert tensor.dtype == expected[name].dtype
        assert torch.equal(tensor.double(), expected[name].double()), name
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    written = path.read_bytes()
    length = int.from_bytes(written[:8], "little")
    header = json.loads(written[8 : 8 + length])
    assert length % 8 == 0  # readers map the numbers, which have to start at a multiple of their size
    assert all(header[name]["data_offsets"][0] % tensor.itemsize == 0 for name, tensor in expected.items())
