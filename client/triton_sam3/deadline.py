"""`timeout`: a block of awaits with a deadline.

`asyncio.wait_for` would not do: before Python 3.12 it swallows a cancellation that arrives together
with the answer, and the cancelled task would go on.
"""

import sys

if sys.version_info >= (3, 11):
    from asyncio import timeout
else:
    from async_timeout import timeout  # type: ignore[import-not-found, unused-ignore]

__all__ = ["timeout"]
