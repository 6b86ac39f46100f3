"""Every stage and model against stock torch and against the floor: `python -m pytest benchmarks --group ops`."""
