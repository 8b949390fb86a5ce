"""How gunicorn runs the app: gunicorn -c python:hatespeech.serving.gunicorn_conf 'app:create_app()'."""

# One process, so that one gate stands before Ollama; more threads than places and queue, so that the rest are refused
# at once and the health check answers.
threads = 64
# Longer than clients wait between two requests: a connection closed under a client's hands is a request lost to it.
keepalive = 75
loglevel = "warning"
