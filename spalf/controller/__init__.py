"""Filters, multipliers, penalties and the setpoint loop: all that is not gradient descent."""

from spalf.controller.capu import penalties
from spalf.controller.controller import (
    ControllerGains,
    ControllerReading,
    ControllerState,
    initial_state,
    update,
)
from spalf.controller.filters import Ema, ema_update, ema_value
from spalf.controller.laws import LawState, adrc, gradient_ascent, proportional_integral
from spalf.controller.setpoint import move_setpoint

__all__ = [
    "ControllerGains",
    "ControllerReading",
    "ControllerState",
    "Ema",
    "LawState",
    "adrc",
    "ema_update",
    "ema_value",
    "gradient_ascent",
    "initial_state",
    "move_setpoint",
    "penalties",
    "proportional_integral",
    "update",
]
