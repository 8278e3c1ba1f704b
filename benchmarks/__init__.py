"""Measurements: ``make bench`` runs them and writes ``results.json`` and ``README.md`` here."""
