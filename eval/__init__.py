"""Scores of what base and tuned model wrote, each difference with an interval, and the report of a run.

Called from outside: the stages `evaluate.evaluate_run`, `classification.evaluate_run` and `report.report`.
"""
