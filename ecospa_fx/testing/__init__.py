"""Testing of exactness, for the test suites of people who use ecospa_fx.

>>> from ecospa_fx.testing import assert_exact
>>> assert_exact(model, (x,))
"""

from .exact import assert_exact

__all__ = ["assert_exact"]
