"""Integrations: callbacks for training loops of other libraries; each imports its library, so none is imported here."""
