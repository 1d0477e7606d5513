"""Processes of the agent that must not outlive it, for the next one would not know of them."""

from typing import Final

# Before a command: it is killed when the thread ends that started it, the event loop's or one that the agent keeps.
# What it forks, as one that becomes a daemon does, is not.
WITH_US: Final = ("setpriv", "--pdeathsig", "KILL", "--")
