"""METHODS: every adapter method, one file each. This is the one place where a method is added."""

from lora_lab.adapters.base import Adapter
from lora_lab.adapters.methods.adalora import AdaLoRA as AdaLoRA, AdaLoRASpec as AdaLoRASpec
from lora_lab.adapters.methods.antipasto import AntiPaSTO as AntiPaSTO, AntiPaSTOSpec as AntiPaSTOSpec
from lora_lab.adapters.methods.bitfit import BitFit as BitFit, BitFitSpec as BitFitSpec
from lora_lab.adapters.methods.boft import BOFT as BOFT, BOFTSpec as BOFTSpec
from lora_lab.adapters.methods.clover import CLOVER as CLOVER, CLOVERSpec as CLOVERSpec
from lora_lab.adapters.methods.delora import DeLoRA as DeLoRA, DeLoRASpec as DeLoRASpec
from lora_lab.adapters.methods.dora import DoRA as DoRA, DoRASpec as DoRASpec
from lora_lab.adapters.methods.dylora import DyLoRA as DyLoRA, DyLoRASpec as DyLoRASpec
from lora_lab.adapters.methods.edora import EDoRA as EDoRA, EDoRASpec as EDoRASpec
from lora_lab.adapters.methods.fourierft import FourierFT as FourierFT, FourierFTSpec as FourierFTSpec
from lora_lab.adapters.methods.full import Full as Full, FullSpec as FullSpec
from lora_lab.adapters.methods.goft import GOFT as GOFT, GOFTSpec as GOFTSpec
from lora_lab.adapters.methods.head import Head as Head, HeadSpec as HeadSpec
from lora_lab.adapters.methods.hra import HRA as HRA, HRASpec as HRASpec
from lora_lab.adapters.methods.ia3 import IA3 as IA3, IA3Spec as IA3Spec
from lora_lab.adapters.methods.loha import LoHa as LoHa, LoHaSpec as LoHaSpec
from lora_lab.adapters.methods.lokr import LoKr as LoKr, LoKrSpec as LoKrSpec
from lora_lab.adapters.methods.lora import LoRA as LoRA, LoRASpec as LoRASpec
from lora_lab.adapters.methods.lora_drop import LoRADrop as LoRADrop, LoRADropSpec as LoRADropSpec
from lora_lab.adapters.methods.lora_prune import LoRAPrune as LoRAPrune, LoRAPruneSpec as LoRAPruneSpec
from lora_lab.adapters.methods.oft import OFT as OFT, OFTSpec as OFTSpec
from lora_lab.adapters.methods.pissa import PiSSA as PiSSA, PiSSASpec as PiSSASpec
from lora_lab.adapters.methods.psoft import PSOFT as PSOFT, PSOFTSpec as PSOFTSpec
from lora_lab.adapters.methods.randlora import RandLoRA as RandLoRA, RandLoRASpec as RandLoRASpec
from lora_lab.adapters.methods.reft import ReFT as ReFT, ReFTSpec as ReFTSpec
from lora_lab.adapters.methods.road import RoAd as RoAd, RoAdSpec as RoAdSpec
from lora_lab.adapters.methods.salt import SALT as SALT, SALTSpec as SALTSpec
from lora_lab.adapters.methods.salt_edora import SaltEDoRA as SaltEDoRA, SaltEDoRASpec as SaltEDoRASpec
from lora_lab.adapters.methods.ssvd import SSVD as SSVD, SSVDSpec as SSVDSpec
from lora_lab.adapters.methods.svft import SVFT as SVFT, SVFTSpec as SVFTSpec
from lora_lab.adapters.methods.vera import VeRA as VeRA, VeRASpec as VeRASpec
from lora_lab.registry import Registry

METHODS = Registry[Adapter](
    "method",
    Adapter,
    needs=("Spec", "family", "paper", "peft"),
    id_of=lambda method: method.Spec().method,
    own=(
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
    ),
)
"""Every method by its id, also those of other packages, see `Registry`. A new method here is one file, one
entry here and one YAML in configs/adapters."""
