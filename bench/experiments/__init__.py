"""Experiments on coupled sparsity: does it work, and why. One command each.

PYTHONPATH=bench python -m experiments.coupled --data DIR

tasks     small tasks: bytes of text, associative recall
language  all text at hand, in tokens      images  CIFAR-10      mails  spam or not
runs      dense runs, and the runs that branch off from them and shrink; long ones go on where they were stopped
scratch   models of the final size from the start
results   tables, CSV and plots
"""
