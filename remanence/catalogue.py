"""Every part, one line each. Imports nothing heavy; third parties add lines by the entry point group ``remanence.parts``."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

from remanence.core.errors import BadInput, UnknownName, nearest
from remanence.core.part import KINDS, Part

_SLUG = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")

VERBS = ("learn", "keep", "forget", "where", "recall", "budget", "measure")

PARTS: tuple[Part, ...] = (
    # learn
    Part("finetune", "learn", "method", "baseline", "remanence.learn.finetune:Finetune", ("rehearsal-free-l2",), "A Closer Look at Rehearsal-Free Continual Learning, 2023, arXiv 2203.17269", ("labels",)),
    Part("joint", "learn", "method", "baseline", "remanence.learn.joint:Joint", (), "the upper bound of every continual-learning study", ("labels", "old-data")),
    Part("nmc", "learn", "method", "prototype", "remanence.learn.nmc:NMC", ("nmc-pretrained",), "A Simple Baseline that Questions the Use of Pretrained-Models in Continual Learning, 2022, arXiv 2210.04428", ("labels", "frozen-backbone", "one-answer")),
    Part("acu", "learn", "method", "analytic", "remanence.learn.acu:ACU", ("acu",), "ACU: Analytic Continual Unlearning for Efficient and Exact Forgetting with Privacy Preservation, 2025, arXiv 2505.12239", ("labels", "class-head", "frozen-backbone")),
    Part("sisa", "learn", "method", "sharded", "remanence.learn.sisa:SISA", ("s3t",), "Machine Unlearning, 2021, arXiv 1912.03817", ("labels", "class-head")),
    Part("s3t", "learn", "method", "sharded", "remanence.learn.s3t:S3T", ("s3t",), "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning, 2025, arXiv 2406.16257", ("labels", "class-head", "frozen-backbone")),
    Part("prd", "learn", "method", "prototype", "remanence.learn.prd:PRD", ("prd",), "Prototype-Sample Relation Distillation: Towards Replay-Free Continual Learning, 2023, arXiv 2303.14771", ("labels", "borders", "class-head")),
    Part("uer", "learn", "method", "replay", "remanence.learn.uer:UER", ("uer",), "UER: A Heuristic Bias Addressing Approach for Online Continual Learning, 2023, arXiv 2309.04081", ("labels", "class-head")),
    Part("hpcr", "learn", "method", "contrastive-replay", "remanence.learn.hpcr:HPCR", ("hpcr",), "HPCR: Holistic Proxy-based Contrastive Replay for Online Continual Learning, 2025, arXiv 2309.15038", ("labels", "class-head", "stores-examples")),
    Part("onpro", "learn", "method", "contrastive-replay", "remanence.learn.onpro:OnPro", ("onpro",), "Online Prototype Learning for Online Continual Learning, 2023, arXiv 2308.00301", ("labels", "borders", "class-head", "stores-examples")),
    Part("fetril", "learn", "method", "prototype", "remanence.learn.fetril:FeTrIL", ("fetril",), "FeTrIL: Feature Translation for Exemplar-Free Class-Incremental Learning, 2023, arXiv 2211.13131", ("labels", "borders", "class-head")),
    Part("dkvb", "learn", "method", "vector-quantization", "remanence.learn.dkvb:DKVB", ("dkvb",), "Discrete Key-Value Bottleneck, 2023, arXiv 2207.11240", ("labels", "class-head", "frozen-backbone")),
    Part("protocl", "learn", "method", "bayesian", "remanence.learn.protocl:ProtoCL", ("protocl",), "On Sequential Bayesian Inference for Continual Learning, 2023, arXiv 2301.01828", ("labels", "class-head", "stores-examples")),
    Part("napa-vq", "learn", "method", "prototype", "remanence.learn.napa_vq:NAPAVQ", ("napa-vq",), "NAPA-VQ: Neighborhood Aware Prototype Augmentation with Vector Quantization for Continual Learning, ICCV 2023", ("labels", "borders", "class-head")),
    Part("sharp", "learn", "method", "sparse-architecture", "remanence.learn.sharp:SHARP", ("sharp",), "SHARP: Sparsity and Hidden Activation RePlay for Neuro-Inspired Continual Learning, 2023, arXiv 2305.18563", ("labels", "borders", "class-head", "stores-examples")),
    Part("lingocl", "learn", "method", "semantic-targets", "remanence.learn.lingocl:LingoCL", ("lingocl",), "Enhancing Visual Continual Learning with Language-Guided Supervision, 2024, arXiv 2403.16124", ("labels", "class-head")),
    Part("mvp-siblurry", "learn", "method", "prompt", "remanence.learn.mvp_siblurry:MVP", ("mvp-siblurry",), "Online Class Incremental Learning on Stochastic Blurry Task Boundary via Mask and Visual Prompt Tuning, 2023, arXiv 2308.09303", ("labels", "class-head", "frozen-backbone")),
    Part("lt-sft", "learn", "method", "sparse-delta", "remanence.learn.lt_sft:LTSFT", ("lt-sft",), "Composable Sparse Fine-Tuning for Cross-Lingual Transfer, 2022, arXiv 2110.07560", ()),
    Part("cpt-rewarm-replay", "learn", "method", "schedule", "remanence.learn.cpt_rewarm_replay:RewarmReplay", ("cpt-rewarm-replay",), "Simple and Scalable Strategies to Continually Pre-train Large Language Models, 2024, arXiv 2403.08763", ("old-data",)),
    Part("dmt", "learn", "method", "data-recipe", "remanence.learn.dmt:DMT", ("dmt",), "How Abilities in Large Language Models are Affected by Supervised Fine-tuning Data Composition, 2024, arXiv 2310.05492", ("borders", "old-data")),
    Part("stability-gap-cpt", "learn", "method", "data-recipe", "remanence.learn.stability_gap_cpt:StabilityGapCPT", ("stability-gap-cpt",), "Efficient Domain Continual Pretraining by Mitigating the Stability Gap, 2025, arXiv 2406.14833", ("borders", "old-data")),
    Part("infinite-lr", "learn", "schedule", "schedule", "remanence.learn.infinite_lr:InfiniteLR", ("infinite-lr",), "Beyond Cosine Decay: On the effectiveness of Infinite Learning Rate Schedule for Continual Pre-training, 2025, arXiv 2503.02844", ()),
    # keep
    Part("replay", "keep", "method", "replay", "remanence.keep.replay:Replay", (), "On Tiny Episodic Memories in Continual Learning, 2019, arXiv 1902.10486", ("labels", "stores-examples")),
    Part("ewc", "keep", "method", "regularisation", "remanence.keep.ewc:EWC", ("rehearsal-free-l2",), "Overcoming catastrophic forgetting in neural networks, 2017, arXiv 1612.00796; Progress & Compress, 2018, arXiv 1805.06370", ("labels", "borders")),
    Part("l2", "keep", "method", "regularisation", "remanence.keep.l2:L2", ("rehearsal-free-l2",), "A Closer Look at Rehearsal-Free Continual Learning, 2023, arXiv 2203.17269", ("borders",)),
    Part("lwf", "keep", "method", "distillation", "remanence.keep.lwf:LwF", ("rehearsal-free-l2",), "Learning without Forgetting, 2016, arXiv 1606.09282; A Closer Look at Rehearsal-Free Continual Learning, 2023, arXiv 2203.17269", ("borders", "class-head")),
    Part("feature-distill", "keep", "method", "distillation", "remanence.keep.feature_distill:FeatureDistill", ("rehearsal-free-l2",), "A Closer Look at Rehearsal-Free Continual Learning, 2023, arXiv 2203.17269", ("borders",)),
    Part("refresh-learning", "keep", "method", "schedule", "remanence.keep.refresh_learning:RefreshLearning", ("refresh-learning",), "A Unified and General Framework for Continual Learning, 2024, arXiv 2403.13249", ("labels",)),
    Part("fpf", "keep", "method", "schedule", "remanence.keep.fpf:FPF", ("fpf",), "Does Continual Learning Equally Forget All Parameters?, 2023, arXiv 2304.04158", ("labels", "stores-examples", "one-answer")),
    Part("gpm", "keep", "method", "projection", "remanence.keep.gpm:GPM", (), "Gradient Projection Memory for Continual Learning, 2021, arXiv 2103.09762", ("borders", "one-answer")),
    Part("view-batch", "keep", "method", "schedule", "remanence.keep.view_batch:ViewBatch", ("view-batch",), "Do Your Best and Get Enough Rest for Continual Learning, 2025, arXiv 2503.18371", ("class-head", "borders")),
    Part("gradient-restriction", "keep", "method", "regularisation", "remanence.keep.gradient_restriction:GradientRestriction", ("iau",), "Efficient Machine Unlearning via Influence Approximation, 2025, arXiv 2507.23257", ("labels",)),
    Part("si", "keep", "method", "regularisation", "remanence.keep.si:SI", (), "Continual Learning Through Synaptic Intelligence, 2017, arXiv 1703.04200", ("borders",)),
    Part("mas", "keep", "method", "regularisation", "remanence.keep.mas:MAS", ("cl-thesis-mas-gss",), "Memory Aware Synapses, 2018, arXiv 1711.09601", ("borders",)),
    Part("task-free-mas", "keep", "method", "regularisation", "remanence.keep.task_free_mas:TaskFreeMAS", ("cl-thesis-mas-gss",), "Task-Free Continual Learning, 2019, arXiv 1812.03596", ("stores-examples",)),
    Part("der", "keep", "method", "replay", "remanence.keep.der:DER", (), "Dark Experience for General Continual Learning, 2020, arXiv 2004.07211", ("stores-examples", "one-answer")),
    Part("agem", "keep", "method", "projection", "remanence.keep.agem:AGEM", (), "Efficient Lifelong Learning with A-GEM, 2019, arXiv 1812.00420", ("borders", "stores-examples")),
    Part("gss", "keep", "method", "replay", "remanence.keep.gss:GSS", ("cl-thesis-mas-gss",), "Gradient based sample selection for online continual learning, 2019, arXiv 1903.08671", ("stores-examples",)),
    Part("power-law-rehearsal", "keep", "method", "replay", "remanence.keep.power_law_rehearsal:PowerLawRehearsal", ("power-law-rehearsal",), "Natural Mitigation of Catastrophic Interference, 2024, arXiv 2401.10393", ("borders", "old-data")),
    Part("cuber", "keep", "method", "projection", "remanence.keep.cuber:CUBER", ("cuber",), "Beyond Not-Forgetting: Continual Learning with Backward Knowledge Transfer, 2022, arXiv 2211.00789", ("borders", "one-answer")),
    Part("hlop", "keep", "method", "projection", "remanence.keep.hlop:HLOP", ("hlop",), "Hebbian Learning based Orthogonal Projection for Continual Learning of Spiking Neural Networks, 2024, arXiv 2402.11984", ("borders", "one-answer")),
    Part("gere", "keep", "method", "replay", "remanence.keep.gere:GeRe", ("gere",), "GeRe: Towards Efficient Anti-Forgetting in Continual Learning of LLM via General Samples Replay, 2025, arXiv 2508.04676", ("stores-examples", "old-data")),
    Part("migu", "keep", "method", "gradient-masking", "remanence.keep.migu:MIGU", ("migu",), "Unlocking Continual Learning Abilities in Language Models, 2024, arXiv 2406.17245", ("borders",)),
    Part("sefe", "keep", "method", "regularisation", "remanence.keep.sefe:SEFE", ("sefe",), "SEFE: Superficial and Essential Forgetting Eliminator for Multimodal Continual Instruction Tuning, 2025, arXiv 2505.02486", ("borders", "adapters")),
    Part("i-lora", "keep", "method", "replay", "remanence.keep.i_lora:ILoRA", ("i-lora",), "Analyzing and Reducing Catastrophic Forgetting in Parameter Efficient Tuning, 2024, arXiv 2402.18865", ("stores-examples",)),
    Part("lcia", "keep", "method", "weight-averaging", "remanence.keep.lcia:LCIA", ("lcia",), "Large Continual Instruction Assistant, 2025, arXiv 2410.10868", ("borders",)),
    Part("ama", "keep", "method", "weight-averaging", "remanence.keep.ama:AMA", ("ama",), "Mitigating the Alignment Tax of RLHF, 2024, arXiv 2309.06256", ("borders",)),
    Part("lines", "keep", "method", "weight-averaging", "remanence.keep.lines:LiNeS", ("lines",), "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging, 2025, arXiv 2410.17146", ("borders",)),
    # where
    Part("saliency", "where", "method", "mask", "remanence.where.saliency:Saliency", ("salun",), "SalUn, 2024, arXiv 2310.12508", ("labels",)),
    Part("hft", "where", "method", "parameter-isolation", "remanence.where.hft:HFT", ("hft",), "HFT: Half Fine-Tuning for Large Language Models, 2024, arXiv 2404.18466", ()),
    Part("lora", "where", "method", "adapter", "remanence.where.lora:LoRA", (), "LoRA: Low-Rank Adaptation of Large Language Models, 2021, arXiv 2106.09685", ()),
    Part("loramoe", "where", "method", "adapter", "remanence.where.loramoe:LoRAMoE", ("loramoe",), "LoRAMoE: Revolutionizing Mixture of Experts for Maintaining World Knowledge in Language Model Alignment, 2024, arXiv 2312.09979", ()),
    Part("mora-cl", "where", "method", "adapter", "remanence.where.mora_cl:MoRA", ("mora-cl",), "Little By Little: Continual Learning via Self-Activated Sparse Mixture-of-Rank Adaptive Learning, 2025, arXiv 2506.21035", ("borders",)),
    Part("kore", "where", "method", "adapter", "remanence.where.kore:KORE", ("kore",), "KORE: Enhancing Knowledge Injection for Large Multimodal Models via Knowledge-Oriented Augmentations and Constraints, 2026, arXiv 2510.19316", ("borders", "old-data")),
    # forget
    Part("retrain", "forget", "method", "exact", "remanence.forget.retrain:Retrain", (), "the definition of exact unlearning: Machine Unlearning, 2021, arXiv 1912.03817", ("retain-data", "lineage")),
    Part("catastrophic", "forget", "method", "finetuning", "remanence.forget.catastrophic:Catastrophic", (), "Eternal Sunshine of the Spotless Net, 2020, arXiv 1911.04933", ("labels", "retain-data")),
    Part("gradient-ascent", "forget", "method", "gradient", "remanence.forget.gradient_ascent:GradientAscent", (), "Amnesiac Machine Learning, 2021, arXiv 2010.10981; Continual Learning and Private Unlearning, 2022, arXiv 2203.12817", ("labels",)),
    Part("random-label", "forget", "method", "relabelling", "remanence.forget.random_label:RandomLabel", (), "Amnesiac Machine Learning, 2021, arXiv 2010.10981", ("labels", "class-head", "retain-data")),
    Part("ssd", "forget", "method", "weight-saliency", "remanence.forget.ssd:SSD", ("ssd",), "Fast Machine Unlearning Without Retraining Through Selective Synaptic Dampening, 2024, arXiv 2308.07707", ("labels", "old-data")),
    Part("salun", "forget", "method", "weight-saliency", "remanence.forget.salun:SalUn", ("salun",), "SalUn, 2024, arXiv 2310.12508", ("labels", "class-head", "retain-data")),
    Part("sparse-unlearn", "forget", "method", "regularisation", "remanence.forget.sparse_unlearn:SparseUnlearn", ("sparse-unlearn",), "Model Sparsity Can Simplify Machine Unlearning, 2023, arXiv 2304.04934", ("labels", "retain-data")),
    Part("scrub", "forget", "method", "distillation", "remanence.forget.scrub:SCRUB", ("corrective-unlearning",), "Towards Unbounded Machine Unlearning, 2023, arXiv 2302.09880", ("labels", "class-head", "retain-data")),
    Part("bad-teacher", "forget", "method", "distillation", "remanence.forget.bad_teacher:BadTeacher", ("corrective-unlearning",), "Can Bad Teaching Induce Forgetting?, 2023, arXiv 2205.08096", ("class-head", "retain-data")),
    Part("boundary", "forget", "method", "relabelling", "remanence.forget.boundary:Boundary", (), "Boundary Unlearning, 2023, arXiv 2303.11570", ("labels", "class-head")),
    Part("fisher-noise", "forget", "method", "noise", "remanence.forget.fisher_noise:FisherNoise", ("sparse-unlearn",), "Eternal Sunshine of the Spotless Net, 2020, arXiv 1911.04933", ("labels", "retain-data", "one-answer")),
    Part("influence", "forget", "method", "influence", "remanence.forget.influence:Influence", ("sparse-unlearn",), "Understanding Black-box Predictions via Influence Functions, 2017, arXiv 1703.04730; Model Sparsity Can Simplify Machine Unlearning, 2023, arXiv 2304.04934", ("labels", "retain-data")),
    Part("iau", "forget", "method", "influence", "remanence.forget.iau:IAU", ("iau",), "Efficient Machine Unlearning via Influence Approximation, 2025, arXiv 2507.23257", ("labels", "retain-data")),
    Part("newton", "forget", "method", "influence", "remanence.forget.newton:Newton", (), "Certified Data Removal from Machine Learning Models, 2020, arXiv 1911.03030", ("labels", "retain-data", "one-answer")),
    Part("acu", "forget", "method", "analytic", "remanence.forget.acu:ACU", ("acu",), "ACU: Analytic Continual Unlearning for Efficient and Exact Forgetting with Privacy Preservation, 2025, arXiv 2505.12239", ("labels", "class-head", "frozen-backbone")),
    Part("sisa", "forget", "method", "sharded", "remanence.forget.sisa:SISA", ("s3t",), "Machine Unlearning, 2021, arXiv 1912.03817", ("labels", "class-head", "retain-data")),
    Part("s3t", "forget", "method", "sharded", "remanence.forget.s3t:S3T", ("s3t",), "Towards Scalable Exact Machine Unlearning Using Parameter-Efficient Fine-Tuning, 2025, arXiv 2406.16257", ("labels", "class-head", "frozen-backbone")),
    Part("dmm", "forget", "method", "attribution", "remanence.forget.dmm:DMM", ("dmm",), "Attribute-to-Delete: Machine Unlearning via Datamodel Matching, 2025, arXiv 2410.23232", ("labels", "class-head", "retain-data")),
    Part("laf", "forget", "method", "representation", "remanence.forget.laf:LAF", ("laf",), "Label-Agnostic Forgetting: A Supervision-Free Unlearning in Deep Models, 2024, arXiv 2404.00506", ("retain-data", "one-answer")),
    Part("blindspot-regression", "forget", "method", "distillation", "remanence.forget.blindspot_regression:BlindspotRegression", ("blindspot-regression",), "Deep Regression Unlearning, 2023, arXiv 2210.08196", ("labels", "regression", "retain-data")),
    Part("gaussian-amnesiac", "forget", "method", "relabelling", "remanence.forget.gaussian_amnesiac:GaussianAmnesiac", ("blindspot-regression",), "Deep Regression Unlearning, 2023, arXiv 2210.08196", ("labels", "regression", "retain-data")),
    Part("gs-lora", "forget", "method", "adapter", "remanence.forget.gs_lora:GSLoRA", ("gs-lora",), "Practical Continual Forgetting for Pre-trained Vision Models, 2025, arXiv 2501.09705; Continual Forgetting for Pre-trained Vision Models, 2024, arXiv 2403.11530", ("labels", "class-head", "retain-data")),
    Part("concept-poison-unlearn", "forget", "method", "relabelling", "remanence.forget.concept_poison_unlearn:ConceptPoison", ("concept-poison-unlearn",), "Class Machine Unlearning for Complex Data via Concepts Inference and Data Poisoning, 2024, arXiv 2405.15662", ("labels", "class-head", "retain-data")),
    Part("auto", "forget", "method", "search", "remanence.forget.auto:Auto", (), "the cheapest method that is measured to be like retraining", ("labels", "retain-data", "lineage")),
    # measure
    Part("accuracy", "measure", "metric", "utility", "remanence.measure.metrics.accuracy:Accuracy", (), "mean held-out accuracy over the tasks seen", ("labels",)),
    Part("forgetting", "measure", "metric", "utility", "remanence.measure.metrics.forgetting:Forgetting", ("rehearsal-free-l2",), "Riemannian Walk, 2018, arXiv 1801.10112; Gradient Episodic Memory, 2017, arXiv 1706.08840", ("labels",)),
    Part("membership", "measure", "metric", "privacy", "remanence.measure.metrics.membership:Membership", ("salun",), "Systematic Evaluation of Privacy Risks of Machine Learning Models, 2021, arXiv 2003.10595", ("labels",)),
    Part("bytes", "measure", "metric", "cost", "remanence.measure.metrics.bytes:Bytes", (), "bytes of every holder, in one unit", ()),
    Part("stability-gap", "measure", "metric", "worst-case", "remanence.measure.metrics.stability_gap:StabilityGap", ("stability-gap",), "Continual evaluation for lifelong learning: Identifying the stability gap, 2023, arXiv 2205.13452", ("labels",)),
    Part("transfer", "measure", "metric", "utility", "remanence.measure.metrics.transfer:Transfer", (), "Gradient Episodic Memory, 2017, arXiv 1706.08840; Don't forget, there is more than forgetting, 2018, arXiv 1810.13166", ("labels",)),
    Part("probe-forgetting", "measure", "metric", "utility", "remanence.measure.metrics.probe_forgetting:ProbeForgetting", (), "Probing Representation Forgetting in Supervised and Unsupervised Continual Learning, 2022, arXiv 2203.13381", ("labels",)),
    Part("flops", "measure", "metric", "cost", "remanence.measure.metrics.flops:Flops", ("nevis",), "NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer Vision Research, 2023, arXiv 2211.11747", ()),
    Part("loss", "measure", "metric", "utility", "remanence.measure.metrics.loss:Loss", ("llm-cl-survey",), "Simple and Scalable Strategies to Continually Pre-train Large Language Models, 2024, arXiv 2403.08763", ("labels",)),
    Part("llm-cl-survey", "measure", "metric", "utility", "remanence.measure.metrics.llm_cl_survey:LLMSurvey", ("llm-cl-survey",), "Continual Learning of Large Language Models: A Comprehensive Survey, 2025, arXiv 2404.16789", ("labels",)),
    Part("corrective-unlearning", "measure", "metric", "data-integrity", "remanence.measure.metrics.corrective_unlearning:CorrectiveUnlearning", ("corrective-unlearning",), "Corrective Machine Unlearning, 2024, arXiv 2402.14015", ("labels",)),
    Part("worst-case-forget", "measure", "benchmark", "adversarial", "remanence.measure.benchmarks.worst_case_forget:WorstCaseForget", ("worst-case-forget",), "Challenging Forgets: Unveiling the Worst-Case Forget Sets in Machine Unlearning, 2024, arXiv 2403.07362", ("labels",)),
    Part("cfsl-instance", "measure", "benchmark", "few-shot", "remanence.measure.benchmarks.cfsl_instance:CFSL", ("cfsl-instance",), "Expanding continual few-shot learning benchmarks to include recognition of specific instances, 2022, arXiv 2209.07863", ("labels",)),
    Part("nevis", "measure", "benchmark", "compute-aware", "remanence.measure.benchmarks.nevis:Nevis", ("nevis",), "NEVIS'22: A Stream of 100 Tasks Sampled from 30 Years of Computer Vision Research, 2023, arXiv 2211.11747", ("labels",)),
    Part("open-problems-unlearning", "measure", "benchmark", "robustness", "remanence.measure.benchmarks.open_problems_unlearning:OpenProblems", ("open-problems-unlearning",), "Open Problems in Machine Unlearning for AI Safety, 2025, arXiv 2501.04952", ("labels",)),
)  # fmt: skip


@cache
def every() -> tuple[Part, ...]:
    """Our parts and those of installed packages that offer some.

    An entry point of the group ``remanence.parts`` names a `Part` or an iterable of them.

    Raises:
        BadInput: an offered part is malformed or takes a name that is in use.
    """
    from importlib.metadata import entry_points

    found = list(PARTS)
    for entry in entry_points(group="remanence.parts"):
        found += _offered(entry)
    joined(found)
    return tuple(found)


def _offered(entry: Any) -> list[Part]:
    """The parts behind an entry point."""
    try:
        loaded = entry.load()
    except Exception as error:
        raise BadInput(
            f"the entry point {entry.name!r} ({entry.value}) in the group remanence.parts cannot be loaded: {error}; "
            "mend or uninstall the package that offers it"
        ) from error
    offered: list[Any] = (
        [loaded] if isinstance(loaded, Part) else list(loaded) if isinstance(loaded, Iterable) else [None]
    )
    for part in offered:
        if not isinstance(part, Part):
            raise BadInput(
                f"the entry point {entry.name!r} ({entry.value}) must name a Part or a list of them, not {type(loaded).__name__}"
            )
    return offered


def joined(found: Iterable[Part]) -> None:
    """Check every line, and that no two take the same name.

    Raises:
        BadInput: says which line is wrong and what is expected.
    """
    slugs: dict[tuple[str, str], Part] = {}
    names: dict[tuple[str, str], Part] = {}
    for part in found:
        check(part)
        for taken, name, what in ((slugs, part.slug, "slug"), (names, part.name, "class name")):
            other = taken.setdefault((part.verb, name), part)
            if other is not part:
                raise BadInput(f"two parts of {part.verb} have the {what} {name!r}: {other.target} and {part.target}")


def check(part: Part) -> None:
    """Refuse a malformed line.

    Raises:
        BadInput: says which field is wrong and what is expected.
    """
    if not _SLUG.fullmatch(part.slug):
        raise BadInput(f"slug {part.slug!r}: lower-case words joined by single hyphens")
    if part.verb not in VERBS:
        raise BadInput(f"{part.slug}: verb {part.verb!r} is not one of {', '.join(VERBS)}{nearest(part.verb, VERBS)}")
    if part.kind not in KINDS:
        raise BadInput(f"{part.slug}: kind {part.kind!r} is not one of {', '.join(KINDS)}{nearest(part.kind, KINDS)}")
    for field, words in (("family", (part.family,)), ("cards", part.cards), ("needs", part.needs)):
        for word in words:
            if not _SLUG.fullmatch(word):
                raise BadInput(f"{part.slug}: {field} {word!r}: lower-case words joined by single hyphens")
    if not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", part.target):
        raise BadInput(f"{part.slug}: target {part.target!r} must be 'module:Class'")
    if not part.paper.strip():
        raise BadInput(f"{part.slug}: name the paper or say what is measured")


def parts(
    verb: str | None = None,
    kind: str | None = None,
    family: str | None = None,
    without: str | Iterable[str] | None = None,
) -> list[Part]:
    """The parts that match, in the catalogue's order.

    Args:
        without: leave out the parts that need any of these (such as ``old-data``; a word, several with commas, or a list).

    Raises:
        UnknownName: a verb, kind, family or need that no part has.
    """
    words = without.split(",") if isinstance(without, str) else list(without or ())
    barred = {word.strip() for word in words if word.strip()}
    needs = sorted({need for part in every() for need in part.needs})
    for what, given, known in (
        ("verb", {verb} - {None}, VERBS),
        ("kind", {kind} - {None}, KINDS),
        ("family", {family} - {None}, sorted({part.family for part in every()})),
        ("need", barred, needs),
    ):
        for word in sorted(map(str, given)):
            if word not in known:
                raise UnknownName(
                    f"no part has the {what} {word!r}{nearest(word, known)} (there is {', '.join(known)})"
                )
    return [
        part
        for part in every()
        if verb in (None, part.verb)
        and kind in (None, part.kind)
        and family in (None, part.family)
        and not barred & set(part.needs)
    ]


def find(verb: str, slug: str) -> Part:
    """The part `slug` of `verb`.

    Raises:
        UnknownName: there is none; names the nearest, and the verb that does have it.
    """
    mine = {part.slug: part for part in every() if part.verb == verb}
    if slug in mine:
        return mine[slug]
    elsewhere = sorted({part.verb for part in every() if part.slug == slug})
    hint = f"; {slug!r} is a part of {', '.join(elsewhere)}" if elsewhere else nearest(slug, mine)
    raise UnknownName(f"{verb} has no part {slug!r}{hint}")


def named(name: str) -> list[Part]:
    """The parts called `name`: a slug, a class name, or ``verb/slug`` where a slug serves two verbs.

    Raises:
        UnknownName: there is none; names the nearest.
    """
    verb, _, slug = name.rpartition("/")
    if verb:
        return [find(verb, slug)]
    found = [part for part in every() if name in (part.slug, part.name)]
    if not found:
        raise UnknownName(
            f"no part is called {name!r}{nearest(name, [part.slug for part in every()])}; `remanence methods` lists all"
        )
    return found


def slug_of(cls: type) -> str:
    """The slug under which a class is listed; its name in lower case for one that is not (a user's own class in a script)."""
    return _slug(cls.__module__, cls.__name__)


@cache
def _slug(module: str, name: str) -> str:
    for part in every():
        if part.name == name and part.module == module:
            return part.slug
    return name.lower()


def classes(verb: str) -> dict[str, Part]:
    """The parts of a verb by the name of their class."""
    return {part.name: part for part in every() if part.verb == verb}


def surface(verb: str, folders: Iterable[str] = ()) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of a verb's package: its classes and `folders`, each imported when first asked for."""
    package = f"remanence.{verb}"

    def getattr_(name: str) -> Any:
        if name in folders:
            return importlib.import_module(f"{package}.{name}")
        if name.startswith("_"):  # asked by tools that look around: never load the catalogue for them
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        found = classes(verb)
        if name in found:
            return found[name].load()
        raise AttributeError(f"{package} has no {name!r}{nearest(name, found)} (it has {', '.join(sorted(found))})")

    def dir_() -> list[str]:
        return sorted([*classes(verb), *folders])

    return getattr_, dir_


@cache
def _fidelity() -> dict[str, str]:
    path = Path(__file__).with_name("fidelity.json")
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {str(key): str(value) for key, value in found.items()}


def fidelity(part: Part) -> str:
    """What the part was checked against, in a few words; ``unverified`` where ``fidelity.json`` has no row ``verb/slug``."""
    return _fidelity().get(f"{part.verb}/{part.slug}", "unverified")
