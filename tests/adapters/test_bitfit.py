from lora_lab.adapters import BitFit
from lora_lab.testing import Variant, contract

test_contract = contract(
    BitFit,
    Variant(trained=16, on={"llama": "has no biases", "t5": "has no biases", "opt": {}, "llama biased": {}}),
)
