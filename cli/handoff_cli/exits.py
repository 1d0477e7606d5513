"""The exit statuses of the `handoff` command. Scripts depend on them: change none, add at the end."""

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended."""

    OK = 0
    """Done. With `--wait` and `watch`: the guest runs where it was asked to."""
    ABORTED = 1
    """The migration was undone, the guest is where it was; or the guest is lost. Of a rollout: a guest failed."""
    USAGE = 2
    """The command line, its configuration or the request is wrong (INVALID_ARGUMENT)."""
    NOT_FOUND = 3
    """No such guest, host or migration (NOT_FOUND)."""
    REFUSED = 4
    """Not possible as things stand (FAILED_PRECONDITION)."""
    UNAVAILABLE = 5
    """No controller answered, there is no leader, or a host is down (UNAVAILABLE, DEADLINE_EXCEEDED)."""
    EXHAUSTED = 6
    """Not enough memory, disk or ports at the destination (RESOURCE_EXHAUSTED)."""
    INTERNAL = 7
    """Anything unforeseen: a bug; see the controller's log."""
    INTERRUPTED = 130
    """Ctrl-C. A migration goes on."""


EXIT_HELP = """\b
Exit status:
    0  done; with --wait and watch: the guest runs where it was asked to
    1  the migration was undone, the guest is where it was, or is lost; or a rollout did not reach every guest
    2  the command line, configuration or request is wrong
    3  no such guest, host or migration
    4  refused as things stand
    5  no controller answered, no leader, or a host is down
    6  not enough memory, disk or ports at the destination
    7  unforeseen: see the controller's log
  130  interrupted by Ctrl-C; a migration goes on
"""
