# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.where.hft import HFT as HFT
from remanence.where.lora import LoRA as LoRA
from remanence.where.saliency import Saliency as Saliency
