# Written by tools/stubs.py from the catalogue; do not edit.
from remanence.measure.benchmarks.cfsl_instance import CFSL as CFSL
from remanence.measure.benchmarks.nevis import Nevis as Nevis
from remanence.measure.benchmarks.open_problems_unlearning import OpenProblems as OpenProblems
from remanence.measure.benchmarks.worst_case_forget import WorstCaseForget as WorstCaseForget
from remanence.measure.metrics.accuracy import Accuracy as Accuracy
from remanence.measure.metrics.bytes import Bytes as Bytes
from remanence.measure.metrics.corrective_unlearning import CorrectiveUnlearning as CorrectiveUnlearning
from remanence.measure.metrics.flops import Flops as Flops
from remanence.measure.metrics.forgetting import Forgetting as Forgetting
from remanence.measure.metrics.llm_cl_survey import LLMSurvey as LLMSurvey
from remanence.measure.metrics.loss import Loss as Loss
from remanence.measure.metrics.membership import Membership as Membership
from remanence.measure.metrics.probe_forgetting import ProbeForgetting as ProbeForgetting
from remanence.measure.metrics.stability_gap import StabilityGap as StabilityGap
from remanence.measure.metrics.transfer import Transfer as Transfer
