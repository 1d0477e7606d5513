"""When a fault strikes: a moment for each live state of the machine, and two for the one in which the guest stops."""

from collections.abc import Mapping
from enum import StrEnum
from typing import Final

from handoff_controller.machine import State


class Moment(StrEnum):
    """A point that a migration can be held at; hold.py says how."""

    PLANNED = "planned"
    """Recorded; another migration between the two hosts goes first."""
    PREPARING = "preparing"
    """The destination's QEMU has been started; the leader has not heard of it."""
    COPYING = "copying"
    """Memory is on its way, slowly."""
    PAUSED = "switching-paused"
    """The guest stands still and its last pages are being sent."""
    HELD = "switching-held"
    """The source is held and the destination whole; the commit is not recorded."""
    COMMITTED = "committed"
    """The destination owns the guest and has not been told so."""
    FINISHING = "finishing"
    """The guest runs at the destination; the held source is still there."""
    ABORTING = "aborting"
    """Cancelled in the copy: the source is told, the destination's copy is still there."""


MOMENTS: Final[Mapping[State, tuple[Moment, ...]]] = {
    State.PLANNED: (Moment.PLANNED,),
    State.PREPARING: (Moment.PREPARING,),
    State.COPYING: (Moment.COPYING,),
    State.SWITCHING: (Moment.PAUSED, Moment.HELD),
    State.COMMITTED: (Moment.COMMITTED,),
    State.FINISHING: (Moment.FINISHING,),
    State.ABORTING: (Moment.ABORTING,),
}
"""Every state that is not final."""

STATE_OF: Final[Mapping[Moment, State]] = {moment: state for state, moments in MOMENTS.items() for moment in moments}
