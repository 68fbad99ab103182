"""The OpenAI-compatible HTTP server: FastAPI in front of one ``hf_twilight.engine.Engine``."""
