"""Flat Trajectory Distillation on one machine.

Du et al., *Minimizing the Accumulated Trajectory Error to Improve Dataset Distillation*,
CVPR 2023 (arXiv 2211.11004). This package is the algorithm alone: it knows torch, torchvision,
numpy, pyarrow and scikit-learn, and nothing of Ray, Optuna or MLflow (``ftd_ray`` does).

Shape letters used throughout: N images, C channels, H height, W width, K classes,
P parameters of a network (always one flat float32 vector).
"""

__version__ = "0.1.0"
