from lora_lab.adapters import Full
from lora_lab.testing import Variant, contract

test_contract = contract(
    Full,
    Variant(trained=24 * 16 + 16, on={"nf4": "codes cannot be trained, which is refused", "int8": {}}),
)
