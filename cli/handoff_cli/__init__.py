"""The `handoff` command: a client of the controller's API like any other."""
