"""Tests for authors of methods, run on their own class.

    from lora_lab.testing import Variant, contract
    from my_package import Volume

    test_contract = contract(Volume, Variant("", {"rank": 4}, trained=160), Variant("loud", {"gain": 2.0}))

pytest then runs one case for each check: starts as the identity, merges, is removed, trains alone, copies,
half precision, compiles, comes back from its folder, and more, on tiny models of several architectures.
`checks` gives the same checks to those who do without pytest.
"""

from lora_lab.testing.methods import Case, Check, Variant, checks, contract
from lora_lab.testing.models import tiny_batch, tiny_model

__all__ = ["Case", "Check", "Variant", "checks", "contract", "tiny_batch", "tiny_model"]
