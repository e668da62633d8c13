# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.measure.metrics.accuracy import Accuracy as Accuracy
from remanence.measure.metrics.bytes import Bytes as Bytes
from remanence.measure.metrics.forgetting import Forgetting as Forgetting
from remanence.measure.metrics.membership import Membership as Membership
from remanence.measure.metrics.stability_gap import StabilityGap as StabilityGap
