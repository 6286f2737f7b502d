"""Suites: evaluations over many tasks, with their tasks, splits and caps in a YAML file of this folder."""
