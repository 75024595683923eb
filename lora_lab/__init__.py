"""Parameter-efficient fine-tuning as controlled experiments.

    from lora_lab import compose, run

    result = run(compose("experiments/quickstart/experiment.yaml", ["adapter.rank=4"]))

or without the config system, with a LightningModule, data and Trainer of your own:

    from lora_lab import inject
    from lora_lab.adapters import LoRASpec

    adapters = inject(model, LoRASpec(rank=4))

`lora_lab.adapters` has every method's spec, `lora_lab.callbacks` every controller and its spec.
"""

import lazy_loader

# The public names are listed in __init__.pyi, which type checkers read too. Each is imported when it is first
# used, since importing torch and transformers takes seconds.
__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
