"""Post-processing, metrics, evaluation and prediction."""
