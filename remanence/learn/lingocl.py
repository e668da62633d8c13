"""A head of fixed class vectors that come from language: new tasks bring rows and do not reshape it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from remanence.core.errors import BadInput
from remanence.core.knobs import knob
from remanence.learn.frozen import check_labels
from remanence.nn.heads import grow_head, head_inputs, target_head, with_target_head
from remanence.nn.semantic import simplex_rows, text_vectors
from remanence.train.roles import Learner, head_rows
from remanence.train.update import Update


@dataclass
class LingoCL(Learner):
    """Finetuning towards fixed class vectors: what a text encoder says to the class's name, in place of a trained head.

        logit_c = scale * z . s_c        z = P h / |P h|        s_c = e(prompt of name_c) / |e(prompt of name_c)|
        with `center`    s_c = (e(prompt of name_c) - e(prompt of no name)) / |e(prompt of name_c) - e(prompt of no name)|

    h is the input of the network's own head, which is replaced; P a linear map, trained and there only where h and s_c differ in width.
    The loss is the problem's, and keepers act as ever: only the head is another. A class's row is made when it first comes, from its
    own name and nothing else, so that no class moves another's row, and lies in the network's buffers: a life goes on, answers and
    is exported without the encoder. Retraining, for a request or to measure one, asks it again, once for each name in a process.

    ``encoder="etf"`` gives directions without meaning, from the label and the life's seed: corners of a simplex as wide as h, and of a
    second one where there are more classes. In a table ``{name or label: vector}`` a class is looked up by name, then by label; what
    else is in it has no say. A column whose class has not come (where the problem fixes its classes) has a random direction.

    Pick it beside a keeper where later classes look like those earlier ones whose names are akin to theirs; alone it forgets like
    `finetune`. Needs: labels, and to be the life's learner from the first event on; for a text encoder names that say something (in
    `Task.names`; most streams write labels there) and transformers (``remanence[llm]``). Forgetters which set or train the head's
    rows alone, such as `newton`, have nothing to move here.
    Measured with a sentence encoder (MiniLM) on small garment pictures: after t-shirts and ankle boots, shirts and sneakers are told
    apart at 0.96 before any example of them, at 0.04 with their names swapped; where likeness of names is not that of pictures (ten
    garments in two tasks, digits) names were as good as the same names shuffled. Digits with replay: 0.85 to 0.89 with "etf", as a
    trained head at its best rate (0.86 to 0.89); at an eighth of that rate the trained one has 0.60 to 0.66.
    Reference: Ni et al. 2024, "Enhancing Visual Continual Learning with Language-Guided Supervision", CVPR, arXiv 2403.16124. A
    reconstruction from its abstract and a description of a re-implementation: its scale, prompt and projection were not seen.
    Deviation: centring takes off what the encoder says to the prompt alone, for the mean of all class vectors would need the names
    of classes to come, or move the answers for those that came.
    """

    encoder: str | dict[str, Any] = knob(
        "etf", "'etf', a text encoder (a folder or a name on the hub), or a table {class name or label: vector}"
    )
    prompt: str = knob("a photo of a {}", "what the encoder is asked, with {} for the name")
    center: bool = knob(False, "take off the encoder's answer to the prompt without a name")
    scale: float = knob(14.3, "of the cosines; 1/0.07, where CLIP's training began", low=1e-3)
    normalise: bool = knob(True, "answer by cosines; off: by dot products with P h")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.encoder or "{}" not in self.prompt:
            raise BadInput(f"{self.slug}: encoder must name something, and prompt hold a {{}} for the name")
        if isinstance(self.encoder, Mapping):
            try:
                table = {str(key): torch.as_tensor(v, dtype=torch.float32) for key, v in self.encoder.items()}
            except (TypeError, ValueError, RuntimeError) as error:
                raise BadInput(f"{self.slug}: the table's vectors must be lists of numbers; {error}") from None
            first = next(iter(table.values()))
            if any(
                v.dim() != 1 or v.shape != first.shape or not v.isfinite().all() or not v.any() for v in table.values()
            ):
                raise BadInput(f"{self.slug}: the table's vectors must be finite, not zero, and of one length")
            self.encoder = {key: vector.tolist() for key, vector in table.items()}

    def structure(self, u: Update) -> dict[str, Any]:
        check_labels(u, self.slug)
        known = target_head(u.model)
        if known is not None:
            lacking = u.columns - head_rows(u.model)
            return {"rows": lacking, "seed": u.seed_of("head")} if lacking > 0 else {}
        if len(u.classes.old):
            raise BadInput(
                f"{self.slug} would replace the head that was trained for earlier classes; begin the life with it"
            )
        width = self._targets(u, u.classes.new, head_inputs(u.model)).shape[1]
        return {"rows": u.columns, "seed": u.seed_of("head"), "width": width}

    def attach(self, model: nn.Module, structure: dict[str, Any]) -> nn.Module:
        seed = int(structure["seed"])
        if "width" in structure:
            model = with_target_head(model, int(structure["width"]), self.scale, self.normalise, seed)
        return grow_head(model, int(structure["rows"]), seed)

    @torch.no_grad()
    def begin(self, u: Update) -> None:
        layer = target_head(u.model)
        assert layer is not None
        if len(u.classes.new):
            rows = self._targets(u, u.classes.new, layer.rows.in_features)
            layer.rows.weight[u.classes.new] = rows.to(layer.rows.weight)

    def _targets(self, u: Update, columns: Tensor, width: int) -> Tensor:
        """Unit rows (n, D) for head columns; D is `width` where directions mean nothing."""
        labels = [u.labels[column] for column in columns.tolist()]
        if self.encoder == "etf":
            return simplex_rows(labels, width, u.seed)
        task = u.task
        names = dict(zip(task.classes, task.names, strict=False)) if task is not None else {}
        if isinstance(self.encoder, Mapping):
            found = [self.encoder.get(names.get(label, ""), self.encoder.get(str(label))) for label in labels]
            for label, vector in zip(labels, found, strict=True):
                if vector is None:
                    raise BadInput(f"{self.slug}: the table has no vector for class {names.get(label, label)!r}")
            return F.normalize(torch.tensor(found), dim=1)
        for label in labels:
            if label not in names:
                raise BadInput(
                    f"{self.slug}: class {label} has no name to ask the encoder for; give the task names=(...), or take encoder='etf'"
                )
        said = text_vectors(self.encoder, [self._asked(names[label]) for label in labels])
        if self.center:
            said = said - text_vectors(self.encoder, [self._asked("")])
        return F.normalize(said, dim=1)

    def _asked(self, name: str) -> str:
        return self.prompt.replace("{}", name)
