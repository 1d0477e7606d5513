"""What every part of Handoff shares: channels, servers, errors, logs, configuration."""
