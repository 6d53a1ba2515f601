"""HTTP in front of the engine: OpenAI routes, live configuration, health and metrics."""
