"""Measuring models: complexity, and the paper's published tables."""
