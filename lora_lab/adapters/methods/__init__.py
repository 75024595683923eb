"""METHODS: every adapter method, one file each. This is the one place where a method is added."""

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.methods.adalora import AdaLoRA
from lora_lab.adapters.methods.antipasto import AntiPaSTO
from lora_lab.adapters.methods.bitfit import BitFit
from lora_lab.adapters.methods.boft import BOFT
from lora_lab.adapters.methods.clover import CLOVER
from lora_lab.adapters.methods.delora import DeLoRA
from lora_lab.adapters.methods.dora import DoRA
from lora_lab.adapters.methods.dylora import DyLoRA
from lora_lab.adapters.methods.edora import EDoRA
from lora_lab.adapters.methods.fourierft import FourierFT
from lora_lab.adapters.methods.full import Full
from lora_lab.adapters.methods.goft import GOFT
from lora_lab.adapters.methods.head import Head
from lora_lab.adapters.methods.hra import HRA
from lora_lab.adapters.methods.ia3 import IA3
from lora_lab.adapters.methods.loha import LoHa
from lora_lab.adapters.methods.lokr import LoKr
from lora_lab.adapters.methods.lora import LoRA
from lora_lab.adapters.methods.lora_drop import LoRADrop
from lora_lab.adapters.methods.lora_prune import LoRAPrune
from lora_lab.adapters.methods.oft import OFT
from lora_lab.adapters.methods.pissa import PiSSA
from lora_lab.adapters.methods.psoft import PSOFT
from lora_lab.adapters.methods.randlora import RandLoRA
from lora_lab.adapters.methods.reft import ReFT
from lora_lab.adapters.methods.road import RoAd
from lora_lab.adapters.methods.salt import SALT
from lora_lab.adapters.methods.salt_edora import SaltEDoRA
from lora_lab.adapters.methods.ssvd import SSVD
from lora_lab.adapters.methods.svft import SVFT
from lora_lab.adapters.methods.vera import VeRA

METHODS: dict[str, type[Adapter]] = {
    method.Spec().method: method
    for method in (
        LoRA,
        DoRA,
        AdaLoRA,
        DyLoRA,
        LoRADrop,
        LoRAPrune,
        PiSSA,
        LoHa,
        LoKr,
        DeLoRA,
        VeRA,
        RandLoRA,
        SALT,
        EDoRA,
        SaltEDoRA,
        SSVD,
        SVFT,
        FourierFT,
        IA3,
        OFT,
        BOFT,
        GOFT,
        RoAd,
        HRA,
        CLOVER,
        PSOFT,
        AntiPaSTO,
        ReFT,
        BitFit,
        Head,
        Full,
    )
}
"""Every method by its id. A new method is one file, one entry here and one YAML in configs/adapters."""
