"""Sparse autoencoders trained by constrained optimisation: give an L0, get that L0.

    from spalf import load_sae, patched

    sae = load_sae("results/demo-2l/L0_16/seed_0/phase2")
    z = sae.encode(x)
    with patched(model, sae):
        logits = model(tokens).logits

What is listed here is imported when it is first used, so ``import spalf`` loads no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spalf.interchange import LoadedSAE, load_sae, patched

__all__ = ["LoadedSAE", "load_sae", "patched"]


def __getattr__(name: str) -> Any:
    """Import a public name of the package on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from spalf import interchange

    return getattr(interchange, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
