"""Measurements: ``make bench`` runs them and writes ``results.json`` and ``README.md`` here."""

from ftd_ray.local import ask_for_token

ask_for_token()  # before Ray is imported: its clusters here are nobody else's
