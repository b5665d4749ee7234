"""Who watches operations of this thread by a mode of PyTorch's."""

from __future__ import annotations

from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext


def function_modes() -> list[object]:
    """Those that are shown functions, outermost first."""
    return list(_get_current_function_mode_stack())  # type: ignore[no-untyped-call]


def watching_functions() -> bool:
    """Whether one of them is more than ``torch.device`` as a context."""
    return any(type(mode) is not DeviceContext for mode in function_modes())
