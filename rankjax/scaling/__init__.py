"""Trials, ladders, studies, fits and the report: what to scale."""
