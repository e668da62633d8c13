"""What a memory costs, holder by holder."""

from __future__ import annotations

from dataclasses import dataclass

from remanence.nn.anatomy import module_bytes
from remanence.train.roles import Metric
from remanence.train.update import Context


@dataclass
class Bytes(Metric):
    """Bytes of each holder, ``bytes/<holder>``, and of all together, ``bytes``; lower is cheaper.

        bytes = sum over holders of sum over their tensors of numel x element size, shared storage once

    The holders are the life's (``c.holders``, name to bytes) where it offers them; the model's own bytes are
    ``bytes/model`` (parameters and buffers, shared storage once). Inside a run they are the model, its owner and its
    parts, and ``bytes/scratch`` is what the run itself keeps beside them.

    Pick it whenever methods are compared: an exemplar costs as much as a weight. Needs: nothing.
    Source: the holders' own ``bytes()``.
    """

    def value(self, c: Context) -> dict[str, float]:
        found: dict[str, int] = {}
        if c.holders:
            found.update(c.holders)
        else:
            for part in [getattr(c, "owner", None), *getattr(c, "parts", [])]:
                if part is not None:
                    name = part.slug
                    while name in found:  # the same method twice
                        name += "+"
                    found[name] = int(part.bytes())
            scratch = int(getattr(c, "extra_bytes", 0))
            if scratch:
                found["scratch"] = scratch
        if not {"model", "weights"} & set(found):
            found["model"] = module_bytes(c.model)
        return {"bytes": float(sum(found.values())), **{f"bytes/{name}": float(size) for name, size in found.items()}}
