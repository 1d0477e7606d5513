"""What all tests have in common."""

from hypothesis import HealthCheck, settings

# A busy machine must not fail a property test, and a failure must come again.
settings.register_profile("handoff", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("handoff")
