"""Measurements: each against a baseline in the same run, with the raw numbers kept."""
