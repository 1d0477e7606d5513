"""What the lab reports to its user. Not handoff_common's errors: those import gRPC, half a second for every command."""


class LabError(Exception):
    """The lab can't do what was asked; the message says why and what to do."""
