"""Models on their way to torch.ao's quantisation."""

from __future__ import annotations

from torch import nn

#: torch.ao's modules by the names of their classes: placeholders that its conversion replaces.
_PLACEHOLDERS = frozenset({"QuantStub", "DeQuantStub", "FloatFunctional"})


def quantised(module: nn.Module) -> str | None:
    """Why a module that torch.ao quantises is left alone, with all that is in it; None for others.

    torch.ao's tools, and the models' own preparation, compare classes (``type(m) is QuantizableBottleneck``), put observers on
    modules and replace them, so a model on its way there must stay as it is.
    """
    for name, child in module.named_children():
        if type(child).__name__ in _PLACEHOLDERS and type(child).__module__.startswith("torch.ao."):
            return f"made to be quantised: its {name} is a {type(child).__name__}"
    return None
