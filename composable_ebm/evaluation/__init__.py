"""Evaluation: judges, composition accuracy, diversity, detection and calibration, as tables and plots."""

from composable_ebm.evaluation.family import Evaluation, evaluate_family

__all__ = ["Evaluation", "evaluate_family"]
