"""Keyword arguments on a command line."""

from __future__ import annotations

import argparse

from timm.utils import ParseKwargs


class Keywords(ParseKwargs):
    """Action for ``--model-kwargs a=1 b=[2,3]``, merged into the default or an earlier value."""

    def __call__(self, parser, namespace, values, option_string=None):
        """Parse and merge; the parser exits on an argument without ``=``."""
        base = dict(getattr(namespace, self.dest, None) or {})
        for value in values:
            if "=" not in value:
                raise argparse.ArgumentError(self, f"expected KEY=VALUE, got {value!r}")
        super().__call__(parser, namespace, values, option_string)
        setattr(namespace, self.dest, {**base, **getattr(namespace, self.dest)})
