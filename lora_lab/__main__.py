"""`python -m lora_lab` is the command `lora-lab`."""

import sys

from lora_lab.cli import main

sys.exit(main())
