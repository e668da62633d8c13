# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.where.hft import HFT as HFT
from remanence.where.kore import KORE as KORE
from remanence.where.lora import LoRA as LoRA
from remanence.where.loramoe import LoRAMoE as LoRAMoE
from remanence.where.mora_cl import MoRA as MoRA
from remanence.where.saliency import Saliency as Saliency
