"""Faults on real processes: what dies, is cut, is full or is off, and what must hold all the same."""
