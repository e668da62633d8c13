# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.learn.acu import ACU as ACU
from remanence.learn.dkvb import DKVB as DKVB
from remanence.learn.fetril import FeTrIL as FeTrIL
from remanence.learn.finetune import Finetune as Finetune
from remanence.learn.hpcr import HPCR as HPCR
from remanence.learn.joint import Joint as Joint
from remanence.learn.lingocl import LingoCL as LingoCL
from remanence.learn.mvp_siblurry import MVP as MVP
from remanence.learn.napa_vq import NAPAVQ as NAPAVQ
from remanence.learn.nmc import NMC as NMC
from remanence.learn.onpro import OnPro as OnPro
from remanence.learn.prd import PRD as PRD
from remanence.learn.protocl import ProtoCL as ProtoCL
from remanence.learn.s3t import S3T as S3T
from remanence.learn.sharp import SHARP as SHARP
from remanence.learn.sisa import SISA as SISA
from remanence.learn.uer import UER as UER
