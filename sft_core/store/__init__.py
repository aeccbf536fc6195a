"""The store: outputs that are addressed by what went into them, whole or absent, and verifiable."""
