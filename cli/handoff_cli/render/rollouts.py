"""Rollouts: the table, one in full, and what there is to say of one in a sentence."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.text import Text

from handoff.controller.v1.rollouts_pb2 import Rollout, RolloutGuest, RolloutGuestState, RolloutState
from handoff_cli.render.parts import moment, table
from handoff_cli.states import rollout_guest_state, rollout_state
from handoff_cli.units import format_age, format_clock, format_duration

STYLES = {
    "DONE": "green",
    "FAILED": "red",
    "CANCELLED": "yellow",
    "STOPPING": "yellow",
    "upgraded": "green",
    "failed": "red",
    "upgrading": "bold magenta",
    "pending": "dim",
    "skipped": "dim",
}
UPGRADING = RolloutGuestState.ROLLOUT_GUEST_STATE_UPGRADING
# In the order in which they are counted up.
COUNTED = ("upgraded", "skipped", "failed", "upgrading", "pending")


def rollouts_table(rollouts: Sequence[Rollout], now: datetime) -> RenderableType:
    """One line a rollout."""
    if not rollouts:
        return Text("No rollouts.")
    made = table(
        ("ROLLOUT", "HOST", "RELEASE", "AGE", "TOOK", "GUESTS", "STATE"), right=("AGE", "TOOK"), fold=("GUESTS",)
    )
    for rollout in rollouts:
        made.add_row(
            rollout.id,
            rollout.host,
            rollout.release,
            format_age((now - moment(rollout.create_time)).total_seconds()),
            format_duration(lasted_s(rollout, now)),
            counts(rollout),
            state_text(rollout),
        )
    return made


def rollout_record(rollout: Rollout, now: datetime) -> RenderableType:
    """Head, and a line a guest."""
    made = table(("GUEST", "STATE", "MIGRATION", "REASON"), fold=("GUEST", "REASON"))
    for guest in rollout.guests:
        made.add_row(guest.name, guest_state_text(guest), guest.migration_id or "–", guest.reason)
    parts: list[RenderableType] = [headline(rollout, now), Text(f"{_how(rollout)}.")]
    if rollout.reason:
        parts.append(Text.assemble(("because: ", "bold"), rollout.reason))
    return Group(*parts, Text(), made if rollout.guests else Text("The host ran no guests."))


def headline(rollout: Rollout, now: datetime) -> Text:
    """What it is and how far."""
    text = Text.assemble((rollout.host, "bold"), f" → QEMU build {rollout.release}  ", state_text(rollout))
    text.append(f"  {format_duration(float(int(lasted_s(rollout, now))))}  {counts(rollout)}  ({rollout.id})")
    return text


def live_rollout(rollout: Rollout, now: datetime) -> RenderableType:
    """The headline, and below it what is under way."""
    lines = [
        Text(f"  {guest.name}  upgrading{f'; {guest.reason}' if guest.reason else ''}") for guest in _busy(rollout)
    ]
    return Group(headline(rollout, now), *lines)


def guest_line(guest: RolloutGuest, at: datetime) -> Text:
    """A line for a guest that has got further."""
    line = Text.assemble((format_clock(at), "dim"), f"  {guest.name}  ", guest_state_text(guest))
    if guest.migration_id:
        line.append(f"  {guest.migration_id}", "dim")
    return line.append(f"  {guest.reason}") if guest.reason else line


def counts(rollout: Rollout) -> str:
    """ "3 upgraded, 1 upgrading, 4 pending"; without what there is none of."""
    found = Counter(rollout_guest_state(guest.state) for guest in rollout.guests)
    return ", ".join(f"{found[name]} {name}" for name in COUNTED if found[name]) or "no guests"


def state_text(rollout: Rollout) -> Text:
    """The state in its colour."""
    name = rollout_state(rollout.state)
    return Text(name, style=STYLES.get(name, "cyan"))


def guest_state_text(guest: RolloutGuest) -> Text:
    """A guest's state in its colour."""
    name = rollout_guest_state(guest.state)
    return Text(name, style=STYLES.get(name, "cyan"))


def lasted_s(rollout: Rollout, now: datetime) -> float:
    """Seconds from creation until its end, or until now."""
    end = moment(rollout.end_time) if rollout.HasField("end_time") else now
    return max(0.0, (end - moment(rollout.create_time)).total_seconds())


def accepted_sentence(rollout: Rollout) -> Text:
    """After `upgrade --host` without --wait."""
    return Text(
        f"Rollout {rollout.id} of QEMU build {rollout.release} to {_guests(len(rollout.guests))} of {rollout.host} is "
        f"accepted. `handoff rollout {rollout.id} --watch` follows it."
    )


def cancelled_sentence(rollout: Rollout) -> Text:
    """After `rollout --cancel`."""
    return Text(f"Rollout {rollout.id} begins no more guests; those that are being upgraded are finished.")


def end_sentence(rollout: Rollout) -> str:
    """How a final rollout went."""
    reason = f": {rollout.reason.rstrip('.')}" if rollout.reason else ""
    if rollout.state == RolloutState.ROLLOUT_STATE_DONE:
        return f"{rollout.host} is through with QEMU build {rollout.release}: {counts(rollout)}."
    return (
        f"rollout {rollout.id} of {rollout.host} {rollout_state(rollout.state).lower()}{reason}. {counts(rollout)}. "
        f"Details: `handoff rollout {rollout.id}`"
    )


def _how(rollout: Rollout) -> str:
    failing = "goes on after a failure" if rollout.keep_going else "stops at the first failure"
    return f"{_guests(rollout.parallel)} at a time, {failing}"


def _guests(count: int) -> str:
    return f"{count} guest{'' if count == 1 else 's'}"


def _busy(rollout: Rollout) -> list[RolloutGuest]:
    return [guest for guest in rollout.guests if guest.state == UPGRADING]
