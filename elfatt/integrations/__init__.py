"""Bridges to other frameworks; each file imports its framework, and nothing else of the package imports these files."""
