"""Integrations with other frameworks; each module imports the framework it supports."""
