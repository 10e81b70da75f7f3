"""Experiments on coupled sparsity: does it work, and why. One command each.

PYTHONPATH=bench python -m experiments.coupled --data DIR

tasks     the tasks: text, images, associative recall
runs      dense runs, and the runs that branch off from them and shrink
results   tables, CSV and plots
"""
