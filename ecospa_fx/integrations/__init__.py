"""Integrations: EcoSpa in the training loops that people have. Each imports its library, so none is imported here."""
