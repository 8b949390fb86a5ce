"""The service: a run's folder and an Ollama behind HTTP, pages and a log. Imports the ground floor alone."""
