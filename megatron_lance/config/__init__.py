"""Configuration: frozen dataclasses (schema), the YAML loader, and the rules that span fields (validate)."""
