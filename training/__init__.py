"""The scorer: model, pairs, training loop, and training it on Ray Train."""
