"""Helpers for every package that know nothing about training: files, leases, safe text, validated JSON, errors."""
