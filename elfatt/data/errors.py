"""The error of everything that a user has to put right."""

from __future__ import annotations

import os


class UserError(ValueError):
    """What a user has to put right, in one line; the programs end with it, without a traceback.

    Args:
        where: File, folder or option; alone, the whole message.
        fault: What is wrong, as the rest of a sentence about it.
        remedy: What to do.
    """

    def __init__(self, where: str | os.PathLike, fault: str = "", remedy: str = ""):
        super().__init__(f"{where} {fault}: {remedy}" if fault else str(where))
        self.remedy = remedy
