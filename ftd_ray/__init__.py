"""Sweeps of Flat Trajectory Distillation on Ray: experts, search and tracking around ``ftd``."""
