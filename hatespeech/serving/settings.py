"""The service's settings: read once from the environment, each checked by its type, refused by name."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from hatespeech import UserError, ollama

ROOT = Path(__file__).parents[2]
# Never shown, not even when they are wrong.
SECRETS = ("LOG_HASH_KEY", "DATABASE_URL")


def _hosts(value: str) -> str:
    """Addresses of Ollama, separated by commas."""
    for host in value.split(",") if value else ():
        if not host.strip():
            raise ValueError("an empty address between commas")
        ollama.base_url(host.strip())
    return value


def _origins(value: str) -> str:
    """Origins of web pages, separated by commas: scheme, name and port, as a browser sends them."""
    for origin in _listed(value):
        if not re.fullmatch(r"https?://([a-z0-9.-]+|\[[0-9a-f:.]+\])(:\d+)?", origin):
            raise ValueError("an origin is as in https://www.example.org, with no path and no *")
        if re.match(r"http:.*:80$|https:.*:443$", origin):
            raise ValueError("a browser leaves out the port that goes without saying: leave it out too")
    return value


def _listed(value: str) -> list[str]:
    return [each.strip().lower() for each in value.split(",") if each.strip()]


Seconds = Annotated[float, Field(gt=0, le=3600, allow_inf_nan=False)]


class Settings(BaseSettings):
    """A setting of the environment for each field, in capitals: OLLAMA_HOST for ollama_host."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", env_ignore_empty=True, str_strip_whitespace=True)

    model_dir: Path = Field(
        ROOT / "results" / "smollm2-135m", description="the run to serve, a folder of python -m train"
    )
    ollama_host: Annotated[str, AfterValidator(_hosts)] = Field("127.0.0.1:11434", description="the Ollama to ask")
    ollama_hosts: Annotated[str, AfterValidator(_hosts)] = Field(
        "", description="several instead, separated by commas: the least busy healthy one is asked"
    )
    ollama_timeout_s: Seconds = Field(
        10, description="seconds an answer of Ollama may take before the service says 503"
    )
    ollama_load_timeout_s: Seconds = Field(300, description="seconds Ollama may take to load the model")
    database_url: str = Field(
        f"sqlite:///{ROOT / '.data' / 'requests.sqlite3'}", description="the log: sqlite:///FILE or postgresql://..."
    )
    uploads_dir: Path = Field(ROOT / ".data" / "files", description="files given to the page; deleted there")
    host: str = Field("127.0.0.1", min_length=1, description="where it listens; off loopback it demands API keys")
    require_api_key: bool = Field(False, description="1 to demand API keys on loopback too")
    trusted_hosts: str = Field("", description="names besides localhost that it answers to without a key, with commas")
    cors_origins: Annotated[str, AfterValidator(_origins)] = Field(
        "", description="origins whose pages may call the API from a browser, with commas: https://www.example.org"
    )
    trusted_proxies: int = Field(
        0, ge=0, le=16, description="how many proxies stand before it, whose headers then count"
    )
    max_in_flight: int = Field(4, ge=1, le=1024, description="texts at each Ollama at a time")
    max_queue: int = Field(32, ge=0, le=4096, description="texts waiting for that; more get 503")
    flag_above: float | None = Field(
        None, gt=0, lt=1, description="the P(Hate) from which an answer is flagged; else as the run was calibrated"
    )
    log_text: Literal["full", "hash", "none"] = Field("full", description="what the log keeps of a text")
    log_hash_key: str = Field("", description="the secret of LOG_TEXT=hash")
    perspective_unsupported: Literal["refuse", "omit"] = Field(
        "refuse", description="what becomes of attributes of Perspective API that this model can't score"
    )
    max_content_length: int = Field(1024 * 1024, ge=1, description="bytes of a request's body, but for uploads")

    @field_validator("model_dir", "uploads_dir", "database_url")
    @classmethod
    def _no_zero_byte(cls, value: Any) -> Any:
        if "\0" in str(value):
            raise ValueError("a path holds no zero byte")
        if not str(value).strip():
            raise ValueError("names nothing")
        return value

    @field_validator("uploads_dir")
    @classmethod
    def _a_folder_of_its_own(cls, value: Path) -> Path:
        if value in (Path(), Path("/"), Path.home()):
            raise ValueError("files need a folder of their own")
        return value

    @model_validator(mode="after")
    def _hash_needs_a_secret(self) -> "Settings":
        if self.log_text == "hash" and not self.log_hash_key:
            raise ValueError("LOG_TEXT=hash needs a secret in LOG_HASH_KEY, or anyone could guess texts by their hash")
        return self

    @property
    def hosts(self) -> list[str]:
        return [host.strip() for host in (self.ollama_hosts or self.ollama_host).split(",")]

    @property
    def trusted_names(self) -> list[str]:
        return _listed(self.trusted_hosts)

    @property
    def allowed_origins(self) -> list[str]:
        return _listed(self.cors_origins)


def read(given: dict | None = None) -> Settings:
    """The settings: given ones (by their names in capitals) before the environment's, before the defaults.

    Raises UserError that names the setting, what is wrong with it, and what it is.
    """
    named = {name.lower(): value for name, value in (given or {}).items() if value not in ("", None)}
    try:
        return Settings(**named)
    except ValidationError as error:
        raise UserError("; ".join(_said(each) for each in error.errors())) from error


def _said(error: dict) -> str:
    reason = error["msg"].removeprefix("Value error, ")
    if not error["loc"]:
        return reason
    name = str(error["loc"][0]).upper()
    field = Settings.model_fields.get(name.lower())
    shown = "" if name in SECRETS else f"={str(error['input'])[:100]!r}"
    what = f". {name} is {field.description}" if field else ""
    return f"{name}{shown}: {reason[0].lower()}{reason[1:]}{what}"
