"""Boosted decoding as a service: the LLM samples, the scorer picks, an OpenAI-shaped gateway in front."""
