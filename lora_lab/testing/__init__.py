"""Tests for authors of methods, to run on their class.

    from lora_lab.testing import Variant, contract
    from my_package import Volume

    test_contract = contract(Volume, Variant("", {"rank": 4}, trained=160), Variant("loud", {"gain": 2.0}))

pytest then runs one case for each check: identity at the start, merging, removal, training, copies, half
precision, compilation, saving and loading, and more, on tiny models of several architectures. `checks`
returns the same checks for use without pytest.
"""

from lora_lab.testing.methods import Case, Check, Variant, checks, contract
from lora_lab.testing.models import tiny_batch, tiny_model

__all__ = ["Case", "Check", "Variant", "checks", "contract", "tiny_batch", "tiny_model"]
