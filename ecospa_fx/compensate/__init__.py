"""Compensate: statistics, regression and rotation, by which entries that stay take over from those that go."""
