"""What `tools/compare_attention.py` and `tools/approximation.py` are made of: tasks, models, runs, reports."""
