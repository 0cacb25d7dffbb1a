"""Readers of what hospitals have: each yields `SourceStudy` in a fixed order and reads no pixels."""
