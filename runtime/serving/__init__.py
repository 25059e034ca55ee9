"""Prefill, decode, append and generation over caches."""
