"""Failing assignments: a change that breaks off at one of the moments at which a tensor gets other data."""

from ecospa_fx.model import cuts, journal


def fail_at(monkeypatch, count, error=MemoryError):
    """Raise an error at the `count`-th assignment, and only there: what is undone is assigned too."""
    assign, calls = journal.assign, []

    def failing(*args):
        calls.append(args)
        if len(calls) == count:
            raise error
        assign(*args)

    monkeypatch.setattr(journal, "assign", failing)
    monkeypatch.setattr(cuts, "assign", failing)
