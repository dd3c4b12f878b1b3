"""Errors for users to fix."""

from __future__ import annotations

import os


class UserError(ValueError):
    """A problem for the user to fix; programs print its one line and exit, without a traceback.

    Args:
        where: File, folder or option; without ``fault``, the whole message.
        fault: What is wrong, as a predicate of ``where``.
        remedy: How to fix it.
    """

    def __init__(self, where: str | os.PathLike, fault: str = "", remedy: str = ""):
        super().__init__(f"{where} {fault}: {remedy}" if fault else str(where))
        self.remedy = remedy
