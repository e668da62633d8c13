# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.keep.ewc import EWC as EWC
from remanence.keep.feature_distill import FeatureDistill as FeatureDistill
from remanence.keep.fpf import FPF as FPF
from remanence.keep.gpm import GPM as GPM
from remanence.keep.l2 import L2 as L2
from remanence.keep.lwf import LwF as LwF
from remanence.keep.refresh_learning import RefreshLearning as RefreshLearning
from remanence.keep.replay import Replay as Replay
from remanence.keep.view_batch import ViewBatch as ViewBatch
