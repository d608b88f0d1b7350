"""Trigpoint: a recovery point for every database transaction that matters."""
