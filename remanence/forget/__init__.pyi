# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.forget.catastrophic import Catastrophic as Catastrophic
from remanence.forget.gradient_ascent import GradientAscent as GradientAscent
from remanence.forget.random_label import RandomLabel as RandomLabel
from remanence.forget.retrain import Retrain as Retrain
from remanence.forget.salun import SalUn as SalUn
from remanence.forget.ssd import SSD as SSD
