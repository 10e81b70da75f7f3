"""Experiments that ask whether coupled sparsity works, and why. One command each.

PYTHONPATH=bench python -m experiments.coupled --data DIR

tasks     what is learned: text, images, associative recall
runs      dense runs, and the runs that branch off from them and shrink
results   tables, CSV and plots
"""
