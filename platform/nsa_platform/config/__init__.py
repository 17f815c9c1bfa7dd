"""Typed configuration: one YAML file is one run, validated before anything starts."""
