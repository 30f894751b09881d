"""What vLLM loads in each of its processes: next to nothing where no plan is to be served."""

from __future__ import annotations

import os

PLAN_VARIABLE = "MOEPLACE_VLLM_PLAN"


def install() -> None:
    """Serves the map in the file that `MOEPLACE_VLLM_PLAN` names; without the variable does nothing.

    Raises:
        FileFormatError, InputError: no plan there. UnsupportedError: vLLM cannot express it.
    """
    if os.environ.get(PLAN_VARIABLE):
        from .runtime.exporters.vllm import install as serve

        serve()
