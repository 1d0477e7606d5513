"""The host's part of the tenants' networks: which flows its bridge must have, and how they get there."""
