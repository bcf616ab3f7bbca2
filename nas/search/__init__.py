"""Searching a space under hard budgets: feasible proposals, samplers, the trial log, the Pareto front."""
