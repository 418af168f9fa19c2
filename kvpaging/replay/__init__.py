"""Traces through the very code that serves: the cache alone, or the scheduler in simulated time."""
