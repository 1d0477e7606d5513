"""The fault matrix: every state of a migration, every fault, on a real fleet; what must be true afterwards."""
