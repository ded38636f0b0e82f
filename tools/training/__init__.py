"""What `tools/train_classifier.py` and `tools/validate.py` are made of, around timm's parts.

Every random draw of a run is a function of the seed and of where it happens (see `seeding`), so no generator's state
is ever stored, and a resumed run is the unbroken one.
"""
