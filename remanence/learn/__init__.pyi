# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.learn.finetune import Finetune as Finetune
from remanence.learn.joint import Joint as Joint
from remanence.learn.nmc import NMC as NMC
