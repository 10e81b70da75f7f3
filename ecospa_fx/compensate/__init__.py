"""Compensate: what the entries that stay take over of those that go."""
