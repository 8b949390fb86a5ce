# The service alone: Ollama and the database are other containers (compose.yaml).
FROM python:3.12-slim AS build
WORKDIR /source
COPY pyproject.toml README.md LICENSE app.py train.py ./
COPY hatespeech hatespeech
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir .

FROM python:3.12-slim
RUN useradd --uid 10001 --no-create-home hatespeech && install -d -o hatespeech -m 0700 /data
COPY --from=build /venv /venv
COPY results/smollm2-135m /run-folder/smollm2-135m
WORKDIR /data
USER hatespeech
ENV PATH=/venv/bin:$PATH \
    HOST=0.0.0.0 \
    MODEL_DIR=/run-folder/smollm2-135m \
    DATABASE_URL=sqlite:////data/requests.sqlite3 \
    UPLOADS_DIR=/data/files
EXPOSE 5000
HEALTHCHECK CMD ["python", "-c", "import urllib.request; urllib.request.urlopen('http://127.0.0.1:5000/healthcheck', timeout=10)"]
CMD ["gunicorn", "--config", "python:hatespeech.serving.gunicorn_conf", "--bind", "0.0.0.0:5000", "app:create_app()"]
