"""Averaging models now and then instead of gradients always, at torch's names.

utils.py takes a mean once, averagers.py and hierarchical_model_averager.py say when and over whom,
diloco.py lets an outer optimizer follow the mean.
"""
