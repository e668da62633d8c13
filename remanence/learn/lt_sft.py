"""Find the few weights that a task moves most, go back, and train only those."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from remanence.core.ids import Ids
from remanence.core.knobs import knob
from remanence.core.problem import CausalLM
from remanence.nn.anatomy import head_name, norm_modules, tensor_bytes
from remanence.nn.masks import mask_gradients, top_entries
from remanence.nn.sparse_delta import Skills, SparseDelta
from remanence.train.roles import Learner
from remanence.train.update import Update


@dataclass
class LTSFT(Learner):
    """Lottery-ticket sparse fine-tuning: each event is a sparse change of the weights, a skill that can be taken off and put on.

        theta1 = theta0 after `full` epochs on everything        mask = the K entries with the largest |theta1 - theta0|
        theta2 = theta0 after the event's epochs on the mask alone        skill phi = theta2 - theta0,  K = density * number of weights
        both with  l1 / N * sum_j |theta_j - theta0_j|  added to the loss        composition: theta = theta0 + phi_a + phi_b + ...

    Entries outside the mask keep their bits, whatever the optimizer. With `iterations` n this is done n times, from where the time before
    ended, each adding K / n entries to the mask. The head of a classification or regression learns in full, beside the K. An event has
    two phases with an optimizer and a schedule each; keepers act in both. Between them weights and running statistics go back.

    ``start="here"``: a skill is learned on top of the earlier ones, as the paper learns a task on top of its language.
    ``start="base"``: they are taken off first, so that every skill is learned from the same theta0, and put on together after it.
    ``compose(model, skills)`` is the network with the chosen skills only: exact to the bit for none, and for those learned on top of one
    another if the first ones are chosen; elsewhere a sum in the weights' own precision. The heads of skills learned from the same base
    are summed, too. Running statistics are not part of a skill.

    Measured on digits, a skill for turned pictures and a skill for other labels, learned apart from one base: on turned pictures with other
    labels, of which there was none, the two together have an accuracy of 0.52 at density 0.1 and 0.30 at 1. Two skills that both remake
    the first layer (turned, inverted) are lost in their sum at any density.

    Pick it to store or ship what a task changed, to mix skills that were learned apart, or to bound what an event may move; training
    takes two phases. Needs: nothing. After a forget the weights are no longer a base and skills: all are dropped, and what is there
    then is the next skill's base.
    Reference: Ansell et al. 2022, "Composable Sparse Fine-Tuning for Cross-Lingual Transfer", arXiv 2110.07560. Deviations: exactly K
    entries (of equals the first), where the official code may take more; it masks the gradient alone, so that weight decay moves the
    others, and drops changes below 1e-7, which are kept here; normalisations learn unless `norms` is off, as is its default too, though
    the paper's runs freeze them. The released code has its l1 term commented out.
    """

    density: float = knob(0.01, "share of the weights, without a head of its own, that may change", low=0, high=1)
    full: int | None = knob(None, "epochs of the full phase; None: as many as the event has", low=1)
    iterations: int = knob(1, "times that both phases are done, each adding its share to the mask", low=1)
    l1: float = knob(
        0.0, "weight of the mean distance from theta0; the paper has 0.1 for languages, 0 for tasks", low=0
    )
    norms: bool = knob(True, "whether normalisations learn")
    start: str = knob(
        "here", "what a skill is learned on: the network as it is, or without earlier skills", choices=("here", "base")
    )

    def setup(self) -> None:
        self.skills = Skills()

    def learn(self, u: Update) -> None:
        params = dict(u.model.named_parameters())
        if self.start == "base":
            self.skills.take_off(params)
        whole = set() if isinstance(u.problem, CausalLM) else set(_inside(u.model, [head_name(u.model)]))
        frozen = set() if self.norms else set(_inside(u.model, norm_modules(u.model)))
        trained = [name for name in u.parameters if name not in frozen]
        sparse = [name for name in trained if name not in whole]
        self._theta0 = {name: params[name].detach().clone() for name in trained}
        u.extra_bytes += tensor_bytes(list(self._theta0.values()))
        self._params = sum(p.numel() for p in params.values())
        chosen = {name: torch.zeros_like(params[name], dtype=torch.bool) for name in sparse}
        count = int(self.density * sum(mask.numel() for mask in chosen.values())) // self.iterations
        u.extra_bytes += tensor_bytes(list(chosen.values()))
        for _ in range(self.iterations):
            before = [(t, t.detach().clone()) for t in (*params.values(), *u.model.buffers())]
            self._mask: dict[str, Tensor] = {}
            u.run(trainable=trained, epochs=u.settings.epochs if self.full is None else self.full)
            moved = {name: (params[name].detach() - self._theta0[name]).abs() for name in sparse}
            more = top_entries({name: m.masked_fill(chosen[name], -1.0) for name, m in moved.items()}, count)
            chosen = {name: chosen[name] | more[name] for name in sparse}
            with torch.no_grad():
                for tensor, value in before:
                    tensor.copy_(value)
            self._mask = chosen
            u.run(trainable=trained, mask=chosen)
        u.extra_bytes += tensor_bytes([value for _, value in before])

    def gradient(self, u: Update) -> None:
        if self.l1:
            for name, p in u.parameters.items():
                if p.grad is not None:
                    p.grad.add_((p.detach() - self._theta0[name]).sign(), alpha=self.l1 / self._params)
        mask_gradients(u.parameters, self._mask)  # for the clipping: the loop puts masked entries back by itself

    def end(self, u: Update) -> None:
        params = dict(u.model.named_parameters())
        if self.start == "base":
            delta = SparseDelta.between(self._theta0, params)
            delta.take_off(params)
            self.skills.deltas[u.event] = delta
            self.skills.put_on(params)
        else:
            self.skills.deltas[u.event] = SparseDelta.between(self._theta0, params)

    def compose(self, model: nn.Module, skills: Iterable[str] = ()) -> nn.Module:
        """A copy of the life's network with the base's weights and those of the skills, named by their events, such as ``learn/0``.

        Raises:
            UnknownName: there is no such skill.
        """
        made = copy.deepcopy(model)
        params = dict(made.named_parameters())
        self.skills.take_off(params)
        self.skills.put_on(params, skills)
        return made

    def forgot(self, u: Update, ids: Ids) -> None:
        self.skills = Skills()


def _inside(model: nn.Module, modules: Iterable[str]) -> list[str]:
    """Names of the parameters that the modules own."""
    owners = set(modules)
    return [name for name, _ in model.named_parameters() if name.rpartition(".")[0] in owners]
