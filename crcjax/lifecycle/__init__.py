"""The life of models after training: registry, releases, drift, comparison and retraining (docs/lifecycle.md)."""
